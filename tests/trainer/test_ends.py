"""Every end of ``fastflow train``: the right exit code, soon, at most one line, and no process left, with any number of
workers, alone and with two ranks."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from fastflow import checkpoint
from tests.support.training import KILLED, LOST, Train, damaged, images

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL.Image")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images(tmp_path_factory.mktemp("ends") / "images")


@pytest.fixture(
    params=[(0, 1), (1, 1), (4, 1), (0, 2), (1, 2), (4, 2)], ids="{0[0]}_workers_{0[1]}_ranks".format
)
def started(request, commands, folder, tmp_path):
    """A function that starts a run; it has the numbers of workers and ranks."""
    workers, ranks = request.param

    def start(name, data=folder, more=None, **options):
        options |= {} if more is None else {"more": more.split()}
        return Train(commands, tmp_path / name, data, workers, ranks, **options)

    start.workers, start.ranks = workers, ranks
    start.half = (workers.bit_length() + ranks) % 2
    return start


def test_signals_save(started):
    """One handler takes the signals: each comes with each number of workers, and with each number of ranks."""
    for signum in SIGNALS[started.half :: 2]:
        run = started(signum.name).steps()
        for _ in range(2):  # as Slurm, which signals each process, and then torchrun
            run.signal(signum)
        # a rank that has not got it yet stops with the others, as after SIGTERM
        run.ends((128 + signum, 128 + signal.SIGTERM), "to go on: python -m fastflow train --resume")
        assert checkpoint.read(run.run / "last.pt")["training"]["step"] >= 3


def test_accidents(started, folder, tmp_path):
    alone, last = started.ranks == 1, started.ranks - 1
    run = started("killed").steps()
    assert [len(rank.processes()) for rank in run.ranks] == [1 + started.workers] * started.ranks
    os.kill(run.ranks[last].pid, signal.SIGKILL)
    run.ends(KILLED if alone else [1, KILLED], *([] if alone else [LOST.format(0)]))
    if started.workers:
        run = started("killed worker").steps()
        os.kill(run.workers(run.ranks[last])[-1], signal.SIGKILL)
        run.ends(
            1, *([] if alone else [LOST.format(0)]), "a data-loading process was killed by SIGKILL; if memory"
        )
    run = started("damaged", damaged(folder, tmp_path / "data"))
    run.first.wait_for(lambda: any("error" in text for text in run.said()))
    run.ends(1)
    assert any("/data/7.png: cannot be read as an image" in text for text in run.said())


def test_full_disks_and_closed_pipes(started, tmp_path):
    """The loop writes rows and pictures: each is refused with each number of workers, and with each number of ranks."""
    others = [LOST.format(1)] * (started.ranks - 1)
    if started.half:
        run = started("rows").steps()
        resource.prlimit(run.first.pid, resource.RLIMIT_FSIZE, (1500, 1500))
        run.ends(1, ": File too large", *others)  # metrics.csv or TensorBoard's events
        return
    run = started("pictures", more="--steps 40 --eval-every 40 --sample-every 20")
    run.first.wait_for((run.run / "last.pt").exists)
    (run.run / "samples.png.tmp").symlink_to("/dev/full")
    run.first.wait_for(lambda: "error" in run.first.said())
    run.ends(1, "/run/samples.png: No space left on device", *others)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    run = started("pipe", more="--steps 100000 --eval-every 40", stdout=tmp_path / "fifo").steps()
    os.close(reader)
    run.first.wait_for(lambda: "error" in run.first.said())
    run.ends(1, "standard output: Broken pipe", *others)


def test_success(started, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    run = started("success", tmp_path / "a.npz", "--steps 3")
    run.first.wait_for(lambda: run.first.said().endswith("samples.png\n"))
    run.ends(0)
    assert (run.run / "result.json").exists() and run.said()[1:] == [""] * (started.ranks - 1)


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "curve.png", "result.json"])
def test_a_disk_that_is_full_at_other_files(name, commands, folder, tmp_path):
    more = "--steps 20 --eval-every 10 --sample-every 10 --save-every 10".split()
    run = Train(commands, tmp_path, folder, 1, more=more)
    run.first.wait_for((run.run / "last.pt").exists)
    (run.run / f"{name}.tmp").symlink_to("/dev/full")
    run.first.wait_for(lambda: "error" in run.first.said())
    run.ends(1, f"/run/{name}: ")


def test_a_signal_to_one_rank_and_a_killed_first_rank(commands, folder, tmp_path):
    run = Train(commands, tmp_path / "signal", folder, 1, 2).steps()
    os.kill(run.ranks[1].pid, signal.SIGUSR1)
    run.ends([128 + signal.SIGTERM, 128 + signal.SIGUSR1], "to go on: python -m fastflow train --resume")
    run = Train(commands, tmp_path / "killed", folder, 1, 2).steps()
    os.kill(run.first.pid, signal.SIGKILL)
    run.ends([KILLED, 1])
    assert LOST.format(1) in run.said()[1]


def test_ignored_signals_stay_ignored(commands, folder, tmp_path):
    run = Train(commands, tmp_path, folder, 1, ignored=[signal.SIGINT, signal.SIGHUP]).steps()
    run.signal(signal.SIGINT)
    run.signal(signal.SIGHUP)
    run.steps(run.metrics().count(b"\n") + 3)
    run.signal(signal.SIGUSR1)
    run.ends(128 + signal.SIGUSR1, "to go on: python -m fastflow train --resume")


def test_workers_use_no_shared_memory(commands, folder, tmp_path):
    """A container's small /dev/shm is enough."""
    run = Train(commands, tmp_path, folder, 2).steps()
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in run.first.processes()]
    assert len(maps) == 3 and not any("/dev/shm" in text or "/torch_" in text for text in maps)
    os.kill(run.first.pid, signal.SIGKILL)
    run.ends(KILLED)
