"""LULinear: its formula, its start, precision, and errors; FLOWS has the properties of a flow."""

import re

import pytest
import torch
import torch.nn.functional as F

from fastflow import nn as fnn
from tests.support.cases import randomize

F64 = torch.float64


@pytest.mark.parametrize("features", [1, 2, 5, 32])
def test_the_formula(features):
    layer = randomize(fnn.LULinear(features, eps=0.01), std=0.2).double()
    x = torch.randn(7, features, dtype=F64)
    lower = layer.factors.tril(-1) + torch.eye(features)
    diagonal = F.softplus(layer.factors.diagonal()) + 0.01
    upper = layer.factors.triu(1) + torch.diag(diagonal)
    y, log_det = layer(x)
    torch.testing.assert_close(y, (lower @ (upper @ x.mT)).mT + layer.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, diagonal.log().sum().expand(7), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight(), lower @ upper, rtol=1e-12, atol=1e-12)
    back, log_det_back = layer.inverse(y)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    assert back.is_contiguous()
    assert torch.equal(log_det_back, -log_det)
    layer.check(x)


@pytest.mark.parametrize("permutation", ["reverse", "random", "interleaved", (2, 0, 3, 1)])
def test_a_permutation_is_a_layer_before_it(permutation):
    """Alone, and where the matrices of a chain are computed at once; parameters and buffers are those of any layer."""
    layers = [
        randomize(fnn.LULinear(4, permutation=permutation, identity_init=False)).double() for _ in range(2)
    ]
    pairs = []
    for layer in layers:
        plain = fnn.LULinear(4).double()
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "perm"})
        pairs += [fnn.Permute(4, layer.perm.tolist()), plain]
    x, expected = torch.randn(6, 4, dtype=F64), fnn.Sequential(*pairs)
    torch.testing.assert_close(layers[0](x), fnn.Sequential(*pairs[:2])(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layers[0].inverse(layers[0](x)[0])[0], x, rtol=1e-12, atol=1e-12)
    for reversible in (False, True):
        chain = fnn.Sequential(*layers, reversible=reversible)
        torch.testing.assert_close(chain(x), expected(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(chain.inverse(x), expected.inverse(x), rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(f(x)[0].sin().sum(), f.parameters()) for f in (chain, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
        chain.check(x)


@pytest.mark.parametrize("eps", [0, 1e-3, 0.9])
def test_it_starts_as_the_identity(eps):
    x = torch.randn(5, 3)
    y, log_det = fnn.LULinear(3, eps=eps)(x)
    torch.testing.assert_close((y, log_det), (x, torch.zeros(5)), rtol=1e-6, atol=1e-6)


def test_a_random_start_keeps_volumes():
    torch.manual_seed(0)
    layer = fnn.LULinear(6, identity_init=False)
    torch.testing.assert_close(layer(torch.randn(2, 6))[1], torch.zeros(2), rtol=0, atol=1e-6)
    off = layer.factors[~torch.eye(6, dtype=torch.bool)]
    assert 0.1 < off.abs().mean() < 6**-0.5 and off.abs().max() <= 6**-0.5


def test_the_diagonal_is_bounded_from_below():
    layer = fnn.LULinear(3)
    with torch.no_grad():
        layer.factors.diagonal().fill_(-200)
    x = torch.randn(4, 3)
    y, log_det = layer(x)
    torch.testing.assert_close(log_det, torch.full((4,), 3e-3).log() * 3 - 3 * torch.tensor(3.0).log())
    torch.testing.assert_close(layer.inverse(y)[0], x)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_products_are_float32(half):
    """Of half vectors, of half parameters, and under autocast."""
    layer, x = randomize(fnn.LULinear(4)), torch.randn(64, 4)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = layer(x)
        torch.testing.assert_close((y, log_det), expected, rtol=0, atol=0)
        torch.testing.assert_close(layer.inverse(y)[0], x, rtol=1e-5, atol=1e-5)
        chain = fnn.Sequential(layer, fnn.Permute(4))
        (gradient,) = torch.autograd.grad(chain(x)[0].square().sum(), layer.bias)
    torch.testing.assert_close(gradient, 2 * y.sum(0), rtol=1e-5, atol=1e-4)
    x = x.to(half)
    exact = layer(x.float())
    y, log_det = layer(x)
    torch.testing.assert_close((y, log_det), (exact[0].to(half), exact[1]), rtol=0, atol=0)
    assert layer.inverse(y)[0].dtype == half
    layer = layer.to(half)
    exact = layer.float()(x.float())
    y, log_det = layer.to(half)(x)
    assert log_det.dtype == torch.float32
    torch.testing.assert_close((y, log_det), (exact[0].to(half), exact[1]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 4), "x: got shape [5, 4], expected [N, 3]"),
        (torch.zeros(5, 3, 2, 2), "x: got shape [5, 3, 2, 2], expected [N, 3]"),
        (torch.zeros(3), "x: got shape [3], expected [N, 3]"),
        (torch.zeros(5, 3, dtype=F64), "x: got dtype torch.float64, expected torch.float32"),
        (torch.zeros(5, 3, dtype=torch.int64), "x: got dtype torch.int64"),
    ],
)
def test_errors(x, message):
    for direction in (fnn.LULinear(3), fnn.LULinear(3).inverse):
        with pytest.raises(ValueError, match=re.escape(message)):
            direction(x)


@pytest.mark.parametrize("eps", [-0.1, 1, 2.5])
def test_eps_is_below_one(eps):
    with pytest.raises(ValueError, match="eps: got .*, expected a number from 0 to below 1"):
        fnn.LULinear(3, eps=eps)


@pytest.mark.parametrize("permutation", ["sorted", (0, 1), (0, 1, 1), 3])
def test_a_permutation_has_every_feature_once(permutation):
    with pytest.raises(ValueError, match=re.escape("permutation: got ")):
        fnn.LULinear(3, permutation=list(permutation) if isinstance(permutation, tuple) else permutation)
