"""Triangular, orthogonal and QR linear maps: their matrices, precision, and errors; FLOWS has the properties of a flow."""

import re

import pytest
import torch
import torch.nn.functional as F

from fastflow import nn as fnn
from fastflow.validation import SingularError
from tests.support.cases import randomize

F64 = torch.float64
KINDS = ("householder", "cayley", "exponential")
LAYERS = {
    "triangular": lambda c: fnn.TriangularLinear(c),
    "triangular, upper": lambda c: fnn.TriangularLinear(c, upper=True),
    **{kind: lambda c, kind=kind: fnn.OrthogonalLinear(c, kind) for kind in KINDS},
    "one reflection": lambda c: fnn.OrthogonalLinear(c, reflections=1),
    "QR": lambda c: fnn.QRLinear(c),
    "QR, two reflections": lambda c: fnn.QRLinear(c, 2),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def reflection(v):
    return torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v) / (v @ v)


def eye(c):
    return torch.eye(c, dtype=F64)


@every_layer
@pytest.mark.parametrize("features", [1, 2, 5, 33])
def test_both_directions_are_products_with_the_matrix(make, features):
    """Of vectors and of images, in both memory formats; inverse within 1e-10 where the condition number allows it."""
    layer = randomize(make(features), std=0.1).double()
    weight = layer.weight()
    log_det = torch.linalg.slogdet(weight).logabsdet
    x = torch.randn(3, features, 2, 3, dtype=F64)
    for given in (x[:, :, 0, 0], x[..., 0], x, x.contiguous(memory_format=torch.channels_last)):
        y, found = layer(given)
        bias = layer.bias.view(-1, *[1] * (given.ndim - 2))
        expected = torch.einsum("ij,nj...->ni...", weight, given) + bias
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        positions = given[0, 0].numel()
        torch.testing.assert_close(found, (positions * log_det).expand(3), rtol=1e-9, atol=1e-9)
        back, found_back = layer.inverse(y)
        torch.testing.assert_close(back, given, rtol=0, atol=1e-10)
        assert torch.equal(found_back, -found)
    layer.check(x[:, :, :1, :1])


@pytest.mark.parametrize(("features", "reflections"), [(1, 1), (4, 1), (4, 4), (4, 7), (33, 20), (70, 70)])
def test_the_product_of_reflections(features, reflections):
    layer = fnn.OrthogonalLinear(features, reflections=reflections).double()
    product = eye(features)
    for v in layer.vectors:
        product = product @ reflection(v)
    torch.testing.assert_close(layer.weight(), product, rtol=0, atol=1e-12)
    assert torch.linalg.det(layer.weight()).round() == (-1) ** reflections


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("std", [0.01, 1.0, 30.0])
def test_the_matrix_is_orthogonal(kind, std):
    """Also of large parameters, and of the float32 ones to the rounding of float32."""
    layer = fnn.OrthogonalLinear(12, kind)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=std)
    for dtype, atol in ((torch.float32, 3e-5), (F64, 3e-13)):
        weight = layer.to(dtype).weight()
        torch.testing.assert_close(weight @ weight.mT, torch.eye(12, dtype=dtype), rtol=0, atol=atol)
    assert kind == "householder" or torch.linalg.det(weight).round() == 1


@pytest.mark.parametrize("kind", ["cayley", "exponential"])
def test_rotations_of_the_plane(kind):
    """By the entry a above the diagonal: by the angle -a of the exponential, and by 2 atan(a) of Cayley's."""
    layer, a = fnn.OrthogonalLinear(2, kind).double(), torch.tensor(0.75, dtype=F64)
    with torch.no_grad():
        layer.entries.copy_(torch.tensor([[5.0, 0.75], [6.0, 7.0]]))  # three entries are not read
    angle = -a if kind == "exponential" else 2 * a.atan()
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    torch.testing.assert_close(layer.weight(), expected, rtol=0, atol=1e-14)


def test_the_triangular_matrix():
    lower, upper = fnn.TriangularLinear(5, eps=0.01), fnn.TriangularLinear(5, upper=True, eps=0.01)
    for layer, part in ((lower, torch.tril), (upper, torch.triu)):
        torch.testing.assert_close(layer.weight(), torch.eye(5))
        randomize(layer, std=0.2).double()
        diagonal = F.softplus(layer.factors.diagonal()) + 0.01
        expected = layer.factors - torch.diag(layer.factors.diagonal()) + torch.diag(diagonal)
        torch.testing.assert_close(layer.weight(), part(expected), rtol=0, atol=1e-14)


def test_qr_is_a_product():
    layer = randomize(fnn.QRLinear(5, 3), std=0.2).double()
    orthogonal = fnn.OrthogonalLinear(5, reflections=3).double()
    upper = fnn.TriangularLinear(5, upper=True).double()
    orthogonal.load_state_dict({"vectors": layer.vectors, "bias": layer.bias})
    upper.load_state_dict({"factors": layer.factors, "bias": 0 * layer.bias})
    x = torch.randn(4, 5, dtype=F64)
    torch.testing.assert_close(layer(x), fnn.Sequential(upper, orthogonal)(x), rtol=1e-12, atol=1e-12)


def test_nflows_with_equal_weights():
    """Its reflections are in the opposite order; the diagonal of its R is e^u."""
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(0)
    other = randomize(transforms.QRLinear(6, 4), std=0.3).double()
    layer = fnn.QRLinear(6, 4, eps=0).double()
    with torch.no_grad():
        layer.vectors.copy_(other.orthogonal.q_vectors.flip(0))
        layer.factors.copy_(other._create_upper())
        layer.factors.diagonal().copy_(other.log_upper_diag.exp().expm1().log())
        layer.bias.copy_(other.bias)
    x = torch.randn(9, 6, dtype=F64)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.inverse(x), other.inverse(x), rtol=1e-12, atol=1e-12)
    reflections = fnn.OrthogonalLinear(6, reflections=4).double()
    reflections.load_state_dict({"vectors": layer.vectors, "bias": 0 * layer.bias})
    torch.testing.assert_close(reflections(x), other.orthogonal(x), rtol=1e-12, atol=1e-12)


@every_layer
def test_gradcheck(make):
    layer, x = randomize(make(3), std=0.1).double(), torch.randn(2, 3, 2, dtype=F64, requires_grad=True)
    for direction in (layer, layer.inverse):
        assert torch.autograd.gradcheck(lambda x, *_, f=direction: f(x), (x, *layer.parameters()))
        assert torch.autograd.gradgradcheck(lambda x, *_, f=direction: f(x), (x, *layer.parameters()))


@every_layer
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(make, half):
    """Matrices of half parameters and under autocast are computed in float32."""
    layer, x = randomize(make(4), std=0.1), torch.randn(16, 4)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        assert layer.weight().dtype == torch.float32
        torch.testing.assert_close(layer.inverse(expected[0])[0], x, rtol=1e-5, atol=1e-5)
    layer = layer.to(half)
    y, log_det = layer(x.to(half))
    assert y.dtype == half and log_det.dtype == layer.weight().dtype == torch.float32
    exact = layer.float()(x.to(half).float())
    torch.testing.assert_close(y, exact[0].to(half), rtol=0, atol=0)
    torch.testing.assert_close(log_det, exact[1], rtol=1e-5, atol=1e-5)
    assert layer.to(half).inverse(y)[0].dtype == half


@every_layer
def test_empty_batches(make):
    layer = make(4)
    for shape in ((0, 4), (0, 4, 2, 2), (2, 4, 0)):
        y, log_det = layer(torch.zeros(shape))
        assert y.shape == shape and log_det.shape == shape[:1]
        assert layer.inverse(y)[0].shape == shape


@every_layer
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 4), "got shape [5, 4], expected [N, 3, ...]"),
        (torch.zeros(3), "got shape [3], expected a batch [N, C, ...]"),
        (torch.zeros(5, 3, dtype=F64), "got dtype torch.float64, expected torch.float32"),
        (torch.zeros(5, 3, dtype=torch.int64), "got dtype torch.int64, expected a floating point tensor"),
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
        (lambda: fnn.TriangularLinear(0), "num_features: got 0, expected a positive integer"),
        (lambda: fnn.TriangularLinear(3, eps=1), "eps: got 1, expected a number from 0 to below 1"),
        (lambda: fnn.OrthogonalLinear(3, "euler"), "kind: got 'euler', expected one of 'householder', "),
        (lambda: fnn.OrthogonalLinear(3, reflections=0), "reflections: got 0, expected a positive integer"),
        (
            lambda: fnn.OrthogonalLinear(3, "cayley", 2),
            "reflections: got 2, expected None with kind='cayley'",
        ),
    ],
)
def test_errors_of_constructors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("make", [fnn.OrthogonalLinear, fnn.QRLinear])
def test_a_vector_of_zeros_is_no_reflection(make):
    layer = make(3)
    with torch.no_grad():
        layer.vectors[1] = 0
    with pytest.raises(SingularError, match=r"got 0 at index 1"):
        layer(torch.zeros(2, 3))
