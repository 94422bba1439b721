"""Flows of zuko, accelerated in place: the same numbers and gradients."""

import copy
import importlib
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from tests.support.libraries import assert_same, assert_trains_the_same, randomized

zuko = pytest.importorskip("zuko")
pytest.importorskip("zuko.bayesian")
ff = importlib.import_module("fastflow.integrations.zuko")

CONTEXT = 3
SPLINE = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(5,), (5,), (4,)]}
CIRCULAR = SPLINE | {"univariate": zuko.flows.spline.CircularRQSTransform}
SMALL = {"hidden_features": (12, 12)}

BOTH = {
    "forward": lambda m, x, c: m(c).call_and_ladj(x),
    "inverse": lambda m, x, c: m(c).inv.call_and_ladj(x),
    "values": lambda m, x, c: (m(c)(x), m(c).inv(x), m(c).log_abs_det_jacobian(x, x)),
}
OF_FLOWS = {
    "log_prob": lambda m, x, c: (m(c).log_prob(x),),
    "rsample": lambda m, x, c: (m(c).rsample((2,)),),
    "rsample_and_log_prob": lambda m, x, c: m(c).rsample_and_log_prob((3,)),
    "inverse": lambda m, x, c: m(c).transform.inv.call_and_ladj(x),
}


def layer(name, features, context=None, **options):
    return randomized(getattr(zuko.flows, name)(features, context or 0, **SMALL | options))


def inputs(features, context=None, count=20, scale=1.5):
    return scale * torch.randn(count, features), None if context is None else torch.randn(count, context)


@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("univariate", [{}, SPLINE, CIRCULAR], ids=["affine", "spline", "circular"])
@pytest.mark.parametrize(
    "name, features, options",
    [
        ("MaskedAutoregressiveTransform", 5, {}),
        ("MaskedAutoregressiveTransform", 7, {"order": [3, 0, 6, 2, 5, 1, 4], "activation": nn.SiLU}),
        ("MaskedAutoregressiveTransform", 6, {"passes": 2}),
        ("MaskedAutoregressiveTransform", 7, {"passes": 3, "activation": nn.Tanh}),
        ("MaskedAutoregressiveTransform", 4, {"residual": True, "hidden_features": (10, 10, 14)}),
        ("MaskedAutoregressiveTransform", 4, {"hidden_features": (3,), "activation": nn.ELU}),
        ("MaskedAutoregressiveTransform", 4, {"activation": nn.GELU}),
        ("GeneralCouplingTransform", 5, {}),
        ("GeneralCouplingTransform", 4, {"mask": [1, 1, 0, 1], "normalize": True}),
        ("ElementWiseTransform", 3, {}),
        ("MaskedAutoregressiveTransform", 1, {}),
    ],
)
def test_layers(name, features, options, univariate, context):
    if name == "ElementWiseTransform" and context is None:
        options = {"hidden_features": ()}
    model = layer(name, features, context, **univariate | options)
    x, c = inputs(features, context)
    report = assert_same(ff, model, BOTH, x, c)
    assert (
        report.replaced[""] == ("ElementWiseTransform" if features == 1 else name) and not report.left_alone
    )


@pytest.mark.parametrize(
    "context, options", [(None, {}), (CONTEXT, {"residual": True, "activation": nn.ELU})]
)
def test_angles_take_one_pass(context, options, monkeypatch):
    model = layer("MaskedAutoregressiveTransform", 5, context, **CIRCULAR | options)
    x, c = 2 * math.pi * torch.rand(20, 5) - math.pi, None if context is None else torch.randn(20, context)
    assert_same(ff, model, BOTH, x, c)
    calls, forward = [], zuko.nn.MaskedLinear.forward
    monkeypatch.setattr(zuko.nn.MaskedLinear, "forward", lambda m, v: calls.append(m) or forward(m, v))
    ff.accelerate(model)
    model(c).inv(x)
    assert not calls  # one pass, in the op
    x[3, 2] = 3.2
    model(c).inv(x)
    assert len(calls) == 5 * sum(isinstance(m, zuko.nn.MaskedLinear) for m in model.modules())


@pytest.mark.parametrize("residual", [False, True])
def test_graphs(residual):
    torch.manual_seed(0)
    order = torch.randperm(6)
    adjacency = torch.tril(torch.rand(6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    adjacency[1:, 0] = True
    adjacency = adjacency[order][:, order]
    model = layer("MaskedAutoregressiveTransform", 6, adjacency=adjacency, residual=residual, **SPLINE)
    assert_same(ff, model, BOTH, inputs(6)[0])


@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize(
    "name, options",
    [
        ("MAF", {}),
        ("MAF", {"randperm": True, "transforms": 2}),
        ("NSF", {"bins": 4}),
        ("NSF", {"bins": 4, "passes": 2, "slope": 1e-2}),
        ("NCSF", {"bins": 4}),
        ("NICE", {}),
        ("RealNVP", {"univariate": partial(zuko.transforms.MonotonicAffineTransform, slope=0.1)}),
    ],
)
def test_flows(name, options, context):
    model = layer(name, 4, context, **options)
    x, c = inputs(4, context, scale=1.0)
    report = assert_same(ff, model, OF_FLOWS, x, c)
    assert len(report.replaced) == 1 + len(model.transform.transforms) and not report.left_alone


@pytest.mark.parametrize("name", ["MAF", "NSF", "RealNVP"])
@pytest.mark.parametrize("of_x, of_c", [((), (3,)), ((5,), (3,)), ((2, 5), (5, 3)), ((5,), (2, 1, 3))])
def test_shapes(name, of_x, of_c):
    model = layer(name, 4, CONTEXT)
    x, c = torch.randn(*of_x, 4), torch.randn(of_c)
    if name != "NSF" and len(of_c) > len(of_x) + 1:
        x = x.expand(2, 5, 4)  # zuko's own does not
    before = model(c).transform.call_and_ladj(x), model(c).transform.inv.call_and_ladj(x)
    ff.accelerate(model)
    after = model(c).transform.call_and_ladj(x), model(c).transform.inv.call_and_ladj(x)
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4)


def mixed():
    """Neighbors of different sizes, and transformations of other kinds between them."""
    flow, other = zuko.flows.MAF(4, CONTEXT, transforms=3, **SMALL), zuko.flows.NSF(4, CONTEXT, transforms=2)
    coupling = zuko.flows.RealNVP(4, CONTEXT, transforms=1, **SMALL).transform.transforms
    wider = zuko.flows.MAF(4, CONTEXT, transforms=1).transform.transforms
    rotation = zuko.lazy.UnconditionalTransform(zuko.transforms.RotationTransform, torch.randn(4, 4))
    parts = flow.transform.transforms
    parts = [*parts[:2], rotation, *coupling, *wider, parts[2], *other.transform.transforms]
    return randomized(zuko.lazy.Flow(parts, flow.base))


CHAINS = {
    "MAF": (lambda: layer("MAF", 4, CONTEXT), 1),
    "NSF": (lambda: layer("NSF", 4, CONTEXT, randperm=True, residual=True), 1),
    "NCSF": (lambda: layer("NCSF", 4, CONTEXT), 3),
    "mixed": (mixed, 5),
    "GELU": (lambda: layer("MAF", 4, CONTEXT, activation=nn.GELU), 0),
}


@pytest.mark.parametrize("of_c", [(), (5,), (2, 1)])
@pytest.mark.parametrize("name", CHAINS)
def test_samples_without_gradients_are_those_of_the_library(name, of_c, monkeypatch):
    build, calls_expected = CHAINS[name]
    torch.manual_seed(1)
    model, c = build().double(), torch.randn(*of_c, CONTEXT).double()
    calls, op = [], ff._layers.ops.masked_inverses
    monkeypatch.setattr(ff._layers.ops, "masked_inverses", lambda *a, **k: calls.append(a) or op(*a, **k))

    def found():
        torch.manual_seed(2)
        distribution = model(c)
        x = distribution.sample((3,))
        with torch.no_grad():
            return x, *distribution.rsample_and_log_prob(), distribution.transform.inv(x[0, ..., :4])

    expected = found()
    ff.accelerate(model)
    torch.testing.assert_close(found(), expected, rtol=1e-10, atol=1e-10)
    assert len(calls) == 3 * calls_expected
    with torch.no_grad():  # writes that change no version, and other parameters
        for p in model.parameters():
            p.data.mul_(0.9)
        model.transform.transforms[0].hyper[0].bias = nn.Parameter(
            torch.zeros(len(model.transform.transforms[0].hyper[0].bias)).double()
        )
    after = found()
    ff.revert(model)
    torch.testing.assert_close(after, found(), rtol=1e-10, atol=1e-10)


def test_flows_compile_without_graph_breaks():
    """zuko's own has one in its ``ComposedTransform``."""
    model = layer("MAF", 2, CONTEXT, transforms=1)
    x, c = inputs(2, CONTEXT, 4)
    ff.accelerate(model)

    def both():
        flow = model(c)
        return flow.log_prob(x), flow.transform.inv(x)

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, backend="eager")()
        torch.testing.assert_close(compiled, both(), rtol=2e-4, atol=2e-4)
    torch._dynamo.reset()


def test_a_composition_of_features_and_vectors_counts_dimensions_as_zuko():
    parts = [
        zuko.flows.MAF(3, **SMALL).transform.transforms[0],
        zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=9.0),
    ]
    for transforms in (parts, parts[::-1], parts[1:]):
        model = zuko.lazy.LazyComposedTransform(*transforms)
        x, found = torch.randn(5, 3).clamp(-1, 1), []
        for accelerate in (lambda m: m, ff.accelerate):
            accelerate(model)
            t = model()
            dims = [t.domain_dim, t.codomain_dim, t.inv.domain_dim, t.inv.codomain_dim, t.domain.event_dim]
            found.append([torch.tensor(dims), *t.call_and_ladj(x), *t.inv.call_and_ladj(x)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_hook_ends_a_chain():
    model = layer("NSF", 4)
    z = torch.randn(3, 4)
    with torch.no_grad():
        expected = model().transform.inv.call_and_ladj(z)
        ff.accelerate(model)
        seen = []
        model.transform.transforms[1].hyper[2].register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model().transform.inv.call_and_ladj(z), expected, rtol=2e-4, atol=2e-4)
        assert len(seen) == 4  # a pass for each feature of the layer with a hook


@pytest.mark.parametrize("name", ["MAF", "NSF", "RealNVP"])
def test_training_coincides(name):
    torch.manual_seed(0)
    x, c = torch.randn(64, 4).double(), torch.randn(64, CONTEXT).double()
    model = getattr(zuko.flows, name)(4, CONTEXT, **SMALL)
    assert_trains_the_same(ff, model, lambda m: -m(c).log_prob(x).mean())


def test_training_by_samples_coincides():
    torch.manual_seed(0)
    z = torch.randn(64, 4).double()

    def loss(m):
        x, ladj = m().transform.inv.call_and_ladj(z)
        return ((x - 1).square().sum(1) - ladj).mean()

    assert_trains_the_same(ff, zuko.flows.NSF(4, **SMALL), loss)


def test_the_inverse_calls_no_network_and_follows_loaded_orders():
    model, other = layer("NSF", 6, randperm=True), layer("NSF", 6, randperm=True)
    ff.accelerate(model)
    x = torch.randn(8, 6)
    calls = []
    forward = zuko.nn.MaskedMLP.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zuko.nn.MaskedMLP, "forward", lambda m, v: calls.append(m) or forward(m, v))
        model().transform.inv(x)
        assert not calls
        model().transform(x)
        assert len(calls) == 3
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model().transform.inv(x), other().transform.inv(x), rtol=2e-4, atol=2e-4)


def test_hooks_run_in_each_pass():
    model, seen = layer("MAF", 4), []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: seen.append(type(m).__name__))
    ff.accelerate(model)
    model().transform(torch.randn(3, 4))
    assert seen.count("MaskedAutoregressiveTransform") == 3 and seen.count("MaskedLinear") == 3 * 3
    seen.clear()
    model().transform.inv(torch.randn(3, 4))
    assert seen.count("MaskedLinear") == 3 * 3 * 4


@pytest.mark.parametrize("local_trick", [False, True])
def test_bayesian_models(local_trick):
    """zuko's context replaces parameters, or the forward function of each layer."""
    model = zuko.bayesian.BayesianModel(layer("MAF", 3))
    report = ff.accelerate(model)
    assert len(report.replaced) == 4
    x = torch.randn(10, 3)
    with model.reparameterize(local_trick=local_trick) as flow:
        transform = flow().transform
        torch.testing.assert_close(transform.inv(transform(x)), x, rtol=2e-4, atol=2e-4)


def test_parametrized_networks():
    model = layer("NSF", 3)
    for part in model.transform.transforms:
        torch.nn.utils.parametrizations.weight_norm(part.hyper[0])
    ff.accelerate(model)
    x = torch.randn(10, 3)
    transform = model().transform
    torch.testing.assert_close(transform.inv(transform(x)), x, rtol=2e-4, atol=2e-4)


def test_what_is_left_alone_is_named():
    class Own(zuko.flows.MaskedAutoregressiveTransform):
        pass

    parts = [
        Own(4),
        zuko.flows.MaskedAutoregressiveTransform(
            4, univariate=zuko.transforms.AdditiveTransform, shapes=[()]
        ),
        zuko.flows.GF(4).transform.transforms[0],
        zuko.flows.MaskedAutoregressiveTransform(4),
    ]
    model = zuko.lazy.Flow(parts, zuko.flows.MAF(4).base)
    report = ff.accelerate(model)
    assert report.left_alone["transform.transforms.0"] == ("Own", "a subclass of a layer that is covered")
    assert report.left_alone["transform.transforms.1"][1] == "univariate AdditiveTransform"
    assert report.left_alone["transform.transforms.2"][1] == "univariate GaussianizationTransform"
    assert report.replaced == {
        "transform": "LazyComposedTransform",
        "transform.transforms.3": "MaskedAutoregressiveTransform",
    }
    assert ff.accelerate(model) == report
    assert "   1 FFJTransform: left alone, not covered" in str(ff.accelerate(zuko.flows.CNF(3)))
    with pytest.raises(ValueError, match="model: got dict, expected a module"):
        ff.accelerate({})


def test_a_univariate_that_was_replaced_later_is_named():
    model = layer("MaskedAutoregressiveTransform", 4)
    ff.accelerate(model)
    model.univariate = zuko.transforms.AdditiveTransform
    with pytest.raises(
        ValueError, match="univariate: got .*AdditiveTransform.*, expected one that the ops have"
    ):
        model()(torch.randn(2, 4))


def test_distributions_and_representations_are_those_of_zuko():
    model = layer("NSF", 4)
    text = repr(model), repr(model().transform.inv).replace("\n", "")
    ff.accelerate(model)
    assert (repr(model), repr(model().transform.inv).replace("\n", "")) != ("", "")
    assert repr(model) == text[0]
    transform = model().transform
    assert isinstance(transform, zuko.transforms.ComposedTransform)
    assert isinstance(transform.inv, zuko.transforms.ComposedTransform)
    assert isinstance(transform.transforms[0], zuko.transforms.AutoregressiveTransform)
    inner = transform.transforms[0].meta(torch.zeros(4))
    assert isinstance(inner, zuko.transforms.DependentTransform) and inner.domain.event_dim == 1
    assert isinstance(inner.base, zuko.transforms.MonotonicRQSTransform)
    assert transform.inv.inv.transforms[0] is transform.transforms[0]
    assert pickle.loads(pickle.dumps(model))().log_prob(torch.zeros(4)).isfinite()


@pytest.mark.parametrize("shape, of_x", [((), (6,)), ((5,), (3, 5)), ((2, 5), (5,)), ((3, 1), (4, 3, 5))])
def test_splines_alone(shape, of_x):
    torch.manual_seed(0)
    raw = [torch.randn(*shape, n).double().requires_grad_() for n in (6, 6, 5)]
    x = (2 * torch.randn(of_x).double()).requires_grad_()
    results = []
    for c in (zuko.transforms.MonotonicRQSTransform, ff.MonotonicRQSTransform):
        t = c(*raw, bound=3.0, slope=1e-2)
        values = *t.call_and_ladj(x), *t.inv.call_and_ladj(x), t(x), t.inv(x), t.log_abs_det_jacobian(x, x)
        total = sum((v * torch.linspace(-1, 1, v.numel()).to(v).view(v.shape)).sum() for v in values)
        results.append([*values, *torch.autograd.grad(total, [x, *raw])])
        assert t.bins == 6 and t.horizontal.shape[-1] == t.vertical.shape[-1] == t.derivatives.shape[-1] == 7
        assert repr(t) == "MonotonicRQSTransform(bins=6)"
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_ends_of_the_interval():
    """zuko's first bin is open below; at the upper end its last knot may be rounded below the bound."""
    raw = [torch.randn(50, n) for n in (8, 8, 7)]
    theirs, ours = zuko.transforms.MonotonicRQSTransform(*raw), ff.MonotonicRQSTransform(*raw)
    for x in (-5.0, 5.0):
        for t in (ours, theirs):
            y, ladj = t.call_and_ladj(torch.full((50,), x))
            torch.testing.assert_close(y, torch.full((50,), x), rtol=0, atol=4e-6)
            torch.testing.assert_close(ladj, torch.zeros(50), rtol=0, atol=2e-3)
    y, ladj = ours.call_and_ladj(torch.full((50,), -5.0))
    assert (y == -5).all() and (ladj == 0).all()


def test_extreme_parameters_are_finite_where_the_library_fails():
    torch.manual_seed(0)
    raw = [14 * torch.randn(50000, n) for n in (8, 8, 7)]
    theirs, ours = zuko.transforms.MonotonicRQSTransform(*raw), ff.MonotonicRQSTransform(*raw)
    y = theirs(6 * torch.rand(50000) - 3)
    assert theirs.inv(y).isnan().any()  # the square root of a negative number
    assert ours.inv(y).isfinite().all()


@pytest.mark.parametrize("name", ["NSF", "NCSF", "GF"])
def test_files_of_older_releases(name):
    flow = getattr(zuko.flows, name)(3)
    old = {
        key.replace("base.loc", "base._0")
        .replace("base.scale", "base._1")
        .replace("base.lower", "base._0")
        .replace("base.upper", "base._1")
        .replace("1.A", "1._0")
        .replace("3.A", "3._0"): value.clone()
        for key, value in flow.state_dict().items()
    }
    other = getattr(zuko.flows, name)(3)
    ff.accelerate(other)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(old)
    other.load_state_dict(ff.renamed_state(other, old))
    x = torch.rand(5, 3)
    torch.testing.assert_close(other().log_prob(x), flow().log_prob(x))
    assert ff.renamed_state(other, flow.state_dict()).keys() == flow.state_dict().keys()


@pytest.mark.parametrize("inverse", [False, True])
def test_derivatives_of_derivatives_and_vmap(inverse):
    model = layer("NSF", 3).double()
    before = copy.deepcopy(model)
    ff.accelerate(model)
    x = torch.randn(4, 3).double()

    def value(m, v):
        return m().transform.inv(v).square().sum(-1) if inverse else m().log_prob(v)

    hessians = [
        torch.autograd.functional.hessian(lambda v, m=m: value(m, v).sum(), x) for m in (before, model)
    ]
    torch.testing.assert_close(*hessians, rtol=1e-8, atol=1e-8)
    scores = [torch.func.vmap(torch.func.grad(lambda v, m=m: value(m, v)))(x) for m in (before, model)]
    torch.testing.assert_close(*scores, rtol=1e-8, atol=1e-8)


def test_circles_stay_on_the_circle():
    model = layer("NCSF", 3)
    ff.accelerate(model)
    x = model().sample((50,))
    assert (x.abs() <= math.pi).all()
