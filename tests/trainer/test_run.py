"""The state of a run, and its averaged weights."""

from types import SimpleNamespace

import pytest
import torch

from fastflow.trainer.run import Run, RunState


def test_the_best_result_is_kept():
    state = RunState(step=0, target_steps=3)
    assert [state.improve(bits) for bits in (4.0, 5.0, 3.5)] == [True, False, True]
    assert state.best == 3.5
    assert not state.improve(3.75) and state.best == 3.5


@pytest.mark.parametrize("step, decay", [(1, 2 / 11), (1000, 0.9)])
def test_averages_forget_the_first_weights_soon(step, decay):
    average, weight = torch.ones(2), torch.zeros(2)
    run = SimpleNamespace(
        config=SimpleNamespace(ema=0.9),
        state=RunState(step, target_steps=2000),
        _averages=[average],
        _weights=[weight],
        _statistics=[],
    )
    Run.average_weights(run)
    torch.testing.assert_close(average, torch.full((2,), decay))
