"""Training steps in half precision: float16 with torch.amp.GradScaler, bfloat16 without."""

import copy

import pytest
import torch

from fastflow.models import Glow
from tests.support.cases import randomize


@pytest.fixture(params=["affine", "mixture", "spline"])
def glow(request):
    model = Glow((3, 8, 8), levels=2, steps=2, hidden=4, coupling=request.param)
    model.initialize(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), seed=0)
    # with noise of 0.05, the loss is so steep that scaled gradients overflow, or that one unit which rounding moves
    # over the kink of its ReLU changes the step: of 24 seeds, some were off by more than the tolerances
    return randomize(model, std=0.01)


X = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def step(model, dtype, reversible, scale=2.0**10):
    """One step of SGD; the scaler, or None if none is needed."""
    for flow in model.flows:
        flow.reversible = reversible
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(X, seed=1).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str)
def test_a_step_is_that_of_float32(glow, dtype, tolerance, reversible):
    """The update differs from float32's by rounding of the networks only: relative to its 2-norm."""
    exact, before = copy.deepcopy(glow), [p.detach().clone() for p in glow.parameters()]
    step(exact, None, reversible)
    step(glow, dtype, reversible)
    updates = [
        torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
        for model in (glow, exact)
    ]
    assert 0 < (updates[0] - updates[1]).norm() <= tolerance * updates[1].norm()


@pytest.mark.parametrize("reversible", [False, True])
def test_gradients_that_overflow_float16_skip_the_step(glow, reversible):
    before = copy.deepcopy(glow.state_dict())
    scaler = step(glow, torch.float16, reversible, scale=2.0**100)
    torch.testing.assert_close(glow.state_dict(), before, rtol=0, atol=0)
    assert scaler.get_scale() == 2.0**99
