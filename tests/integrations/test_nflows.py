"""Flows of nflows and of its fork glasflow.nflows, accelerated in place: the same numbers and gradients."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastflow.integrations import nflows_layers
from tests.support.libraries import assert_same, assert_trains_the_same, passes, randomized

PACKAGES = {"nflows": "nflows", "glasflow": "glasflow.nflows"}
CONTEXT = 3


@pytest.fixture(params=PACKAGES)
def library(request):
    """The integration, and modules of the package that it accelerates."""
    package = PACKAGES[request.param]
    pytest.importorskip(package)
    return Library(importlib.import_module(f"fastflow.integrations.{request.param}"), package)


class Library:
    def __init__(self, ff, package):
        self.ff = ff
        for name in ("transforms", "flows", "distributions", "nn.nets"):
            setattr(self, name.replace(".", "_"), importlib.import_module(f"{package}.{name}"))

    def residual(self, context=CONTEXT, **options):
        options = {"hidden_features": 8, "context_features": context, "num_blocks": 2} | options
        return lambda inputs, outputs: self.nn_nets.ResidualNet(inputs, outputs, **options)

    def coupling(self, mask, context=CONTEXT, net=None, **options):
        options = {"num_bins": 5, "tails": "linear", "tail_bound": 2.0} | options
        make = net or self.residual(context)
        return self.transforms.PiecewiseRationalQuadraticCouplingTransform(mask, make, **options)

    def flow(self, features, context=CONTEXT, steps=3, **options):
        parts = []
        for i in range(steps):
            mask = [(i + j) % 2 for j in range(features)]
            parts += [self.coupling(mask, context, **options), self.transforms.LULinear(features)]
            parts.append(self.transforms.RandomPermutation(features))
        transform = self.transforms.CompositeTransform(parts)
        return self.flows.Flow(transform, self.distributions.StandardNormal([features]))


BOTH = {
    "forward": lambda m, x, c: m(x, c),
    "inverse": lambda m, x, c: m.inverse(x, c),
}


@pytest.mark.parametrize(
    "mask, context, options",
    [
        ([0, 0, 1, 1], CONTEXT, {}),
        ([1, 0, 1, 0, 1], None, {"num_bins": 1}),
        ([0, 1], CONTEXT, {"tails": None, "num_bins": 3}),
        ([1, 0, 0], None, {"apply_unconditional_transform": True, "min_derivative": 0.02}),
        ([0, 1, 1], CONTEXT, {"apply_unconditional_transform": True, "tails": None}),
        ([0, 1, 1], None, {"min_bin_width": 0.01, "min_bin_height": 0.01, "tail_bound": 5}),
        ([1, 0, 1], None, {"num_bins": 70}),
    ],
)
def test_spline_couplings(library, mask, context, options):
    model = randomized(library.coupling(mask, context, **options))
    x = (
        torch.rand(20, len(mask))
        if options.get("tails", "linear") is None
        else 2 * torch.randn(20, len(mask))
    )
    c = None if context is None else torch.randn(20, context)
    report = assert_same(library.ff, model, BOTH, x, c)
    assert report.replaced[""] == "PiecewiseRationalQuadraticCouplingTransform"


@pytest.mark.parametrize("unconditional", [False, True])
def test_spline_couplings_of_images(library, unconditional):
    def net(inputs, outputs):
        return library.nn_nets.ConvResidualNet(inputs, outputs, hidden_channels=6, num_blocks=1)

    options = {"apply_unconditional_transform": unconditional, "img_shape": [3, 2]}
    model = randomized(library.coupling([1, 0, 1], net=net, **options))
    x = torch.randn(4, 3, 3, 2)
    report = assert_same(library.ff, model, BOTH, x)
    assert report.replaced[""] == "PiecewiseRationalQuadraticCouplingTransform"


@pytest.mark.parametrize("shape, tails", [([4], "linear"), (3, None), ([2, 3, 2], "linear")])
def test_splines_that_samples_share(library, shape, tails):
    model = library.transforms.PiecewiseRationalQuadraticCDF(shape, num_bins=4, tails=tails, tail_bound=1.5)
    size = shape if isinstance(shape, list) else [shape]
    x = torch.rand(10, *size) if tails is None else 2 * torch.randn(10, *size)
    assert_same(library.ff, randomized(model), BOTH, x)


@pytest.mark.parametrize("features", [1, 2, 6])
def test_linear_maps_alone_and_in_a_chain(library, features):
    layers = [library.transforms.LULinear(features, identity_init=False) for _ in range(3)]
    x = torch.randn(7, features)
    assert_same(library.ff, randomized(layers[0]), BOTH, x)
    chain = library.transforms.CompositeTransform([*layers, library.transforms.LULinear(features, eps=0.1)])
    assert_same(library.ff, randomized(chain), BOTH, x)


@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_flows(library, context, batch_norm):
    net = library.residual(context, use_batch_norm=batch_norm)
    model = randomized(library.flow(5, context, net=net))
    calls = {
        "log_prob": lambda m, x, c: (m.log_prob(x, c),),
        "sample": lambda m, x, c: (m.eval().sample(1 if c is not None else 4, c),),
        "sample_and_log_prob": lambda m, x, c: m.eval().sample_and_log_prob(2 if c is not None else 4, c),
    }
    c = None if context is None else torch.randn(6, context)
    # nflows draws float32
    report = assert_same(
        library.ff, model, calls, 1.5 * torch.randn(6, 5), c, ("sample", "sample_and_log_prob")
    )
    names = list(report.replaced.values())
    assert names.count("PiecewiseRationalQuadraticCouplingTransform") == names.count("LULinear") == 3
    assert "CompositeTransform" in names


AFFINE, SPLINE = (
    "MaskedAffineAutoregressiveTransform",
    "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context_features": CONTEXT},
        {"use_residual_blocks": False, "activation": torch.tanh, "context_features": CONTEXT},
        {"use_residual_blocks": False, "random_mask": True, "activation": F.elu},
        {"num_blocks": 0, "context_features": CONTEXT, "activation": nn.SiLU()},
        {"num_blocks": 0, "use_residual_blocks": False},
    ],
)
@pytest.mark.parametrize(
    "name, form",
    [
        (AFFINE, {}),
        (SPLINE, {"num_bins": 4, "tails": "linear", "tail_bound": 2.0}),
        (SPLINE, {"num_bins": 3, "tails": None, "min_derivative": 0.01}),
    ],
)
def test_autoregressive_layers(library, name, form, options, features):
    if features == 1 and options.get("random_mask"):
        options = options | {"random_mask": False}
    model = randomized(getattr(library.transforms, name)(features, 9, **form, **options))
    x = torch.rand(20, features) if form.get("tails", "") is None else 2 * torch.randn(20, features)
    c = torch.randn(20, CONTEXT) if "context_features" in options else None
    # the affine layer of glasflow holds a lambda
    pickles = name == SPLINE or not hasattr(model, "scale_activation")
    report = assert_same(library.ff, model, BOTH, x, c, pickles=pickles)
    assert report.replaced[""] == name
    library.ff.accelerate(model)
    assert passes(model, lambda: model.inverse(x, c)) == 0  # one, in the op
    assert passes(model, lambda: model(x, c)) == 1


def test_autoregressive_layers_read_weights_anew(library):
    layers = [library.transforms.MaskedAffineAutoregressiveTransform(3, 8) for _ in range(2)]
    library.ff.accelerate(layers[1])
    x = torch.randn(4, 3)
    with torch.no_grad():
        layers[1].inverse(x)
        for p, other in zip(layers[1].parameters(), layers[0].parameters(), strict=True):
            p.data.copy_(other)  # changes no version
        torch.testing.assert_close(layers[1].inverse(x), layers[0].inverse(x))


@pytest.mark.parametrize("name, form", [(AFFINE, {}), (SPLINE, {"tails": "linear"})])
def test_autoregressive_layers_whose_inverse_takes_each_pass(library, name, form):
    def counted(change=lambda m: m, **options):
        model = getattr(library.transforms, name)(3, 8, **form, **options)
        library.ff.accelerate(model)
        change(model)
        return passes(model, lambda: model.inverse(torch.randn(2, 3)))

    def hook(model):
        model.autoregressive_net.final_layer.register_forward_hook(lambda *args: None)

    assert counted() == 0
    assert counted(use_batch_norm=True, change=lambda m: m.eval()) == 3
    assert counted(activation=torch.sin) == 3
    assert counted(dropout_probability=0.5) == 3
    assert counted(dropout_probability=0.5, change=lambda m: m.eval()) == 0
    assert counted(change=hook) == 3
    report = library.ff.accelerate(getattr(library.transforms, AFFINE)(3, 8, use_batch_norm=True))
    assert report.left_alone[""] == (AFFINE, "batch norm in its network")


def test_autoregressive_training_and_new_weights(library):
    torch.manual_seed(0)
    names = ((AFFINE, {}), (SPLINE, {"num_bins": 3, "tails": "linear"}))
    parts = [getattr(library.transforms, name)(4, 8, context_features=CONTEXT, **f) for name, f in names]
    transform = library.transforms.CompositeTransform(parts)
    model = library.flows.Flow(transform, library.distributions.StandardNormal([4]))
    x, c = torch.randn(64, 4).double(), torch.randn(64, CONTEXT).double()

    def loss(m):
        latents = m._transform(x, c)[0]
        with torch.no_grad():  # weights that are kept follow the steps of the optimizer
            back = m._transform.inverse(latents, c)[0]
        assert (back - x).abs().max() < 1e-6
        return -m.log_prob(x, c).mean() + m._transform.inverse(x, c)[0].square().mean()

    assert_trains_the_same(library.ff, model, loss)


def test_own_scales_and_networks_are_left_alone(library):
    layer = library.transforms.MaskedAffineAutoregressiveTransform(3, 8)
    layer.scale_activation = torch.exp
    assert library.ff.accelerate(layer).left_alone[""][1] == "scale_activation"
    layer = library.transforms.MaskedAffineAutoregressiveTransform(3, 8)

    class Own(type(layer.autoregressive_net)):
        pass

    layer.autoregressive_net.__class__ = Own
    assert library.ff.accelerate(layer).left_alone[""][1] == "its network is of the class Own"


COUPLINGS = {
    "AffineCouplingTransform": {},
    "AdditiveCouplingTransform": {},
    "PiecewiseLinearCouplingTransform": {"tails": "linear", "tail_bound": 2.0, "num_bins": 4},
    "PiecewiseQuadraticCouplingTransform": {"tails": "linear", "tail_bound": 2.0, "num_bins": 4},
}


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("unconditional", [False, True])
@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings(library, name, unconditional, images):
    def net(inputs, outputs):
        if images:
            return library.nn_nets.ConvResidualNet(inputs, outputs, hidden_channels=6, num_blocks=1)
        return library.residual()(inputs, outputs)

    options = COUPLINGS[name]
    if unconditional and "Affine" not in name and "Additive" not in name:
        options = options | {"apply_unconditional_transform": True, "img_shape": [3, 2] if images else None}
    elif unconditional:
        options = {"unconditional_transform": lambda features: library.transforms.ActNorm(features)}
    model = randomized(getattr(library.transforms, name)([1, 0, 0, 1], net, **options)).eval()
    x = torch.randn(5, 4, 3, 2) if images else torch.randn(20, 4)
    c = None if images else torch.randn(20, CONTEXT)
    pickles = not hasattr(model, "scale_activation")  # of glasflow, a lambda
    report = assert_same(library.ff, model, BOTH, x, c, pickles=pickles)
    assert report.replaced[""] == name
    library.ff.accelerate(model)
    with pytest.raises(ValueError, match="Expected features = 4, got 3"):
        model(x[:, 1:], c)


@pytest.mark.parametrize("features", [1, 2, 5])
def test_convolutions(library, features):
    model = randomized(library.transforms.OneByOneConvolution(features, identity_init=False))
    report = assert_same(library.ff, model, BOTH, torch.randn(3, features, 4, 2))
    assert report.replaced == {"": "OneByOneConvolution"}
    library.ff.accelerate(model)
    with pytest.raises(ValueError, match="4D"):
        model(torch.randn(3, features))


@pytest.mark.parametrize("by_op", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 5), (1, 2, 2)])
def test_actnorm(library, shape, by_op, monkeypatch):
    monkeypatch.setattr(nflows_layers, "pays_for_small_ops", lambda z: by_op)
    x = 1 + 2 * torch.randn(6, *shape)
    model = randomized(library.transforms.ActNorm(shape[0]))
    report = assert_same(library.ff, model.eval(), BOTH, x)
    assert report.replaced == {"": "ActNorm"}
    layers = [library.transforms.ActNorm(shape[0]) for _ in range(2)]
    library.ff.accelerate(layers[1])
    empty = library.transforms.ActNorm(shape[0]).state_dict()
    for batch in (x, 3 * x):  # the first one initializes, also after a state dict of the start
        for _ in range(2):
            torch.testing.assert_close(layers[1](batch), layers[0](batch))
            torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())
        for layer in layers:
            layer.load_state_dict(empty)


@pytest.mark.parametrize("name, shape", [("LULinear", (6, 4)), ("OneByOneConvolution", (6, 4, 2, 3))])
def test_layers_that_keep_their_matrices(library, name, shape):
    """As in nessai. In training they keep none; then they are the library's, and so are those that are kept."""
    make, x = getattr(library.transforms, name), torch.randn(shape)
    layers = [make(4, using_cache=True, identity_init=False) for _ in range(2)]
    before = randomized(library.transforms.CompositeTransform(layers))
    report = assert_same(library.ff, before, BOTH, x)
    assert list(report.replaced.values()) == ["CompositeTransform", name, name]
    after = copy.deepcopy(before)
    library.ff.accelerate(after, reversible=True)
    for training in (False, True, False):
        for call in BOTH.values():
            wanted, found = (call(m.train(training), x, None) for m in (before, after))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(m(x)[0].sum(), list(m.parameters())) for m in (before, after)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        for layer, kept in zip(before._transforms, after._transforms, strict=True):
            assert (layer.cache.weight is None) == training
            torch.testing.assert_close(vars(kept.cache), vars(layer.cache), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for m in (before, after):
                m._transforms[0].bias.add_(1)


def test_batch_norm(library):
    x = 3 + 2 * torch.randn(20, 3)
    model = randomized(library.transforms.BatchNorm(3))
    report = assert_same(library.ff, model, {"forward": BOTH["forward"]}, x)
    assert report.replaced == {"": "BatchNorm"}
    faster = copy.deepcopy(model)
    library.ff.accelerate(faster)
    for _ in range(3):
        for m in (model, faster):
            m(x)
    torch.testing.assert_close(faster.state_dict(), model.state_dict())
    assert_same(library.ff, model.eval(), BOTH, x)
    for wrong in (lambda m: m(x[:, :, None]), lambda m: m.train().inverse(x)):
        errors = []
        for m in (model, faster):
            with pytest.raises(Exception) as error:  # noqa: PT011
                wrong(m)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


def test_training_coincides(library):
    torch.manual_seed(0)
    x, c = torch.randn(64, 4).double(), torch.randn(64, CONTEXT).double()
    assert_trains_the_same(library.ff, library.flow(4), lambda m: -m.log_prob(x, c).mean())


def test_what_is_left_alone_is_named(library):
    class Own(library.transforms.LULinear):
        pass

    parts = [
        Own(4),
        library.transforms.SVDLinear(4, 2),
        library.coupling([0, 0, 1, 1], min_bin_width=0.1),
        library.transforms.HouseholderSequence(4, 2),
        library.transforms.RandomPermutation(4),
    ]
    model = library.transforms.CompositeTransform(parts)
    report = library.ff.accelerate(model)
    assert report.left_alone["_transforms.0"] == ("Own", "a subclass of a layer that is covered")
    assert report.left_alone["_transforms.1"] == ("SVDLinear", "not covered")
    assert report.left_alone["_transforms.2"][1] == "min_bin_width and min_bin_height differ"
    assert report.left_alone["_transforms.3"] == ("HouseholderSequence", "not covered")
    assert "_transforms.4" not in report.left_alone  # a permutation cannot be faster
    assert type(parts[1]).__module__.startswith(type(parts[4]).__module__.split(".transforms")[0])
    assert "SVDLinear: left alone, not covered" in str(report)
    assert "CompositeTransform: replaced" in str(report)
    assert str(library.ff.accelerate(nn.Linear(2, 2))) == "nothing to replace was found"
    again = library.ff.accelerate(model)
    assert again == report


def test_networks_of_masked_layers_are_not_named(library):
    report = library.ff.accelerate(library.transforms.MaskedAffineAutoregressiveTransform(3, 8))
    assert list(report.replaced) == [""] and not report.left_alone


def test_hooks_run(library):
    model, seen = library.flow(4), []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: seen.append(type(m).__name__))
    library.ff.accelerate(model)
    model.log_prob(torch.randn(3, 4), torch.randn(3, CONTEXT))
    assert seen.count("LULinear") == seen.count("PiecewiseRationalQuadraticCouplingTransform") == 3
    assert seen.count("ResidualBlock") == 6 and seen.count("Linear") == 3 * (2 + 2 * 3)


def test_errors_are_those_of_the_library(library):
    coupling = library.coupling([0, 1, 1], None, tails=None)
    library.ff.accelerate(coupling)
    with pytest.raises(ValueError, match="Expected features = 3, got 2"):
        coupling(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="must be a 2D or a 4D tensor"):
        coupling.inverse(torch.zeros(2, 3, 1))
    with pytest.raises(library.transforms.InputOutsideDomain):
        coupling(torch.full((2, 3), 1.5))
    with pytest.raises(ValueError, match="model: got dict, expected a module"):
        library.ff.accelerate({})


def test_extreme_parameters_are_finite_where_the_library_fails(library):
    """nflows asserts that its discriminant is not negative; rounding makes it negative."""
    torch.manual_seed(0)
    model = library.coupling([0, 1], None, num_bins=8)
    with torch.no_grad():
        for p in model.transform_net.final_layer.parameters():
            p.mul_(200)
    library.ff.accelerate(model)
    z = torch.linspace(-2, 2, 4000)[:, None].expand(-1, 2) * torch.tensor([1.0, 0.999])
    x, log_det = model.inverse(z)
    assert x.isfinite().all() and log_det.isfinite().all()


def test_couplings_compile_without_graph_breaks(library):
    """nflows' own has 12 graph breaks for each coupling; the graph grows by the same part with each step."""
    torch.manual_seed(0)
    model, x, c = library.flow(4, steps=1), torch.randn(6, 4), torch.randn(6, CONTEXT)
    wanted = _log_prob_and_gradients(model.log_prob, model, x, c)
    library.ff.accelerate(model)
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_log_prob_and_gradients(compiled, model, x, c), wanted, rtol=2e-4, atol=2e-4)
    latents = torch.randn(6, 4)
    invert = torch.compile(model._transform.inverse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(invert(latents, c), model._transform.inverse(latents, c))


def _log_prob_and_gradients(log_prob, model, x, c):
    values = log_prob(x, c)
    return [values.detach(), *torch.autograd.grad(values.sum(), list(model.parameters()))]
