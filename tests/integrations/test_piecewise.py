"""Linear and quadratic splines of nflows, accelerated in place: the same numbers, without masks."""

import importlib

import pytest
import torch

from benchmarks.models.drop_in import Operators
from tests.support.libraries import assert_same, randomized

transforms = pytest.importorskip("nflows.transforms")
ff = importlib.import_module("fastflow.integrations.nflows")

TAILS = {"tails": "linear", "tail_bound": 1.5, "num_bins": 4}
LAYERS = {
    "PiecewiseLinearCDF": lambda **tails: transforms.PiecewiseLinearCDF([3, 2], **tails),
    "PiecewiseQuadraticCDF": lambda **tails: transforms.PiecewiseQuadraticCDF([3, 2], **tails),
    "MaskedPiecewiseQuadraticAutoregressiveTransform": lambda **tails: (
        transforms.MaskedPiecewiseQuadraticAutoregressiveTransform(3, 8, num_blocks=1, **tails)
    ),
}


def sampled(m, x, c):
    with torch.no_grad():
        return m.inverse(x)


CALLS = {
    "forward": lambda m, x, c: m(x),
    "inverse": lambda m, x, c: m.inverse(x),
    "inverse without gradients": sampled,
}


def inputs(name):
    x = torch.randn(30, 3) if "Masked" in name else torch.randn(30, 3, 2)
    x[0], x[1], x[2] = 1.5, -1.5, 9.0  # at the ends, and a sample outside
    return x


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    report = assert_same(ff, randomized(LAYERS[name](**TAILS)), CALLS, inputs(name))
    assert report.replaced[""] == name
    model = LAYERS[name](num_bins=4)
    assert ff.accelerate(model).left_alone[""] == (name, "tails=None")


@pytest.mark.parametrize("name", LAYERS)
def test_no_element_is_selected_by_a_mask(name):
    model = randomized(LAYERS[name](**TAILS))
    counts = []
    for _ in range(2):
        with torch.no_grad(), Operators() as operators:
            model(inputs(name)), model.inverse(inputs(name))
        counts.append(operators.synchronizing)
        ff.accelerate(model)
    # the library compares the smallest and the largest value with the ends, and assigns the last bin by a mask
    assert counts[1] <= counts[0] / 4


@pytest.mark.parametrize("name", LAYERS)
def test_no_sample_and_values_that_are_no_numbers(name):
    models = [randomized(LAYERS[name](**TAILS)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ff.accelerate(models[1])
    x = inputs(name)
    x[4:6] = torch.tensor([torch.nan, torch.inf]).view(2, *[1] * (x.ndim - 1))
    for call in (CALLS["forward"], sampled):
        assert call(models[1], x[:0], None)[0].shape == x[:0].shape
        found, wanted = (call(m, x, None) for m in models)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
