"""Couplings of an odd number of channels, and of one channel: C // 2 pass through, the others are transformed."""

import re

import pytest
import torch

from fastflow.models import FlowModel, VectorGlow
from fastflow.nn import (
    MLP,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    GaussianPrior,
    GlowNetwork,
    GlowStep,
    InvertibleConv1x1,
    Sequential,
)
from fastflow.ops.affine_coupling import SCALES
from tests.support.cases import randomize

F64 = torch.float64


def trained(module):
    return randomize(module, std=0.3).double().eval()


@pytest.mark.parametrize("swap_halves", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_a_coupling_of_five(scale, swap_halves):
    net = MLP(2, 3 if scale == "none" else 6, hidden=4)
    layer = trained(AffineCoupling(net, scale=scale, swap_halves=swap_halves, num_scale_factors=3))
    x = torch.randn(3, 5, dtype=F64)
    y, _ = layer(x)
    changed = (y != x).any(0)
    assert changed.tolist() == ([True] * 3 + [False] * 2 if swap_halves else [False] * 2 + [True] * 3)
    layer.check(x)


@pytest.mark.parametrize("params_layout", ["shift_scale", "scale_shift", "interleaved"])
@pytest.mark.parametrize("affine_order", ["scale_first", "shift_first"])
def test_the_formula(params_layout, affine_order):
    options = {"scale": "exp", "params_layout": params_layout, "affine_order": affine_order}
    layer = trained(AffineCoupling(MLP(1, 4, hidden=4), **options))
    x = torch.randn(6, 3, dtype=F64)
    h = layer.net(x[:, :1])
    if params_layout == "interleaved":
        shift, scale = h[:, ::2], h[:, 1::2]
    else:
        shift, scale = h.chunk(2, dim=1) if params_layout == "shift_scale" else h.chunk(2, dim=1)[::-1]
    moved = (
        scale.exp() * x[:, 1:] + shift if affine_order == "scale_first" else scale.exp() * (x[:, 1:] + shift)
    )
    y, log_det = layer(x)
    torch.testing.assert_close(y, torch.cat([x[:, :1], moved], dim=1))
    torch.testing.assert_close(log_det, scale.sum(1))


FLOWS = {
    "an image of three channels": (lambda: AffineCoupling(GlowNetwork(1, 4, 5), swap_halves=True), (3, 2, 2), None),
    "an additive one": (lambda: AdditiveCoupling(GlowNetwork(1, 2, 5)), (3, 2, 2), None),
    "GlowStep": (lambda: GlowStep(3, 5), (3, 2, 2), None),
    "GlowStep of one channel": (lambda: GlowStep(1, 5, context_features=2), (1, 2, 2), (2,)),
    "one number": (lambda: AffineCoupling(MLP(0, 2, 5, context_features=2)), (1,), (2,)),
    "one number, swapped": (
        lambda: AffineCoupling(MLP(0, 2, 5, context_features=2), swap_halves=True), (1,), (2,)
    ),
    "a chain": (
        lambda: Sequential(ActNorm(1), InvertibleConv1x1(1), AffineCoupling(MLP(0, 2, 5, context_features=2))),
        (1,),
        (2,),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "context"), FLOWS.values(), ids=FLOWS.keys())
def test_flows(make, shape, context):
    flow = trained(make())
    context = None if context is None else torch.randn(3, *context, dtype=F64)
    x = torch.randn(3, *shape, dtype=F64)
    flow.check(x, context)
    z, log_det = flow(x[:0], None if context is None else context[:0])
    assert z.shape == (0, *shape) and log_det.shape == (0,)


@pytest.mark.parametrize("features", [1, 3])
def test_vector_glow(features):
    context = torch.randn(5, 2, dtype=F64)
    options = {"steps": 2, "hidden": 5, "context_features": 2}
    model, stored = VectorGlow(features, **options), VectorGlow(features, **options, reversible=False)
    stored.load_state_dict(trained(model).state_dict())
    x, log_prob = model.sample_and_log_prob(5, context)
    found = torch.autograd.grad(model.log_prob(x, context).sum(), list(model.parameters()), allow_unused=True)
    again = stored.double().eval().log_prob(x, context)
    torch.testing.assert_close(log_prob, again)
    expected = torch.autograd.grad(again.sum(), list(stored.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_one_number_is_a_gaussian_of_the_context():
    layer = trained(AffineCoupling(MLP(0, 2, 5, context_features=2), scale="exp"))
    model = FlowModel(layer, GaussianPrior((1,))).double()
    x, context = torch.randn(4, 1, dtype=F64), torch.randn(4, 2, dtype=F64)
    shift, scale = layer.net(x[:, :0], context).unbind(1)
    expected = torch.distributions.Normal(-shift * (-scale).exp(), (-scale).exp()).log_prob(x[:, 0])
    torch.testing.assert_close(model.log_prob(x, context), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0, 2), "in_features: got 0, expected a positive integer"),
        (lambda: VectorGlow(1), "features: got 1, expected 2 or more, or context_features"),
        (lambda: GlowStep(1, 5), "num_features: got 1, expected 2 or more, or context_features"),
        (
            lambda: AffineCoupling(MLP(2, 5))(torch.zeros(2, 5)),
            "params: got shape [2, 5], expected [2, 6] (x is [2, 5], shift and scale of 3 channels)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
