"""Standardize: the statistics of fit, state that nothing else moves, and errors; FLOWS has the properties of a flow."""

import re

import pytest
import torch

from fastflow import nn as fnn

F64 = torch.float64


@pytest.mark.parametrize("shape", [(50, 3), (50, 3, 2, 4)])
def test_fit_sets_mean_and_deviation(shape):
    x = 5 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64).mul(3)
    layer = fnn.Standardize(3).double()
    layer.fit(x)
    y, log_det = layer(x)
    var, mean = torch.var_mean(y.movedim(1, 0).flatten(1), 1, correction=0)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, torch.ones(3, dtype=F64), rtol=0, atol=1e-12)
    positions = x[0, 0].numel()
    torch.testing.assert_close(log_det, -positions * layer.scale.log().sum().expand(50))
    assert sorted(layer.state_dict()) == ["mean", "scale"] and not list(layer.parameters())


def test_only_fit_changes_the_state():
    layer, x = fnn.Standardize(2).train(), 7 + torch.randn(5, 2)
    for call in (layer, layer.initialize, fnn.Sequential(layer).initialize):
        call(x)
    assert torch.equal(layer(x)[0], x) and layer.mean.tolist() == [0, 0] and layer.scale.tolist() == [1, 1]


def test_large_means_keep_their_deviations():
    """In float64 statistics: float32 sums of squares would lose a deviation of 1e-5 of the mean."""
    x = torch.tensor([[1e5], [1e5 + 1], [1e5 + 2]])
    layer = fnn.Standardize(1)
    layer.fit(x)
    torch.testing.assert_close(layer(x)[0].flatten(), torch.tensor([-(1.5**0.5), 0, 1.5**0.5]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[1.0, 2, 3], [1.0, 2.5, 3]]), "x: got constant features 0, 2, expected features that vary"),
        (torch.full((100, 3), 0.1) * torch.tensor([1, 1, 1 + 1e-8]), "x: got constant features 0, 1, 2, expected"),
        (torch.stack([torch.zeros(4), torch.arange(4.0), torch.arange(4.0)], 1), "x: got constant feature 0, expected"),
        (torch.ones(1, 3), "x: got constant features 0, 1, 2, expected"),
        (torch.ones(0, 3), "x: got shape [0, 3], expected one or more samples"),
        (torch.ones(4, 2), "x: got shape [4, 2], expected [N, 3, ...]"),
        (torch.full((4, 3), torch.inf), "x: got inf or NaN, expected finite numbers"),
        (torch.ones(4, 3, dtype=torch.int64), "x: got dtype torch.int64"),
    ],
)  # fmt: skip
def test_errors_leave_the_layer_as_it_was(x, message):
    layer = fnn.Standardize(3)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.fit(x)
    assert layer.mean.tolist() == [0, 0, 0] and layer.scale.tolist() == [1, 1, 1]
