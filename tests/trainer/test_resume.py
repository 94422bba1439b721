"""A training process that is killed at any moment and resumed ends as if nothing had happened, bit for bit."""

import os
import random
import signal
import sys
import time

import pytest
import torch

from fastflow import checkpoint
from tests.support.processes import processes, waves

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

STEPS = 80
# shuffled batches that straddle epochs, noise, warm-up, a clip that bites, mirrored images, evaluations and checkpoints out of step
SETTINGS = f"--steps {STEPS} --batch-size 6 --warmup 20 --clip 2 --horizontal-flip True --eval-every 9 --save-every 7 --lr 3e-3"
SETTINGS += (
    " --levels 2 --steps-per-level 1 --hidden 8 --final-samples 2 --samples 4 --ema 0.9 --reversible yes"
)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    return waves(tmp_path_factory.mktemp("data"))


def work(argv, log, hang):
    """What a training process runs; ``hang``: (file, which writing of it, "half" or "before the rename") to stop at."""
    from fastflow.trainer.cli import main

    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    if hang:
        hang_while_writing(*hang)
    sys.exit(main(argv))


def hang_while_writing(name, count, place):
    write, rename, seen = torch.save, os.replace, []

    def wait():
        print("hangs", flush=True)
        time.sleep(600)

    def half(contents, file):
        seen.append(file.name)
        if place == "half" and seen.count(file.name) == count and file.name.endswith(f"/{name}.tmp"):
            whole = open(f"{file.name}.whole", "wb+")
            write(contents, whole)
            os.unlink(whole.name)
            whole.seek(0)
            bytes_ = whole.read()
            file.write(bytes_[: len(bytes_) // 2])
            file.flush()
            wait()
        write(contents, file)

    def before(source, target):
        if (
            place == "before the rename"
            and str(target).endswith(f"/{name}")
            and seen.count(str(source)) == count
        ):
            wait()
        rename(source, target)

    torch.save, os.replace = half, before


class Training:
    """A run that is started, killed and resumed."""

    def __init__(self, folder, arrays):
        self.run, self.log, self.arrays = folder / "run", folder / "log.txt", arrays
        self.log.touch()
        self.process = None

    def start(self, *more, hang=None):
        new = not (self.run / "last.pt").exists()
        argv = (
            ["--data", str(self.arrays), "--out", str(self.run), *SETTINGS.split()]
            if new
            else ["--resume", str(self.run)]
        )
        self.process = processes.Process(target=work, args=(["train", *argv, *more], str(self.log), hang))
        self.process.start()
        return self

    def rows(self):
        path = self.run / "metrics.csv"
        return path.read_bytes().count(b"\n") - 1 if path.exists() else -1

    def wait_for(self, condition):
        end = time.monotonic() + 120
        while not condition():
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.001)

    def kill(self):
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL
        return self

    def finish(self):
        self.process.join(120)
        assert self.process.exitcode == 0, self.log.read_text()
        return self


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, arrays):
    return Training(tmp_path_factory.mktemp("undisturbed"), arrays).start().finish()


@pytest.fixture
def training(tmp_path, arrays):
    training = Training(tmp_path, arrays)
    yield training
    if training.process is not None and training.process.is_alive():
        training.process.kill()
        training.process.join()


def assert_equal_trees(a, b, place=""):
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_equal_trees(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal_trees(*pair, f"{place}.{i}")
    else:
        assert a == b, place


def assert_same_end(training, undisturbed):
    lines = (training.run / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, STEPS + 1)]
    assert (training.run / "metrics.csv").read_bytes() == (undisturbed.run / "metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        a, b = checkpoint.read(training.run / name), checkpoint.read(undisturbed.run / name)
        assert_equal_trees(a["state_dict"], b["state_dict"], name)
        if name == "last.pt":
            for key in ("optimizer", "trained", "rng", "step", "total", "best", "data"):
                assert_equal_trees(a["training"][key], b["training"][key], key)
    for name in ("samples.png", "result.json"):
        assert (training.run / name).read_bytes() == (undisturbed.run / name).read_bytes(), name
    assert not list(training.run.glob("*.tmp"))


def test_the_undisturbed_run_is_one_worth_comparing(undisturbed):
    from fastflow.trainer.progress import read_metrics

    rows = read_metrics(undisturbed.run / "metrics.csv")
    assert rows[-1]["train_bits_per_dim"] < rows[0]["train_bits_per_dim"] - 1
    assert sum(row["grad_norm"] > 2 for row in rows) > 10  # clipped
    assert rows[-1]["epoch"] == STEPS * 6 // 45 and rows[0]["lr"] < rows[19]["lr"] > rows[-1]["lr"]
    evaluated = [row["step"] for row in rows if row["test_bits_per_dim"] is not None]
    assert evaluated == [*range(9, STEPS, 9), STEPS]
    best = min(row["test_bits_per_dim"] for row in rows if row["test_bits_per_dim"] is not None)
    assert checkpoint.read(undisturbed.run / "last.pt")["training"]["best"] == pytest.approx(best, abs=1e-6)


def test_killed_at_random_steps(training, undisturbed):
    rng = random.Random(0)
    kills = 0
    at = 0
    while at < STEPS - 25:
        at = max(at, training.rows()) + rng.randrange(1, 25)
        training.start().wait_for(lambda at=at: training.rows() >= at)
        training.kill()
        kills += 1
    assert kills >= 3
    training.start().finish()
    assert_same_end(training, undisturbed)


@pytest.mark.parametrize(
    "name, place", [("last.pt", "half"), ("best.pt", "half"), ("last.pt", "before the rename")]
)
def test_killed_while_a_checkpoint_is_written(training, undisturbed, name, place):
    training.start(hang=(name, 5, place))
    training.wait_for(lambda: "hangs" in training.log.read_text())
    training.kill()
    beside = training.run / f"{name}.tmp"
    assert beside.exists()
    if place == "half":
        with pytest.raises(checkpoint.CheckpointError, match="truncated"):
            checkpoint.read(beside)
    kept = checkpoint.read(training.run / "last.pt")["training"]["step"]
    assert 0 < kept < training.rows() < STEPS
    training.start().finish()
    assert_same_end(training, undisturbed)


def test_killed_in_the_middle_of_a_row(training, undisturbed):
    training.start().wait_for(lambda: training.rows() >= 30)
    training.kill()
    with open(training.run / "metrics.csv", "ab") as file:
        file.write(f"{training.rows() + 1},4,0.00".encode())
    training.start().finish()
    assert_same_end(training, undisturbed)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_where(training, undisturbed, signum):
    training.start().wait_for(lambda: training.rows() >= 25)
    os.kill(training.process.pid, signum)
    training.process.join(60)
    assert training.process.exitcode == 128 + signum
    step = checkpoint.read(training.run / "last.pt")["training"]["step"]
    assert 25 <= step == training.rows() < STEPS
    said = training.log.read_text()
    assert f"stopped at step {step} of {STEPS}, saved {training.run}/last.pt" in said
    assert f"fastflow train --resume {training.run}" in said and "Traceback" not in said
    training.start().finish()
    assert_same_end(training, undisturbed)


def test_a_finished_run_goes_on_with_more_steps(training, undisturbed):
    training.start("--steps", "30", "--schedule", "constant").finish()
    assert training.rows() == 30
    training.start("--steps", "50").finish()
    assert training.rows() == 50
    (training.run.parent / "straight").mkdir()
    straight = Training(training.run.parent / "straight", training.arrays)
    straight.start("--steps", "50", "--schedule", "constant").finish()
    a, b = ((t.run / "metrics.csv").read_text().splitlines() for t in (training, straight))
    assert [x.split(",")[:5] for x in a] == [
        x.split(",")[:5] for x in b
    ]  # step 30 was evaluated as the last one
    a, b = (checkpoint.read(t.run / "last.pt")["state_dict"] for t in (training, straight))
    assert_equal_trees(a, b)
