"""Periodic and emerging convolutions: formulas, matrices, inverses, precision, and errors; FLOWS has the rest."""

import re

import pytest
import torch
import torch.nn.functional as F

from fastflow import nn as fnn
from fastflow.validation import SingularError
from tests.support.cases import jacobian_log_det, randomize

F64 = torch.float64
LAYERS = {
    f"{name}, {k}": lambda c, layer=layer, k=k: layer(c, k)
    for name, layer in (("periodic", fnn.PeriodicConv), ("emerging", fnn.EmergingConv))
    for k in (1, 3, 5)
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def trained(make, channels, std=0.05):
    torch.manual_seed(0)
    return randomize(make(channels), std=std).double()


@every_layer
@pytest.mark.parametrize("size", [(5, 5), (3, 7), (6, 2), (8, 3)])
def test_both_directions(make, size):
    layer, x = trained(make, 3), torch.randn(2, 3, *size, dtype=F64)
    y, log_det = layer(x)
    expected = jacobian_log_det(lambda v: layer(v)[0], x)
    torch.testing.assert_close(log_det, expected, rtol=1e-9, atol=1e-9)
    back, log_det_back = layer.inverse(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    assert torch.equal(log_det_back, -log_det)
    lying = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(lying), (y, log_det), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.inverse(lying), layer.inverse(x), rtol=0, atol=1e-10)


def test_the_formula_of_the_periodic_convolution():
    layer, x = trained(lambda c: fnn.PeriodicConv(c, 5), 3), torch.randn(2, 3, 4, 6, dtype=F64)
    y = torch.zeros_like(x)
    for i in range(4):
        for j in range(6):
            for a in range(5):
                for c in range(5):
                    pixel = x[:, :, (i + a - 2) % 4, (j + c - 2) % 6]
                    y[:, :, i, j] += pixel @ layer.weight[:, :, a, c].mT
    torch.testing.assert_close(layer(x)[0], y + layer.bias.view(-1, 1, 1), rtol=0, atol=1e-13)
    shifted = layer(x.roll((1, 3), (2, 3)))
    torch.testing.assert_close(shifted, (layer(x)[0].roll((1, 3), (2, 3)), layer(x)[1]), rtol=0, atol=1e-13)


def test_the_formula_of_the_emerging_convolution():
    layer, x = trained(lambda c: fnn.EmergingConv(c, 3, eps=0.01), 3), torch.randn(2, 3, 4, 6, dtype=F64)
    diagonals = [F.softplus(k[:, :, 0, 0].diagonal()) + 0.01 for k in layer.kernels]
    own = [
        layer.kernels[0, :, :, 0, 0].tril(-1) + torch.diag(diagonals[0]),
        layer.kernels[1, :, :, 0, 0].triu(1) + torch.diag(diagonals[1]),
    ]
    y = x
    for kernel, middle, sign in zip(layer.kernels, own, (-1, 1), strict=True):
        found = torch.zeros_like(x)
        for i in range(4):
            for j in range(6):
                for a in range(2):
                    for c in range(2):
                        at = i + sign * a, j + sign * c
                        if 0 <= at[0] < 4 and 0 <= at[1] < 6:
                            tap = middle if (a, c) == (0, 0) else kernel[:, :, a, c]
                            found[:, :, i, j] += y[:, :, at[0], at[1]] @ tap.mT
        y = found
    found, log_det = layer(x)
    torch.testing.assert_close(found, y + layer.bias.view(-1, 1, 1), rtol=0, atol=1e-13)
    expected = 24 * sum(d.log().sum() for d in diagonals)
    torch.testing.assert_close(log_det, expected.expand(2), rtol=0, atol=1e-12)


def test_the_receptive_field_is_that_of_a_convolution():
    layer, x = trained(lambda c: fnn.EmergingConv(c, 5), 2), torch.randn(1, 2, 11, 11, dtype=F64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0][0, :, 5, 5].sum(), x)
    seen = gradient[0].abs().sum(0) > 0
    assert seen[3:8, 3:8].all() and seen.sum() == 25


def test_starts():
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(fnn.EmergingConv(4)(x), (x, torch.zeros(2)), rtol=1e-5, atol=1e-4)
    layer = fnn.PeriodicConv(4)
    y, log_det = layer(x)
    torch.testing.assert_close(y.square().sum(1), x.square().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det, torch.zeros(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in LAYERS if "5" not in name])
def test_gradcheck(name):
    layer, x = trained(LAYERS[name], 2), torch.randn(1, 2, 2, 3, dtype=F64, requires_grad=True)
    for direction in (layer, layer.inverse):
        given = (x, *layer.parameters())
        assert torch.autograd.gradcheck(lambda x, *_, f=direction: f(x), given)
        assert torch.autograd.gradgradcheck(lambda x, *_, f=direction: f(x), given)


@every_layer
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(make, half):
    layer, x = trained(make, 4).float(), torch.randn(2, 4, 5, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(layer.inverse(expected[0])[0], x, rtol=1e-4, atol=1e-4)
    layer = layer.to(half)
    y, log_det = layer(x.to(half))
    assert y.dtype == layer.inverse(y)[0].dtype == half and log_det.dtype == torch.float32
    exact = layer.float()(x.to(half).float())
    torch.testing.assert_close(y, exact[0].to(half), rtol=0, atol=0)
    torch.testing.assert_close(log_det, exact[1], rtol=1e-5, atol=1e-5)


@every_layer
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 4, 6, 6), "got shape [5, 4, 6, 6], expected [N, 3, ...]"),
        (torch.zeros(5, 3), "got shape [5, 3], expected images [N, 3, H, W]"),
        (torch.zeros(5, 3, 6, 6, dtype=F64), "got dtype torch.float64, expected torch.float32"),
        (torch.zeros(5, 3, 6, 6, dtype=torch.int64), "got dtype torch.int64"),
    ],
)
def test_errors_of_x(make, x, message):
    layer = make(3)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=re.escape(message)):
            direction(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.PeriodicConv(0), "num_features: got 0, expected a positive integer"),
        (lambda: fnn.PeriodicConv(2, 4), "kernel_size: got 4, expected an odd number"),
        (lambda: fnn.EmergingConv(2, 2), "kernel_size: got 2, expected an odd number"),
        (lambda: fnn.EmergingConv(2, eps=1.0), "eps: got 1.0, expected a number from 0 to below 1"),
        (
            lambda: fnn.PeriodicConv(2, 7)(torch.zeros(1, 2, 2, 9)),
            "x: got shape [1, 2, 2, 9], expected images of at least 3 pixels each way, half the kernel",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_singular_layers():
    periodic, emerging = fnn.PeriodicConv(2), fnn.EmergingConv(2, eps=0)
    with torch.no_grad():
        periodic.weight.zero_()
        emerging.kernels[0, 1, 1, 0, 0] = -500.0  # softplus of it is 0
    with pytest.raises(torch.linalg.LinAlgError):
        periodic.inverse(torch.ones(1, 2, 4, 4))
    with pytest.raises(SingularError, match="got 0 at index 1"):
        emerging.inverse(torch.ones(1, 2, 4, 4))
