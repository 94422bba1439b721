"""A run with data-loading processes that SIGKILL ends at random moments and that is resumed at once: metrics.csv is that of an
undisturbed run, byte for byte. ``FASTFLOW_KILLS=48`` kills as often."""

import os
import random
import signal
import time

import pytest
import torch

from fastflow import checkpoint
from fastflow.trainer.progress import read_metrics
from tests.support.training import KILLED, Train, images

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL.Image")

KILLS = int(os.environ.get("FASTFLOW_KILLS", 6))
# evaluations and checkpoints out of step, and averaged weights
STEPS = "--steps 60 --eval-every 9 --save-every 7 --sample-every 25 --ema 0.9 --resume-if-present".split()


@pytest.mark.slow
def test_killed_at_random_moments(commands, tmp_path):
    data, rng = images(tmp_path / "images"), random.Random(0)

    def start(name, workers):
        return Train(commands, tmp_path / name, data, workers, more=STEPS)

    undisturbed, began = start("undisturbed", 0), time.monotonic()
    assert undisturbed.first.wait() == 0
    duration, kills, runs = time.monotonic() - began, 0, 0
    assert len(read_metrics(undisturbed.run / "metrics.csv")) == 60
    while kills < KILLS:
        name, workers = f"run {runs}", (4, 1)[runs % 2]
        run, runs = start(name, workers), runs + 1
        while kills < KILLS and commands.wait(run.first.pid, rng.uniform(0, duration)) is None:
            os.kill(run.first.pid, signal.SIGKILL)
            kills += run.first.wait() == KILLED
            run = start(name, workers)  # the same command, also before the first checkpoint
        assert run.first.wait() == 0, run.said()
        assert run.metrics() == undisturbed.metrics()
        weights = [checkpoint.read(each.run / "last.pt")["state_dict"] for each in (run, undisturbed)]
        assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in weights), strict=True))
