"""Flows of normflows, accelerated in place: the same numbers and gradients."""

import pytest
import torch
from torch import nn

from fastflow.integrations import normflows_layers
from tests.support.cases import randomize
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


@pytest.mark.parametrize(
    "circular, bound",
    [([0, 2], 3.0), ([], 2.0), ([1], torch.tensor([1.0, 2.0, 3.0, 2.5])), ([0, 1, 2, 3], torch.ones(4))],
)
def test_circular_autoregressive_splines(circular, bound):
    """The library returns 0 outside of the bounds, on which the following features depend."""
    model = randomized(
        flows.CircularAutoregressiveRationalQuadraticSpline(
            4, 1, 9, circular, num_context_channels=CONTEXT, num_bins=len(circular) + 1, tail_bound=bound
        )
    )
    with torch.no_grad():  # others than those of the start, which are 1
        model.mprqat.autoregressive_net.preprocessing.weights.normal_()
    x, c = 2 * torch.randn(20, 4), torch.randn(20, CONTEXT)
    assert_same(ff, model, BOTH, x, c)
    ff.accelerate(model)
    assert passes(model, lambda: model(x, c)) == 0
    assert (model(x, c)[0] == 0).any()
    model.mprqat.autoregressive_net.preprocessing.activation = nn.Tanh()  # not of the library's layers
    assert passes(model, lambda: model(x, c)) == 4


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


IMAGES = {
    "forward": lambda m, x, c: per_sample(*m(x)),
    "inverse": lambda m, x, c: per_sample(*m.inverse(x)),
}


def per_sample(z, log_det):
    """The library has one log-det for all samples in some layers."""
    return z, log_det.expand(z.shape[0])


@pytest.mark.parametrize("features", [1, 2, 5])
def test_linear_maps(features):
    model = randomized(flows.LULinearPermute(features, identity_init=False))
    report = assert_same(ff, model, BOTH, torch.randn(7, features))
    assert report.replaced["linear"] == "_LULinear" and not report.left_alone


def initialized(layer, std=0.2):
    """Of data that it has seen: parameters that are not those of the start, in ActNorm too."""
    for m in layer.modules():
        if isinstance(m, flows.ActNorm):
            m.data_dep_init_done = torch.tensor(1.0)
    return randomize(layer, std=std)


@pytest.mark.parametrize("shape", [(4,), (1, 1, 1), (3, 1, 1)])
@pytest.mark.parametrize("by_op", [False, True])
def test_actnorm(shape, by_op, monkeypatch):
    monkeypatch.setattr(normflows_layers, "pays_for_small_ops", lambda z: by_op)
    x = 1 + 2 * torch.randn(6, shape[0], *([5, 4] if len(shape) == 3 else []))
    report = assert_same(ff, initialized(flows.ActNorm(shape)), IMAGES, x)
    assert report.replaced == {"": "ActNorm"}
    for call in ("forward", "inverse"):  # of a first batch
        layers = [flows.ActNorm(shape), flows.ActNorm(shape)]
        ff.accelerate(layers[1])
        for _ in range(2):
            wanted, found = (getattr(layer, call)(x) for layer in layers)
            torch.testing.assert_close(found[0], wanted[0])
            torch.testing.assert_close(found[1], wanted[1].expand(6))
        torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())
        x = 2 * x
        layers[1].load_state_dict(flows.ActNorm(shape).state_dict())
        layers[0].load_state_dict(flows.ActNorm(shape).state_dict())
        wanted, found = (getattr(layer, call)(x) for layer in layers)  # it is a first batch again
        torch.testing.assert_close(found[0], wanted[0])


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_invertible_convolutions(channels):
    model = randomized(flows.Invertible1x1Conv(channels, use_lu=True))
    assert_same(ff, model, IMAGES, torch.randn(3, channels, 4, 2))
    report = ff.accelerate(flows.Invertible1x1Conv(channels))
    assert report.left_alone[""] == ("Invertible1x1Conv", "use_lu=False")


@pytest.mark.parametrize(
    "scale, scale_map", [(True, "exp"), (True, "sigmoid"), (True, "sigmoid_inv"), (False, "exp")]
)
@pytest.mark.parametrize("split_mode", ["channel", "channel_inv"])
@pytest.mark.parametrize("vectors", [False, True])
def test_affine_couplings(scale, scale_map, split_mode, vectors):
    outputs = 4 if scale else 2
    net = nn.Linear(2, outputs) if vectors else nn.Conv2d(2, outputs, 3, padding=1)
    model = randomized(flows.AffineCouplingBlock(net, scale, scale_map, split_mode))
    x = torch.randn(5, 4) if vectors else torch.randn(5, 4, 3, 2)
    report = assert_same(ff, model, IMAGES, x)
    assert report.replaced == {"": "AffineCouplingBlock"} and not report.left_alone


@pytest.mark.parametrize(
    "channels, options",
    [
        (4, {}),
        (2, {"scale_map": "exp", "split_mode": "channel_inv"}),
        (4, {"scale": False}),
        (4, {"use_lu": False, "leaky": 0.1}),
        (3, {}),  # halves that differ
        (1, {"split_mode": "checkerboard"}),
        (4, {"net_actnorm": True}),
    ],
)
def test_glow_blocks(channels, options):
    model = initialized(flows.GlowBlock(channels, 8, **options))
    report = assert_same(ff, model, IMAGES, torch.randn(5, channels, 4, 6))
    assert report.replaced[""] == "GlowBlock"


def glow(levels=2, steps=2):
    q0, merges, parts = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        parts.append([flows.GlowBlock(channels, 8) for _ in range(steps)] + [flows.Squeeze()])
        latent = (channels, 2 * 2**i, 2 * 2**i) if i == 0 else (channels // 2, 2 * 2**i, 2 * 2**i)
        q0.append(nf.distributions.DiagGaussian(latent))
        if i > 0:
            merges.append(flows.Merge())
    return nf.MultiscaleFlow(q0, parts, merges, class_cond=False)


def test_glow():
    x = torch.randn(4, 3, 8, 8)
    calls = {
        "log_prob": lambda m, x, c: (m.log_prob(x, None),),
        "sample": lambda m, x, c: m.sample(3),
    }
    report = assert_same(ff, initialized(glow(), 0.05), calls, x, float32_only=("sample",))
    assert list(report.replaced.values()).count("GlowBlock") == 4 and not report.left_alone


def test_training_of_glow_coincides():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 8, 8).double()
    assert_trains_the_same(ff, glow(), lambda m: m.forward_kld(x), steps=20)


def test_hooks_in_glow_run():
    model, seen = initialized(flows.GlowBlock(4, 8)), []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: seen.append(type(m).__name__))
    ff.accelerate(model)
    model(torch.randn(2, 4, 4, 4))
    names = ["Split", "AffineCoupling", "Merge", "ActNorm", "Invertible1x1Conv", "ConvNet2d"]
    assert {*names} <= {*seen} and seen.count("Conv2d") == 3
