"""After a collapse a run stops, or goes back to its best weights with a lower learning rate."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow import checkpoint
from fastflow.trainer import run as run_module
from fastflow.trainer import train
from fastflow.trainer.config import Config, ConfigError, validate_config
from fastflow.trainer.nonfinite import NonFiniteError
from fastflow.trainer.progress import read_metrics
from fastflow.trainer.step import Step

pytest.importorskip("matplotlib")
pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    x = np.random.default_rng(0).integers(0, 64, (20, 8, 8, 3)).astype(np.uint8)
    np.savez(path, x=x)
    return Config(
        data=str(path),
        levels=1,
        steps_per_level=1,
        hidden=4,
        batch_size=4,
        steps=7,
        warmup=0,
        lr=1e-3,
        schedule="constant",
        final_samples=1,
        samples=1,
        eval_every=3,
        save_every=2,
        ema=0.5,
        reversible="no",
        on_divergence="rollback",
    )


class Broken(Step):
    """A step that makes the weights useless at the given calls.

    It notes each call's weights, Adam's averages, learning rate, and the addresses that a CUDA graph would use.
    """

    at: dict = {}

    def __call__(self, x, labels, seed, lr, votes=(0.0, 0.0)):
        number = Broken.calls = Broken.calls + 1
        weights = [p.detach() for p in self.parameters]
        averages = [s["exp_avg"] for s in self.optimizer.state.values() if s]
        addresses = [t.data_ptr() for t in (*weights, *averages)]
        Broken.seen.append(([p.clone() for p in weights], [a.clone() for a in averages], lr, addresses))
        if number in self.at:
            with torch.no_grad():
                dict(self.model.named_parameters())[self.at[number][0]].fill_(self.at[number][1])
        return super().__call__(x, labels, seed, lr, votes)


@pytest.fixture
def broken(monkeypatch):
    """Sets the calls that are broken: the name of a parameter and its value."""

    def breaks(at):
        monkeypatch.setattr(Broken, "at", at)
        Broken.calls, Broken.seen = 0, []
        monkeypatch.setattr(run_module, "Step", Broken)

    return breaks


NOT_FINITE = ("flows.0.steps.0.actnorm.bias", math.nan)
JUMP = ("flows.0.steps.0.actnorm.bias", 30.0)
SINGULAR = ("flows.0.steps.0.conv1x1.log_s", math.nan)


@pytest.mark.parametrize(
    "at, reason",
    [
        (NOT_FINITE, "not finite: "),
        (JUMP, "; the lowest running mean is "),
        (SINGULAR, "lu_weight: diagonal of matrix"),
    ],
)
def test_a_collapse_goes_back_to_the_best_weights(at, reason, config, broken, tmp_path, capsys):
    broken({6: at})
    run, _ = train.train(replace(config, out=str(tmp_path / "run")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "back to step" in line]
    assert len(lines) == 1 and reason in lines[0]
    assert re.match(
        r"step 6: .*; back to step 3 of best.pt, learning rate times 0.5, rollback 1 of 3", lines[0]
    )
    # the 4th step began from the weights and averages of step 3, and the 7th does
    for before, after in zip(Broken.seen[3][:2], Broken.seen[6][:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(m.any() for m in Broken.seen[6][1])
    assert Broken.seen[6][3] == Broken.seen[5][3]
    rows = read_metrics(run / "metrics.csv")
    assert [row["back_to_step"] for row in rows] == [None] * 5 + [3, None]
    assert [row["lr"] for row in rows] == [1e-3] * 6 + [5e-4] == [rate for _, _, rate, _ in Broken.seen]
    assert json.loads((run / "result.json").read_text())["rollbacks"] == [6]
    assert math.isfinite(rows[6]["train_bits_per_dim"])


def test_before_the_first_evaluation_it_goes_back_to_the_last_checkpoint(config, broken, tmp_path, capsys):
    broken({1: NOT_FINITE, 2: NOT_FINITE})
    train.train(replace(config, out=str(tmp_path / "run"), steps=3))
    said = capsys.readouterr().out
    assert "step 1: " in said and said.count("; back to step 0 of last.pt") == 2
    assert "step 2: " in said and "learning rate times 0.25, rollback 2 of 3" in said
    for weights, averages, *_ in Broken.seen[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(Broken.seen[0][0], weights, strict=True))
        assert not any(m.any() for m in averages)


def test_the_run_stops_after_the_last_rollback(config, broken, tmp_path):
    broken({4: NOT_FINITE, 5: JUMP, 6: JUMP})
    with pytest.raises(
        NonFiniteError,
        match="step 6: .* above .*; the lowest running mean .*; the last good checkpoint is .*last.pt",
    ):
        train.train(replace(config, out=str(tmp_path / "run"), rollbacks=2))
    assert checkpoint.read(tmp_path / "run" / "last.pt")["training"]["rollbacks"] == [4]


@pytest.mark.parametrize("at", [NOT_FINITE, JUMP])
def test_by_default_only_what_is_not_finite_stops(at, config, broken, tmp_path):
    broken({2: at})
    stop = replace(config, out=str(tmp_path / "run"), on_divergence="stop", steps=3)
    if at is JUMP:
        run, _ = train.train(stop)
        assert max(row["train_bits_per_dim"] for row in read_metrics(run / "metrics.csv")) > 20
        return
    with pytest.raises(NonFiniteError, match="step 2: "):
        train.train(stop)


def test_a_resumed_run_continues_schedule_and_rollbacks(config, broken, tmp_path):
    exponential = replace(config, schedule="exponential", gamma=0.5, steps=9)
    metrics = []
    for name, parts in (("whole", [9]), ("parts", [6, 9])):
        broken({5: NOT_FINITE})
        run = str(tmp_path / name)
        train.train(replace(exponential, out=run, steps=parts[0]))
        for steps in parts[1:]:
            Broken.at = {}
            train.train(replace(run_module.resumed_config(run), steps=steps))
        metrics.append((Path(run) / "metrics.csv").read_text().splitlines())
    whole, parts = metrics
    assert whole[:6] == parts[:6] and whole[7:] == parts[7:]  # the 6th step ends a run, so it is evaluated
    rates = [float(line.split(",")[2]) for line in whole[1:]]
    assert rates == pytest.approx([1e-3 * 0.5 ** (step * 4 // 18) * 0.5 ** (step > 4) for step in range(9)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"divergence_factor": 1.0}, "divergence_factor: got 1.0, expected a number above 1"),
        ({"rollbacks": 0}, "rollbacks: got 0, expected at least 1"),
        ({"rollback_lr": 1.0}, "rollback_lr: got 1.0, expected a factor between 0 and 1"),
        ({"on_divergence": "ignore"}, "on_divergence: got 'ignore', expected one of stop, rollback"),
    ],
)
def test_rollbacks_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate_config(Config(**options))
