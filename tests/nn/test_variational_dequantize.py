"""Variational dequantization: its noise's density by autograd's Jacobian and by integration, exact coding, gradients of both kinds."""

import copy
import math

import pytest
import torch
from torch import nn

from fastflow.nn import AffineCoupling, Flow, GatedNetwork, LogitDequantize, Sequential, VariationalDequantize
from tests.support.cases import jacobian_log_det, randomize
from tests.support.gradients import outputs_and_gradients

F64 = torch.float64


def layer(n_bits=8, reversible=True, alpha=1e-5, channels=1):
    couplings = [
        AffineCoupling(
            GatedNetwork(2 * channels, 2 * channels, hidden=4, blocks=1),
            mask="checkerboard",
            swap_halves=flip,
            affine_order="shift_first",
        )
        for flip in (False, True)
    ]
    return VariationalDequantize(Sequential(*couplings, reversible=reversible), n_bits, alpha)


def trained(**kwargs):
    return randomize(layer(**kwargs), std=0.3).double()


def images(n_bits=8, n=3, channels=1):
    return torch.randint(0, 2**n_bits, (n, channels, 2, 4), dtype=torch.uint8)


@pytest.mark.parametrize("n_bits, channels", [(8, 1), (5, 3), (1, 1)])
def test_log_det_is_the_jacobian_s(n_bits, channels):
    dequantize, x = trained(n_bits=n_bits, channels=channels), images(n_bits, channels=channels)
    noise = torch.rand(x.shape, dtype=F64)
    u, log_det = dequantize.noise(x, noise)
    assert u.min() > 0 and u.max() < 1
    torch.testing.assert_close(
        log_det, jacobian_log_det(lambda e: dequantize.noise(x, e)[0], noise), rtol=1e-9, atol=1e-9
    )
    y, whole = dequantize(x, noise=noise)
    torch.testing.assert_close(
        whole, jacobian_log_det(lambda e: dequantize(x, noise=e)[0], noise), rtol=1e-9, atol=1e-9
    )
    expected = torch.logit(1e-5 / 2 + (1 - 1e-5) * (x + u) / 2**n_bits)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_the_flow_sees_the_image_between_minus_one_and_one():
    class Seen(Flow):
        def forward(self, x, context=None):
            self.image = context
            return x, x.new_zeros(x.shape[0])

    for n_bits in (8, 3):
        dequantize = VariationalDequantize(Seen(), n_bits).double()
        x = torch.tensor([0, 2**n_bits - 1, 1], dtype=torch.uint8).view(3, 1, 1, 1)
        dequantize(x)
        wanted = torch.tensor([-1, 1, -1 + 2 / (2**n_bits - 1)], dtype=F64).view(3, 1, 1, 1)
        torch.testing.assert_close(dequantize.flow.image, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("alpha", [1e-5, 0.1])
def test_an_untrained_flow_gives_uniform_noise(alpha):
    """f starts as the identity, and sigmoid(logit(p)) is p: noise shrunk towards 1/2, under the uniform density of what is left."""
    dequantize, x = layer(alpha=alpha).double(), images()
    noise = torch.rand(x.shape, dtype=F64)
    shrunk = alpha / 2 + (1 - alpha) * noise
    y, log_det = LogitDequantize(alpha=alpha, preset="tutorial").double()(x, noise=shrunk)
    torch.testing.assert_close(
        dequantize(x, noise=noise), (y, log_det + 8 * math.log(1 - alpha)), rtol=1e-10, atol=1e-10
    )


def test_importance_weights_integrate_the_density_over_a_bin():
    """E[p(y) |dy/d eps|] over the noise is the probability of the part of the bin that u reaches, whatever f is.

    One pixel, p logistic in y, so that sigmoid(y) is uniform and that probability a length.
    """

    class Affine(Flow):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 2)

        def forward(self, x, context=None):
            log_scale, shift = self.net(context.flatten(1)).chunk(2, dim=1)
            return x * log_scale.exp().view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1), log_scale.squeeze(1)

    dequantize = randomize(VariationalDequantize(Affine(), alpha=1e-7), std=0.5).double()
    t = torch.linspace(-34, 34, 4001, dtype=F64).view(-1, 1, 1, 1)
    noise, step = t.sigmoid(), (t.sigmoid() * (-t).sigmoid()).flatten() * 68 / 4000
    for value in (0, 100, 255):
        y, log_det = dequantize(torch.full(t.shape, value, dtype=torch.uint8), noise=noise)
        weight = nn.functional.logsigmoid(y).flatten() + nn.functional.logsigmoid(-y).flatten() + log_det
        u = dequantize.noise(
            torch.full((2, 1, 1, 1), value, dtype=torch.uint8),
            torch.tensor([0.0, 1.0], dtype=F64).view(2, 1, 1, 1),
        )[0]
        reached = (1 - 1e-7) * u.flatten().diff().squeeze() / 256
        torch.testing.assert_close((weight.exp() * step).sum(), reached, rtol=1e-8, atol=0)
        assert (weight * step).sum() < reached.log() - 1e-3, "f is not the identity, whose weights are equal"


@pytest.mark.parametrize("n_bits", [8, 5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_centre_and_inverse_are_exact(n_bits, dtype):
    dequantize = trained(n_bits=n_bits).to(dtype)
    x = torch.arange(2**n_bits, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 4)
    y = dequantize.bin_center(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y, LogitDequantize(n_bits, 1e-5, "tutorial").to(dtype).bin_center(x), rtol=0, atol=0
    )
    assert torch.equal(dequantize.inverse(y)[0], x)
    if dtype == F64:
        noise = torch.rand(x.shape, dtype=F64)
        y, log_det = dequantize(x, noise=noise)
        back, log_det_back = dequantize.inverse(y)
        assert torch.equal(back, x)
        torch.testing.assert_close(
            log_det + log_det_back, dequantize.noise(x, noise)[1], rtol=1e-9, atol=1e-9
        )


def test_ends_of_the_noise_are_finite():
    dequantize, x = trained().float(), images()
    for end in (0.0, 1 - 2**-16):
        y, log_det = dequantize(x, noise=torch.full(x.shape, end))
        (y.sum() + log_det.sum()).backward()
        assert y.isfinite().all() and log_det.isfinite().all()
    assert all(p.grad.isfinite().all() for p in dequantize.parameters())


def test_float32():
    exact, x = trained(), images()
    noise = torch.rand(x.shape)
    found, wanted = copy.deepcopy(exact).float()(x, noise=noise), exact(x, noise=noise.double())
    assert all(v.dtype == torch.float32 for v in found)
    torch.testing.assert_close([v.double() for v in found], list(wanted), rtol=1e-4, atol=1e-4)


def test_reversible_gradients_are_the_stored_ones():
    on, off = trained(), trained(reversible=False)
    off.load_state_dict(on.state_dict())
    x = images()
    found, expected = (
        outputs_and_gradients(lambda d=d: d(x, seed=1), list(d.parameters())) for d in (on, off)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert all(g.abs().sum() > 0 for g in expected[1])
    wanted = torch.autograd.grad(sum(v.sum() for v in off(x, seed=1)), list(off.parameters()))
    torch.testing.assert_close(
        torch.autograd.grad(sum(v.sum() for v in on(x, seed=1)), list(on.parameters())),
        wanted,
        rtol=1e-9,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer(n_bits=9), "n_bits: got 9, expected 1 to 8"),
        (lambda: layer(alpha=0.0), "alpha: got 0.0, expected a number between 0 and 1"),
        (lambda: layer()(torch.zeros(2, 1, 2, 4)), "x: got dtype torch.float32, expected uint8"),
        (
            lambda: layer()(images(), noise=torch.rand(3, 1, 2, 2)),
            r"noise: got shape \[3, 1, 2, 2\], expected \[3, 1, 2, 4\]",
        ),
        (
            lambda: layer()(images(), noise=images()),
            r"noise: got dtype torch.uint8, expected a floating point tensor",
        ),
        (
            lambda: layer()(images(), noise=torch.rand(3, 1, 2, 4), seed=1),
            "noise, seed: got both, expected one of them",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
