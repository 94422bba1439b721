"""Couplings with masks of one's own, with unequal parts, and with functions of one's own."""

import re

import pytest
import torch
from torch import nn

from fastflow.nn import MLP, AdditiveCoupling, AffineCoupling, Coupling, GlowNetwork, Sequential
from fastflow.ops.affine_coupling import SCALES
from tests.support.cases import randomize
from tests.support.flows import Asinh

F64 = torch.float64
CHANNELS = torch.tensor([True, False, False, True, False])
POSITIONS = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.4


def conv(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, c_out, 1))


def trained(module):
    return randomize(module, std=0.3).double().eval()


def passes(layer, x):
    """Which elements of a sample the layer does not change."""
    return (layer(x)[0] == x).all(0)


@pytest.mark.parametrize("swap_halves", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_a_mask_of_channels(scale, swap_halves):
    kept, transformed = (3, 2) if swap_halves else (2, 3)
    net = MLP(kept, (1 if scale == "none" else 2) * transformed, hidden=4)
    options = {"mask": CHANNELS, "swap_halves": swap_halves, "scale": scale}
    layer = trained(AffineCoupling(net, num_scale_factors=transformed, **options))
    x = torch.randn(3, 5, dtype=F64)
    assert torch.equal(passes(layer, x), CHANNELS ^ swap_halves)
    layer.check(x)


@pytest.mark.parametrize("params_layout", ["shift_scale", "scale_shift", "interleaved"])
@pytest.mark.parametrize("num_scale_factors", [1, 2])
def test_a_mask_of_positions(params_layout, num_scale_factors):
    layer = AffineCoupling(
        conv(2, 4),
        mask=POSITIONS,
        scale="soft_clamp",
        params_layout=params_layout,
        num_scale_factors=num_scale_factors,
    )
    layer, x = trained(layer), torch.randn(3, 2, 3, 4, dtype=F64)
    h = layer.net(x * POSITIONS)
    if params_layout == "interleaved":
        shift, raw = h[:, ::2], h[:, 1::2]
    else:
        shift, raw = h.chunk(2, dim=1)[:: 1 if params_layout == "shift_scale" else -1]
    factor = layer.log_factor.exp().view(-1, 1, 1)
    log_scale = torch.where(POSITIONS, 0, factor * torch.tanh(raw / factor))
    y, log_det = layer(x)
    torch.testing.assert_close(y, torch.where(POSITIONS, x, log_scale.exp() * x + shift))
    torch.testing.assert_close(log_det, log_scale.flatten(1).sum(1))
    layer.check(x)


@pytest.mark.parametrize("swap_halves", [False, True])
def test_a_checkerboard_of_ones_own_is_the_checkerboard(swap_halves):
    odd = (torch.arange(3).view(3, 1) + torch.arange(4)) % 2 == 1
    own = AffineCoupling(conv(2, 4), mask=odd.expand(2, 3, 4), swap_halves=swap_halves, scale="tanh")
    own = trained(own)
    fused = AffineCoupling(own.net, mask="checkerboard", swap_halves=swap_halves, scale="tanh").double()
    fused.log_factor = own.log_factor
    x = torch.randn(3, 2, 3, 4, dtype=F64)
    torch.testing.assert_close(own(x), fused(x))


@pytest.mark.parametrize(
    ("features", "split", "kept"), [(3, 1, 1), (3, 2, 2), (8, 0.25, 2), (8, 0.75, 6), (5, 0.5, 2)]
)
@pytest.mark.parametrize("swap_halves", [False, True])
def test_unequal_parts(features, split, kept, swap_halves):
    net = MLP(kept, 2 * (features - kept), hidden=4)
    layer = trained(AffineCoupling(net, split=split, swap_halves=swap_halves))
    x = torch.randn(3, features, dtype=F64)
    expected = torch.arange(features) < kept
    assert torch.equal(passes(layer, x), expected.flip(0) if swap_halves else expected)
    layer.check(x)


def asinh(**options):
    return trained(Coupling(**options, transformer=Asinh()))


COUPLINGS = {
    "halves": lambda: asinh(net=conv(1, 4), split=1),
    "swapped": lambda: asinh(net=conv(1, 4), swap_halves=True),
    "checkerboard": lambda: asinh(net=conv(3, 6), mask="checkerboard"),
    "checkerboard, swapped": lambda: asinh(net=conv(3, 6), mask="checkerboard", swap_halves=True),
    "channels": lambda: asinh(net=conv(2, 2), mask=torch.tensor([True, False, True])),
    "positions": lambda: asinh(net=conv(3, 6), mask=torch.arange(27).view(3, 3, 3) % 4 == 0),
}


@pytest.mark.parametrize("make", COUPLINGS.values(), ids=COUPLINGS.keys())
def test_a_function_of_ones_own(make):
    layer, x = make(), torch.randn(2, 3, 3, 3, dtype=F64)
    layer.check(x)
    y, log_det = layer(x)
    assert not torch.equal(y, x) and not log_det.eq(0).any()
    empty, log_det = layer(x[:0])
    assert empty.shape == (0, 3, 3, 3) and log_det.shape == (0,)


@pytest.mark.parametrize("swap_halves", [False, True])
def test_the_affine_couplings_are_this_coupling_with_an_affine_function(swap_halves):
    class Affine:
        def __call__(self, x, h):
            shift, log_scale = h.chunk(2, dim=1)
            return x * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

        def inverse(self, y, h):
            shift, log_scale = h.chunk(2, dim=1)
            return (y - shift) * (-log_scale).exp(), -log_scale.flatten(1).sum(1)

    x = torch.randn(3, 2, 3, 4, dtype=F64)
    for net, mask in ((conv(1, 2), "halves"), (conv(2, 4), "checkerboard"), (conv(2, 4), POSITIONS)):
        options = {"mask": mask, "swap_halves": swap_halves}
        fused = trained(AffineCoupling(net, scale="exp", **options))
        generic = Coupling(net, Affine(), **options).double()
        for direction in ("forward", "inverse"):
            found, expected = getattr(generic, direction)(x), getattr(fused, direction)(x)
            torch.testing.assert_close(found, expected)


def test_reversible_chains_and_state_dicts():
    """Gradients as with stored activations; indices of a random mask come back with the weights."""
    x = torch.randn(3, 5, dtype=F64)
    masks = [CHANNELS, CHANNELS.flip(0)]
    chain = trained(Sequential(*(AffineCoupling(MLP(2, 6, 4), mask=mask) for mask in masks)))
    other = Sequential(*(AffineCoupling(MLP(2, 6, 4), mask=mask) for mask in masks[::-1]), reversible=False)
    other.load_state_dict(chain.state_dict())
    assert "flows.0.own_mask.kept" in chain.state_dict()
    gradients = []
    for flow in (chain, other.double().eval()):
        z, log_det = flow(x)
        gradients.append(torch.autograd.grad((z**2).sum() + log_det.sum(), list(flow.parameters())))
    torch.testing.assert_close(*gradients)


def test_channels_last_and_half_precision():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    layer = AffineCoupling(GlowNetwork(1, 4, 4), split=1).eval()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    layer, x = randomize(AffineCoupling(MLP(2, 6, 4), mask=CHANNELS), std=0.3).bfloat16(), torch.randn(3, 5)
    y, log_det = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16 and log_det.dtype == torch.float32


class NoInverse:
    def __call__(self, x, h):
        return x, h.sum(1)


class PerElement(NoInverse):
    inverse = NoInverse.__call__

    def __call__(self, x, h):
        return x, torch.zeros_like(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({"mask": torch.ones(3).bool()}, "mask: got a tensor of shape [3], of which 3 are True, expected [C, ...]"),
        ({"mask": torch.zeros(3).bool()}, "mask: got a tensor of shape [3], of which 0 are True, expected [C, ...]"),
        ({"mask": torch.tensor(True)}, "mask: got a tensor of shape [], of which 1 are True, expected [C, ...]"),
        ({"mask": torch.ones(3, device="meta").bool()}, "mask: got a tensor without values, device meta, expected one"),
        ({"mask": torch.ones(3)}, "mask: got a tensor of torch.float32, expected one of 'halves', 'checkerboard', or"),
        ({"mask": [True, False]}, "mask: got [True, False], expected one of 'halves', 'checkerboard', or a bool tensor"),
        ({"mask": "rows"}, "mask: got 'rows', expected one of 'halves', 'checkerboard', or a bool tensor"),
        ({"split": 0}, "split: got 0, expected a number of channels, or a fraction of them between 0 and 1"),
        ({"split": 1.5}, "split: got 1.5, expected a number of channels, or a fraction of them between 0 and 1"),
        ({"split": True}, "split: got True, expected a number of channels, or a fraction of them between 0 and 1"),
        ({"split": 1, "mask": "checkerboard"}, "split: got 1, expected None, as mask is not 'halves'"),
        ({"split": 1, "mask": CHANNELS}, "split: got 1, expected None, as mask is not 'halves'"),
        ({"swap_halves": 1}, "swap_halves: got 1, expected True or False"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [AffineCoupling, AdditiveCoupling, Coupling])
def test_errors_at_construction(kind, make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kind(MLP(2, 2), *([Asinh()] if kind is Coupling else []), **make)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"mask": CHANNELS}, (2, 4), "mask: got shape [5], expected [4], the shape of a sample, or [4], one value"),
        ({"mask": POSITIONS}, (2, 2, 4, 3), "mask: got shape [2, 3, 4], expected [2, 4, 3], the shape of a sample, or [2]"),
        ({"split": 3}, (2, 3), "split: got 3, by which 3 of 3 channels pass through, expected at least 1 channel in each"),
        ({"split": 0.1}, (2, 3), "split: got 0.1, by which 0 of 3 channels pass through, expected at least 1 channel in"),
        ({"mask": CHANNELS}, (2, 5), "params: got shape [2, 2], expected [2, 6] (x is [2, 5], shift and scale of 3 channels)"),
    ],
)  # fmt: skip
def test_errors_of_shapes(options, shape, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        AffineCoupling(MLP(2, 2), **options)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        (torch.exp, "transformer: got <built-in method exp"),
        (NoInverse(), "transformer: got <"),
        (PerElement(), "transformer's log_det: got shape [2, 3], expected [2] (one value per sample)"),
        (lambda: None, "transformer: got <function"),
    ],
)
def test_errors_of_transformers(transformer, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Coupling(MLP(2, 6), transformer)(torch.zeros(2, 5))


@pytest.mark.parametrize(
    "mask", [CHANNELS, torch.eye(4, dtype=torch.bool)[None]], ids=["channels", "elements"]
)
def test_a_mask_is_a_module_without_parameters(mask):
    own = AffineCoupling(MLP(2, 6, 4), mask=mask).own_mask
    assert list(own.parameters()) == [] and own.requires_grad_(False) is own
