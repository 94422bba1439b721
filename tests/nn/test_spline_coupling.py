"""SplineCoupling and ElementwiseSpline beyond the tests of all flows."""

import re

import pytest
import torch
from torch import nn

from fastflow import nn as fnn


class Fixed(nn.Module):
    """A network whose output depends on its input through one number."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.h = nn.Parameter(torch.randn(outputs))

    def forward(self, x, context=None):
        scale = x.flatten(1).sum(1, keepdim=True).sin()
        return (scale * self.h if context is None else scale * self.h + context).to(x.dtype)


def spline_coupling(transformed, **options):
    form = {k: options[k] for k in ("bins", "tails", "convention") if k in options}
    each = fnn.SplineCoupling.params_per_element(**form)
    return fnn.SplineCoupling(Fixed(transformed * each), **options).double()


@pytest.mark.parametrize(
    "options, channels, transformed",
    [
        ({"convention": "nflows"}, 4, 2),
        ({"convention": "zuko", "tails": "circular", "bins": 1}, 5, 3),
        ({"convention": "freia", "tails": "affine", "min_bin": 0.1, "bins": 3}, 4, 2),
        ({"convention": "freia", "bins": 70}, 2, 1),
        ({"split": 1, "tails": "none"}, 3, 2),
        ({"split": 0.75, "swap_halves": True, "bins": 65}, 4, 1),
        ({"mask": torch.tensor([False, True, True])}, 3, 1),
        ({}, 1, 1),
    ],
    ids=str,
)
def test_check(options, channels, transformed):
    layer = spline_coupling(transformed, **options)
    x = torch.randn(4, channels, dtype=torch.float64)
    context = torch.randn(4, 1, dtype=torch.float64)
    layer.check(x, context)


def test_a_coupling_of_zeros_is_the_identity():
    layer = fnn.SplineCoupling(fnn.MLP(2, 2 * fnn.SplineCoupling.params_per_element(8)))
    x = 2 * torch.randn(50, 4)
    y, log_det = layer(x)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    assert log_det.abs().max() < 1e-5


def test_an_elementwise_spline_learns_a_marginal():
    torch.manual_seed(0)
    x = torch.where(torch.rand(2000, 1) < 0.5, -1.5, 1.5) + 0.3 * torch.randn(2000, 1)
    layer = fnn.ElementwiseSpline(1, bins=10)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(150):
        z, log_det = layer(x)
        loss = (0.5 * z.square().sum(1) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # of the mixture: log 2 + log(0.3 sqrt(2 pi e)), less the constant log(2 pi) / 2 that the loss leaves out
    entropy = 0.5 + torch.log(torch.tensor(2 * 0.3)).item()
    assert losses[0] > entropy + 0.5
    assert losses[-1] < entropy + 0.05


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: spline_coupling(1)(torch.zeros(2, 4).double()),
            "params: got shape [2, 23], expected [2, 46] (x is [2, 4], 23 parameters of each of 2 channels)",
        ),
        (lambda: fnn.ElementwiseSpline(4)(torch.zeros(2, 3)), "x: got shape [2, 3], expected [2, 4]"),
        (lambda: fnn.ElementwiseSpline((0, 2)), "shape: got (0, 2), expected a number of features"),
        (
            lambda: fnn.ElementwiseSpline(4, first_channel=4),
            "first_channel: got 4, expected an index of 4 channels",
        ),
        (
            lambda: fnn.ElementwiseSpline(4, first_channel=2, channels=3),
            "channels: got 3, expected a number from 1 to 2, as first_channel is 2",
        ),
        (lambda: fnn.ElementwiseSpline(4, tails="affine"), "tails: got 'affine', expected one of 'linear'"),
        (lambda: fnn.ElementwiseSpline(4, bins=0), "bins: got 0, expected a positive integer"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()
