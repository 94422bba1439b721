"""Glow trains from its first step on: Adam without a warm-up does not explode."""

import pytest
import torch

from fastflow.models import Glow
from fastflow.nn.networks.glow_network import ZeroConv2d
from fastflow.trainer.data import Batches, load


def starts(model):
    return [net[-1].logs.mul(3).exp() for net in (step.coupling.net for f in model.flows for step in f.steps)]


@pytest.mark.parametrize(
    "options, expected",
    [({"steps": 4, "hidden": 64}, 1), ({"steps": 16, "hidden": 8}, 1), ({"steps": 16, "hidden": 64}, 1 / 8)],
)
def test_deep_models_start_with_small_outputs(options, expected):
    model = Glow((3, 8, 8), levels=1, **options)
    assert all(torch.allclose(start, torch.full_like(start, expected)) for start in starts(model))
    explicit = Glow((3, 8, 8), levels=1, **options, output_start=0.5)
    assert all(torch.allclose(start, torch.full_like(start, 0.5)) for start in starts(explicit))


def test_the_start_changes_neither_the_function_nor_a_loaded_model():
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    models = []
    for start in (1, 0.01):
        torch.manual_seed(0)
        models.append(Glow((3, 8, 8), levels=1, steps=2, hidden=8, output_start=start))
        models[-1].initialize(x, seed=0)
    assert torch.equal(*(model(x, seed=1) for model in models))
    for layer in models[0].modules():
        if isinstance(layer, ZeroConv2d):
            torch.nn.init.normal_(layer.weight)
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(*(model(x, seed=1) for model in models))


@pytest.mark.parametrize("start", [0.0, float("inf"), -1])
def test_starts_that_cannot_be(start):
    with pytest.raises(ValueError, match="output_start: got .*, expected None or a positive number"):
        Glow((3, 8, 8), levels=1, steps=1, hidden=4, output_start=start)


def worst(output_start):
    """The largest bits/dim of three steps over the first one's: Adam at 1e-3, no warm-up, no clipping."""
    torch.manual_seed(1)
    batches = Batches(load("photos"), 16, seed=0)
    model = Glow((3, 16, 16), levels=2, steps=16, hidden=64, reversible=False, output_start=output_start)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = []
    for step in range(3):
        loss = model(batches[step][0][..., 8:24, 8:24].contiguous(), seed=step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return max(found) / found[0]


def test_the_first_steps_of_adam_stay_near_the_first_loss():
    assert worst(None) < 1.5
    assert worst(1) > 2
