"""The context of coupling networks, and of the flows and models that pass it on."""

import re

import pytest
import torch

from fastflow.models import Glow, RealNVP, VectorGlow
from fastflow.nn import (
    MLP,
    ActNorm,
    AffineCoupling,
    GlowLevel,
    GlowNetwork,
    GlowStep,
    ResidualMLP,
    ResidualNetwork,
    Sequential,
    Squeeze,
)
from fastflow.ops import squeeze2d
from tests.support.cases import randomize

F64 = torch.float64
NETWORKS = {
    "ResidualNetwork": lambda c, **kw: ResidualNetwork(c, 4, 3, 1, **kw),
    "GlowNetwork, plain": lambda c, **kw: GlowNetwork(c, 4, 3, "plain", **kw),
    "GlowNetwork, fused": lambda c, **kw: GlowNetwork(c, 4, 3, "fused", **kw),
}
of_networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


def trained(module):
    return randomize(module, std=0.2).double().eval()


def test_mlp_is_the_network_of_x_and_context():
    conditional, plain = MLP(2, 4, hidden=5, context_features=3), MLP(5, 4, hidden=5)
    plain.load_state_dict(trained(conditional).state_dict())
    x, context = torch.randn(6, 2, dtype=F64), torch.randn(6, 3, dtype=F64)
    expected = plain.double()(torch.cat([x, context], dim=1))
    assert torch.equal(conditional(x, context), expected)
    assert expected.abs().min() > 0


@of_networks
def test_a_vector_is_repeated_at_every_position(make):
    network = trained(make(2, context_features=3))
    x, context = torch.randn(2, 2, 3, 5, dtype=F64), torch.randn(2, 3, dtype=F64)
    image = context.view(2, 3, 1, 1).repeat(1, 1, 3, 5)
    torch.testing.assert_close(network(x, context), network(x, image))
    assert (network(x, context) - network(x, context + 1)).abs().max() > 1e-3


@of_networks
def test_an_image_is_squeezed_to_the_size_of_x(make):
    network = trained(make(2, context_features=16))
    x, context = torch.randn(2, 2, 2, 3, dtype=F64), torch.randn(2, 1, 8, 12, dtype=F64)
    squeezed = squeeze2d(squeeze2d(context))
    assert torch.equal(network(x, context), network(x, squeezed))


def test_glow_networks_see_x_and_then_the_context():
    conditional = trained(GlowNetwork(2, 4, 3, "plain", context_features=3))
    plain = GlowNetwork(5, 4, 3, "plain").double()
    plain.load_state_dict(conditional.state_dict())
    x, context = torch.randn(2, 2, 4, 4, dtype=F64), torch.randn(2, 3, 4, 4, dtype=F64)
    assert torch.equal(conditional(x, context), plain.eval()(torch.cat([x, context], dim=1)))


@pytest.mark.parametrize(
    ("network", "x", "context", "message"),
    [
        (
            MLP(2, 4),
            (5, 2),
            (5, 3),
            "context: got a tensor of shape [5, 3], expected None: the network has no",
        ),
        (MLP(2, 4, context_features=3), (5, 2), None, "context: got None, expected [5, 3]"),
        (ResidualMLP(2, 4, 5, context_features=3), (5, 2), None, "context: got None, expected [5, 3]"),
        (ResidualMLP(2, 4, 5), (5, 2), (5, 3), "context: got a tensor of shape [5, 3], expected None"),
        (MLP(2, 4, context_features=3), (5, 2), (1, 3), "context: got shape [1, 3], expected [5, 3]"),
        (
            GlowNetwork(2, 4, 3, context_features=3),
            (5, 2, 4, 4),
            (5, 3, 4, 3),
            "context: got shape [5, 3, 4, 3], expected [5, 3], or an image that is [5, 3, 4, 4] after squeezes",
        ),
        (
            ResidualNetwork(2, 4, 3, 1, context_features=3),
            (5, 2, 4, 4),
            (5, 3, 8, 8),
            "context: got shape [5, 3, 8, 8], expected [5, 3], or an image that is [5, 3, 4, 4] after squeezes",
        ),
    ],
)
def test_errors_name_the_context(network, x, context, message):
    context = None if context is None else torch.zeros(context)
    with pytest.raises(ValueError, match=re.escape(message)):
        network(torch.zeros(x), context)


@pytest.mark.parametrize("features", [0, -1, 1.5])
def test_context_features_are_positive(features):
    for make in (
        lambda **kw: MLP(2, 2, **kw),
        lambda **kw: ResidualMLP(2, 2, **kw),
        *(lambda make=make, **kw: make(2, **kw) for make in NETWORKS.values()),
    ):
        with pytest.raises(
            ValueError, match=f"context_features: got {features}, expected a positive integer"
        ):
            make(context_features=features)


def test_integers_are_no_context():
    with pytest.raises(ValueError, match="context: got dtype torch.int64, expected floating point"):
        MLP(2, 4, context_features=3)(torch.zeros(5, 2), torch.zeros(5, 3, dtype=torch.int64))


VECTORS, IMAGES = (4,), (4, 2, 2)
FLOWS = {
    "vectors": (
        lambda: Sequential(ActNorm(4), AffineCoupling(MLP(2, 4, 5, 1, context_features=3))), VECTORS, (3,)
    ),
    "vectors, residual networks": (
        lambda: Sequential(ActNorm(4), AffineCoupling(ResidualMLP(2, 4, 5, 1, context_features=3))), VECTORS, (3,)
    ),
    "GlowStep, a vector": (lambda: GlowStep(4, 5, context_features=3), IMAGES, (3,)),
    "GlowStep, an image": (lambda: GlowStep(4, 5, "additive", context_features=3), IMAGES, (3, 2, 2)),
    "GlowLevel, an image to squeeze": (
        lambda: GlowLevel([GlowStep(8, 5, context_features=4) for _ in range(2)]), (2, 4, 2), (1, 4, 2)
    ),
    "a checkerboard before a squeeze": (
        lambda: Sequential(
            AffineCoupling(GlowNetwork(1, 2, 5, context_features=2), mask="checkerboard"),
            Squeeze(),
            AffineCoupling(GlowNetwork(2, 4, 5, context_features=8)),
        ),
        (1, 4, 2),
        (2, 4, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "context"), FLOWS.values(), ids=FLOWS.keys())
def test_flows_pass_the_context_on(make, shape, context):
    """With the right inverse, log-det and gradients, also of the context."""
    flow = trained(make())
    x, context = torch.randn(3, *shape, dtype=F64), torch.randn(3, *context, dtype=F64)
    report = flow.check(x, context)
    assert "context" in report.gradient_errors
    assert (flow(x, context)[0] - flow(x, context + 1)[0]).abs().max() > 1e-3


def models(**options):
    return {
        "VectorGlow": VectorGlow(4, steps=2, hidden=5, context_features=3, **options),
        "Glow, a vector": Glow((1, 4, 4), 2, 2, 5, context_features=3, **options),
        "Glow, an image": Glow((1, 4, 4), 2, 2, 5, context_features=2, context_image=True, **options),
        "RealNVP, a vector": RealNVP((1, 4, 4), 2, 3, 1, context_features=3, **options),
        "RealNVP, an image": RealNVP((1, 4, 4), 2, 3, 1, context_features=2, context_image=True, **options),
    }


@pytest.mark.parametrize("name", models())
def test_models_take_a_context(name):
    torch.manual_seed(0)
    model = trained(models()[name])
    x = (
        torch.randint(0, 256, (3, *model.shape), dtype=torch.uint8)
        if model.n_bits
        else torch.randn(3, 4, dtype=F64)
    )
    context = torch.randn(3, *model.context_shape, dtype=F64, requires_grad=True)
    log_prob = model.log_prob(x, context, seed=0)
    found = torch.autograd.grad(log_prob.sum(), [context, *model.parameters()], allow_unused=True)
    stored = models(reversible=False)[name].double().eval()
    stored.load_state_dict(model.state_dict())
    again = stored.log_prob(x, context, seed=0)
    expected = torch.autograd.grad(again.sum(), [context, *stored.parameters()], allow_unused=True)
    torch.testing.assert_close(log_prob, again)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert found[0].flatten(1).abs().sum(1).min() > 0
    latents = model.encode(x, context)
    torch.testing.assert_close(model.decode(latents, context), x)
    other = model.decode(latents, context + 3)
    assert (other.double() - x.double()).abs().max() > 0
    assert model.sample(3, context=context).shape == x.shape
    assert model.sample((2,), context=context[:2]).shape == (2, 2, *model.shape)
    assert torch.equal(
        model.log_prob(x, context[:1], seed=0), model.log_prob(x, context[:1].expand_as(context), seed=0)
    )


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "context: got None, expected torch.float32 of shape [4, 3] or [1, 3]"),
        (torch.zeros(2, 3), "context: got shape [2, 3], expected torch.float32 of shape [4, 3] or [1, 3]"),
        (torch.zeros(4, 2), "context: got shape [4, 2], expected"),
        (torch.zeros(4, 3, dtype=torch.int64), "context: got dtype torch.int64, expected torch.float32"),
        (torch.full((4, 3), torch.inf), "context: got inf or NaN, expected finite numbers"),
    ],
)
def test_models_name_the_context(context, message):
    model = VectorGlow(2, steps=1, hidden=2, context_features=3)
    for call in (
        lambda: model.log_prob(torch.zeros(4, 2), context),
        lambda: model.sample(4, context=context),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_image": True}, "context_image: got True, expected False without context_features"),
        ({"context_features": 3, "classes": 2}, "classes: got 2, expected None with context_features"),
        ({"context_features": 0}, "context_features: got 0, expected a positive integer"),
    ],
)
@pytest.mark.parametrize("model", [Glow, RealNVP])
def test_options_of_the_context(model, options, message):
    with pytest.raises(ValueError, match=message):
        model((1, 8, 8), **options)
