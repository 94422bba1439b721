"""Every end of ``fastflow train``: one line, the right exit code, soon, and no process left, with any number of workers."""

import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from fastflow import checkpoint

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

SETTINGS = (
    "--levels 1 --steps-per-level 1 --hidden 4 --batch-size 4 --image-size 8 --final-samples 1 --samples 1"
)
SETTINGS = f"{SETTINGS} --steps 100000 --save-every 100000 --eval-every 100000 --sample-every 100000 --reversible no".split()
SOON = 2.0  # seconds, on an idle machine
WORKERS = [0, 1, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


class Train:
    """``fastflow train`` in one process, or in ``ranks`` that find each other as torchrun's do, until it takes steps."""

    def __init__(self, commands, place, data, workers, ranks=1, ignored=()):
        self.run = place / "run"
        argv = ["train", "--data", str(data), "--out", str(self.run), "--workers", str(workers), *SETTINGS]
        environment, self.ranks = [{}], []
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                shared = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(s.getsockname()[1]),
                    "WORLD_SIZE": str(ranks),
                }
            environment = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]
        for i, each in enumerate(environment):
            self.ranks.append(commands.start(place / f"{i}.log", *argv, ignored=ignored, **each))
        self.first = self.ranks[0]

    def steps(self, count=3):
        """Wait until it has taken ``count`` steps."""
        self.first.wait_for(lambda: self.metrics().count(b"\n") > count)
        return self

    def metrics(self):
        path = self.run / "metrics.csv"
        return path.read_bytes() if path.exists() else b""

    def ends(self, codes, *lines):
        """Assert the exit codes, the last line of each of the first ranks, and that no process is left."""
        began, soon = time.monotonic(), SOON * max(1, os.getloadavg()[0] / os.cpu_count())
        found = [rank.wait(20) for rank in self.ranks]
        took = time.monotonic() - began
        left = [not rank.gone(max(0.1, soon - took)) for rank in self.ranks]
        said = [rank.said() for rank in self.ranks]
        assert found == codes, said
        assert took < soon and not any(left), (took, left, said)
        for text in said:
            assert "Traceback" not in text and "leaked" not in text and len(text.splitlines()) <= 3, text
        for words, text in zip(lines, said, strict=False):
            assert words in text.splitlines()[-1], text


def worker_of(command):
    return max(pid for pid in command.processes() if pid != command.pid)


@pytest.mark.parametrize("workers", WORKERS)
def test_ends_of_one_process(workers, commands, folder, tmp_path):
    def started(name):
        (tmp_path / name).mkdir()
        return Train(commands, tmp_path / name, folder, workers).steps()

    for signum in (signal.SIGINT, signal.SIGTERM):
        run = started(signum.name)
        for pid in run.first.processes():  # as a terminal and a scheduler do
            os.kill(pid, signum)
        run.ends([128 + signum], "to go on: python -m fastflow train --resume")
        assert checkpoint.read(run.run / "last.pt")["training"]["step"] >= 3
    run = started("SIGKILL")
    assert len(run.first.processes()) == 1 + workers
    os.kill(run.first.pid, signal.SIGKILL)
    run.ends([-signal.SIGKILL])
    run = started("full disk")
    resource.prlimit(run.first.pid, resource.RLIMIT_FSIZE, (1500, 1500))
    run.ends([1], ": File too large")  # metrics.csv or TensorBoard's events
    run = Train(commands, tmp_path, damaged(folder, tmp_path / "data"), workers)
    run.first.wait_for(lambda: "error" in run.first.said())
    run.ends([1], "/data/7.png: ")


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_a_killed_worker_ends_the_run(workers, commands, folder, tmp_path):
    run = Train(commands, tmp_path, folder, workers).steps()
    os.kill(worker_of(run.first), signal.SIGKILL)
    run.ends(
        [1], "error: a data-loading process was killed by SIGKILL; if memory ran out, use fewer --workers"
    )


def test_schedulers_signals_stop_a_run_and_ignored_ones_do_not(commands, folder, tmp_path):
    run = Train(commands, tmp_path, folder, 1, ignored=[signal.SIGINT, signal.SIGHUP]).steps()
    for signum in (signal.SIGINT, signal.SIGHUP):
        os.kill(run.first.pid, signum)
    run.steps(run.metrics().count(b"\n") + 3)
    os.kill(run.first.pid, signal.SIGUSR1)
    run.ends([128 + signal.SIGUSR1], "to go on: python -m fastflow train --resume")
    (tmp_path / "again").mkdir()
    run = Train(commands, tmp_path / "again", folder, 1).steps()
    for pid in run.first.processes():
        os.kill(pid, signal.SIGHUP)
    run.ends([128 + signal.SIGHUP], "to go on: python -m fastflow train --resume")


def test_workers_use_no_shared_memory(commands, folder, tmp_path):
    """A container's small /dev/shm is enough."""
    run = Train(commands, tmp_path, folder, 2).steps()
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in run.first.processes()]
    assert len(maps) == 3 and not any("/dev/shm" in text or "/torch_" in text for text in maps)
    os.kill(run.first.pid, signal.SIGKILL)
    run.ends([-signal.SIGKILL])


@pytest.mark.parametrize("workers", WORKERS)
def test_ends_of_two_ranks(workers, commands, folder, tmp_path):
    def started(name, data=folder):
        (tmp_path / name).mkdir()
        return Train(commands, tmp_path / name, data, workers, 2)

    lost = "error: rank 0: another rank died or does not respond"
    run = started("SIGTERM").steps()
    for rank in run.ranks:  # as torchrun does
        os.kill(rank.pid, signal.SIGTERM)
    run.ends([128 + signal.SIGTERM] * 2, "to go on: python -m fastflow train --resume")
    run = started("lost rank").steps()
    os.kill(run.ranks[1].pid, signal.SIGKILL)
    run.ends([1, -signal.SIGKILL], lost)
    run = started("damaged", damaged(folder, tmp_path / "data"))
    run.first.wait_for(lambda: any("error" in rank.said() for rank in run.ranks))
    run.ends([1, 1])
    assert any("/data/7.png: " in rank.said() for rank in run.ranks)
    if workers:
        run = started("killed worker").steps()
        os.kill(worker_of(run.ranks[1]), signal.SIGKILL)
        run.ends([1, 1], lost, "error: rank 1: a data-loading process was killed by SIGKILL")


def test_outputs_and_environments_that_cannot_be(commands, folder, tmp_path):
    started, reader = [], tmp_path / "pipe"
    os.mkfifo(reader)
    read = os.open(reader, os.O_RDONLY | os.O_NONBLOCK)

    def start(name, words, **options):
        argv = ["train", "--data", str(folder), "--out", str(tmp_path / name), "--workers", "0", *SETTINGS]
        started.append((commands.start(tmp_path / f"{name}.log", *argv, **options), words))

    start("full", "error: standard output: No space left on device", out="/dev/full")
    start("pipe end", "error: standard output: Broken pipe", out=reader)
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    start(
        "rank",
        "error: rank 0: MASTER_PORT: got none with RANK, expected a port, as torchrun sets it",
        **alone,
    )
    started[1][0].wait_for((tmp_path / "pipe end.log").exists)  # it has opened the pipe, which needs a reader
    os.close(read)
    for command, words in started:
        assert command.wait() == 1, command.said()
        assert command.said().startswith(words) and len(command.said().splitlines()) == 1, command.said()


def test_what_was_found_is_said(commands, folder, tmp_path):
    pytest.importorskip("sklearn")
    run = Train(commands, tmp_path, folder, 0).steps(1)
    os.kill(run.first.pid, signal.SIGKILL)
    assert "images: 37 to train on, 3 to test on; no classes\n" in run.first.said()
    (tmp_path / "photos").mkdir()
    argv = ["train", "--data", "photos", *SETTINGS, "--image-size", "32"]
    command = commands.start(tmp_path / "log", *argv, cwd=tmp_path)
    command.wait_for(
        lambda: "data: photos is built in; the folder of this name is ./photos\n" in command.said()
    )
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL


def damaged(folder, copy):
    """The images of ``folder``, one of which ends early."""
    shutil.copytree(folder, copy)
    (copy / "7.png").write_bytes((copy / "7.png").read_bytes()[:100])
    return copy
