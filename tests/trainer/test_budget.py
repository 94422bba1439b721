"""The time limit of a run: when it is estimated how many steps fit, and what follows from it."""

import math

import pytest

from fastflow.trainer import budget
from fastflow.trainer.budget import TimeBudget, steps_that_fit
from fastflow.trainer.config import Config


class Clock:
    """time.monotonic() of the budget."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    return clock


# evaluations of 0 images: only steps, and the 8 seconds at the end
OPTIONS = {"data": "x.npz", "batch_size": 10, "eval_images": 1, "samples": 0, "eval_every": 10**9}


def run(clock, time_budget, step, seconds, target_steps):
    """One step that takes ``seconds``; whether the plan changed."""
    time_budget.start_step()
    clock.now += seconds
    return time_budget.end_step(step, target_steps)


def test_how_many_steps_fit():
    config = Config(batch_size=10, eval_every=100, eval_images=50, eval_samples=1, final_samples=4, samples=0)
    # a step of 1 s is 0.05 s per image forward: 2.5 s per evaluation, 20 s for 100 images 4 times at the end, 8 s to spare
    assert steps_that_fit(config, 1000.0, 1.0, 100) == int((1000 - 28 - 2.5) / 1.025)
    assert steps_that_fit(config, 10.0, 1.0, 100) == 0


def test_the_first_step_is_not_timed(clock):
    config = Config(steps=1000, minutes=1, **OPTIONS)
    time_budget = TimeBudget(config, 0, 1000, 0.0, test_images=0, began=0.0)
    assert not run(clock, time_budget, 1, 30.0, 1000)
    # 10 seconds after the start an estimate is due: 60 - 31 - 8 seconds are left for steps of 1 second
    assert run(clock, time_budget, 2, 1.0, 1000)
    assert time_budget.target_steps == 2 + 21
    assert time_budget.elapsed() == 31.0


def test_estimates_are_due_every_50_steps_or_10_seconds(clock):
    config = Config(steps=10**6, minutes=10, **OPTIONS)
    time_budget = TimeBudget(config, 100, 10**6, 0.0, test_images=0, began=0.0)
    changes = [step for step in range(101, 221) if run(clock, time_budget, step, 0.1, 10**6)]
    assert changes == [150, 200]
    changes = [step for step in range(221, 260) if run(clock, time_budget, step, 4.0, 10**6)]
    assert (
        changes[0] == 223
    )  # 12.4 seconds after the estimate at step 200, which was 2 seconds of steps earlier


def test_small_changes_are_ignored_in_the_first_half_and_lengthening_stays_within_the_plan(clock):
    config = Config(steps=1000, minutes=20, **OPTIONS)

    def changed(step, target_steps, left):
        """Whether an estimate changes the plan with ``left`` seconds for steps of 1 second."""
        time_budget = TimeBudget(config, step - 2, target_steps, 0.0, test_images=0, began=0.0)
        run(clock, time_budget, step - 1, 0.0, target_steps)
        time_budget.start_step()
        clock.now += 1.0
        time_budget._began = clock.now - (20 * 60 - 8 - left)
        time_budget._last_estimate_at = -math.inf
        return time_budget.target_steps if time_budget.end_step(step, target_steps) else None

    assert changed(100, 800, 680) is None  # 780 of 800, in the first half
    assert changed(100, 800, 600) == 700
    assert changed(500, 800, 280) == 780  # in the second half
    assert changed(500, 800, 320) is None  # 820 of 800
    assert changed(500, 800, 400) == 900
    assert changed(500, 800, 10_000) == 1000  # not beyond the steps that were asked for
    assert changed(500, 800, -50) == 501  # the time is over: one more step, the last


def test_no_limit_and_the_default_of_the_photographs(clock):
    time_budget = TimeBudget(Config(steps=1000, **OPTIONS), 0, 1000, 0.0, test_images=0, began=0.0)
    assert time_budget.limit == math.inf
    assert not any(run(clock, time_budget, step, 1000.0, 1000) for step in range(1, 60))
    assert TimeBudget(Config(), 0, 800, 0.0, test_images=104, began=0.0).limit == pytest.approx(174)
    assert TimeBudget(Config(minutes=math.inf), 0, 800, 0.0, test_images=104, began=0.0).limit == math.inf


def test_earlier_processes_count(clock):
    config = Config(steps=1000, minutes=1, **OPTIONS)
    time_budget = TimeBudget(config, 40, 1000, 40.0, test_images=0, began=0.0)
    run(clock, time_budget, 41, 1.0, 1000)
    assert time_budget.elapsed() == 41.0
    clock.now = 11.0
    assert (
        run(clock, time_budget, 42, 1.0, 1000) and time_budget.target_steps == 43
    )  # 60 - 52 - 8 seconds are left
