"""Flows of normflows, accelerated in place: the same numbers and gradients."""

import pytest
import torch
from torch import nn

from tests.support.libraries import assert_same, assert_trains_the_same, passes, randomized

nf = pytest.importorskip("normflows")
ff = pytest.importorskip("fastflow.integrations.normflows")
flows = nf.flows

CONTEXT = 3
BOTH = {
    "forward": lambda m, x, c: m(x, c),
    "inverse": lambda m, x, c: m.inverse(x, c),
}


@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize(
    "features, options",
    [
        (4, {}),
        (5, {"tails": "circular", "num_bins": 4, "reverse_mask": True}),
        (3, {"tails": None, "num_bins": 3}),
        (2, {"num_bins": 1, "tail_bound": 1.0, "activation": nn.Tanh}),
    ],
)
def test_spline_couplings(features, context, options):
    model = flows.CoupledRationalQuadraticSpline(features, 2, 8, num_context_channels=context, **options)
    inside = options.get("tails", "linear") is None
    x = torch.rand(20, features) if inside else 2 * torch.randn(20, features)
    c = None if context is None else torch.randn(20, context)
    report = assert_same(ff, randomized(model), BOTH, x, c)
    assert report.replaced["prqct"] == "PiecewiseRationalQuadraticCoupling"
    assert report.replaced["prqct.unconditional_transform"] == "PiecewiseRationalQuadraticCDF"
    assert not report.left_alone


@pytest.mark.parametrize("bound", [2.0, torch.tensor([1.5, 2.0, 2.5, 1.0, 3.0])])
@pytest.mark.parametrize("circular", [[0, 3], [1], [0, 1, 2, 3, 4]])
def test_circular_spline_couplings(circular, bound):
    """The library returns 0 outside of the bounds, in both directions."""
    model = flows.CircularCoupledRationalQuadraticSpline(
        5, 1, 8, circular, num_bins=4, tail_bound=bound, mask=torch.tensor([1, 0, 1, 0, 1])
    )
    x = 2 * torch.randn(30, 5)
    report = assert_same(ff, randomized(model), BOTH, x)
    assert report.replaced["prqct"] == "PiecewiseRationalQuadraticCoupling"
    y, _ = model(x)
    assert (y == 0).any()


@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("features, options", [(1, {}), (2, {"num_bins": 3}), (5, {"permute_mask": True})])
def test_autoregressive_splines(features, context, options):
    model = flows.AutoregressiveRationalQuadraticSpline(
        features, 2, 9, num_context_channels=context, **options
    )
    x, c = 2 * torch.randn(20, features), None if context is None else torch.randn(20, context)
    model = randomized(model)
    report = assert_same(ff, model, BOTH, x, c)
    assert report.replaced["mprqat"] == "MaskedPiecewiseRationalQuadraticAutoregressive"
    ff.accelerate(model)
    assert passes(model, lambda: model(x, c)) == 0  # one, in the op


def test_autoregressive_splines_with_a_bound_for_each_feature():
    bound = torch.tensor([1.0, 2.0, 3.0])
    model = randomized(flows.AutoregressiveRationalQuadraticSpline(3, 1, 9, tail_bound=bound))
    x = 2 * torch.randn(20, 3)
    assert_same(ff, model, BOTH, x)
    ff.accelerate(model)
    assert passes(model, lambda: model(x)) == 0


@pytest.mark.parametrize("bound", [3.0, torch.tensor([1.0, 2.0, 3.0, 2.5])])
def test_circular_autoregressive_splines(bound):
    model = flows.CircularAutoregressiveRationalQuadraticSpline(4, 1, 9, [0, 2], tail_bound=bound)
    x = 2 * torch.randn(20, 4)
    model = randomized(model)
    assert_same(ff, model, BOTH, x)
    ff.accelerate(model)
    assert passes(model, lambda: model(x)) == 4


@pytest.mark.parametrize(
    "features, options",
    [
        (1, {}),
        (4, {}),
        (4, {"context_features": CONTEXT}),
        (5, {"use_residual_blocks": False, "random_mask": True, "activation": torch.tanh}),
        (3, {"num_blocks": 0, "context_features": CONTEXT}),
    ],
)
def test_affine_autoregressive_layers(features, options):
    model = randomized(flows.MaskedAffineAutoregressive(features, 9, **options))
    x = torch.randn(10, features)
    c = torch.randn(10, CONTEXT) if "context_features" in options else None
    report = assert_same(ff, model, BOTH, x, c)
    assert report.replaced[""] == "MaskedAffineAutoregressive"
    ff.accelerate(model)
    assert passes(model, lambda: model.inverse(x, c)) == 0


def test_training_coincides():
    torch.manual_seed(0)
    base = nf.distributions.DiagGaussian(4, trainable=False)
    parts = []
    for _ in range(2):
        parts += [
            flows.AutoregressiveRationalQuadraticSpline(4, 1, 8),
            flows.CoupledRationalQuadraticSpline(4, 1, 8),
            flows.LULinearPermute(4),
        ]
    model = nf.NormalizingFlow(base, parts)
    x = torch.randn(64, 4).double()
    assert_trains_the_same(ff, model, lambda m: m.forward_kld(x))


def test_what_is_left_alone_is_named():
    parts = [
        flows.MaskedAffineAutoregressive(4, 8, use_batch_norm=True),
        flows.MaskedAffineAutoregressive(4, 8, activation=torch.sin),
        flows.AutoregressiveRationalQuadraticSpline(4, 1, 8, activation=nn.LeakyReLU),
        flows.Planar((4,)),
    ]
    model = nn.ModuleList(parts)
    report = ff.accelerate(model)
    assert report.left_alone["0"] == ("MaskedAffineAutoregressive", "batch norm in its network")
    assert report.left_alone["1"][1] == "the activation of its network"
    assert report.left_alone["3"] == ("Planar", "not covered")
    x = torch.randn(5, 4)
    assert passes(parts[2], lambda: parts[2](x)) == 4  # its splines are faster, its inverse takes each pass
    assert str(ff.accelerate(nn.Linear(2, 2))) == "nothing to replace was found"


def test_hooks_run_and_dropout_is_drawn_anew():
    model = flows.MaskedAffineAutoregressive(3, 8)
    seen = []
    model.autoregressive_net.initial_layer.register_forward_hook(lambda *args: seen.append(args))
    ff.accelerate(model)
    model.inverse(torch.randn(2, 3))
    assert len(seen) == 3
    model = flows.MaskedAffineAutoregressive(3, 8, dropout_probability=0.5)
    ff.accelerate(model)
    x = torch.randn(2, 3)
    assert passes(model, lambda: model.inverse(x)) == 3
    model.eval()
    assert passes(model, lambda: model.inverse(x)) == 0
