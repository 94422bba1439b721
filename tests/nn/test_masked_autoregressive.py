"""MaskedAutoregressive: both directions against D passes and other libraries, its passes, dropout, compilation, errors."""

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import autoregressive_libraries
from fastflow import nn as fnn
from fastflow.nn import MaskedAutoregressive, MaskedNetwork
from tests.support.cases import jacobian_log_det, name, pairwise, randomize

F64 = torch.float64
FORMS = {
    "affine": {},
    "affine, exp": {"scale": "exp", "affine_order": "shift_first"},
    "affine, sigmoid": {"scale": "sigmoid", "params_layout": "shift_scale"},
    "affine, normflows": {"scale": "sigmoid", "offset": 1e-3},
    "affine, nflows": {"scale": "softplus", "offset": 1e-3},
    "affine, zuko": {"scale": "soft_clip", "params_layout": "shift_scale", "factor": 6.9},
    "affine, tanh": {"scale": "tanh", "factor": 0.7},
    "spline": {"bins": 4, "bound": 2.5},
    "spline, circular": {"bins": 3, "tails": "circular", "bound": 4.0},
    "spline, none": {"bins": 3, "tails": "none"},
    "spline, nflows": {"bins": 5, "convention": "nflows"},
    "spline, zuko": {"bins": 5, "convention": "zuko", "bound": 5.0},
    "spline, freia": {"bins": 3, "convention": "freia", "tails": "affine", "min_bin": 0.1},
}


def layer(features, form="affine", hidden=(8, 7), std=0.4, **options) -> MaskedAutoregressive:
    transformer, kwargs = form.split(",")[0], FORMS[form]
    each = MaskedAutoregressive.params_per_feature(transformer, **kwargs)
    net = MaskedNetwork(features, each, hidden, **options)
    return randomize(MaskedAutoregressive(net, transformer, **kwargs), std=std).double().eval()


def in_passes(flow: MaskedAutoregressive, z, context=None):
    return flow._in_passes(z, context, None)


CASES = pairwise(
    features=[1, 2, 6],
    form=list(FORMS),
    hidden=[(2, 3), (9, 5, 12)],
    residual=[False, True],
    context=[None, 3],
    mode=["add", "glu"],
    order=[None, "random"],
    activation=["relu", "tanh", "silu", "elu"],
)


def drawn(case, **more):
    torch.manual_seed(0)
    flow = layer(
        case["features"],
        case["form"],
        case["hidden"],
        residual=case["residual"],
        context_features=case["context"],
        context_mode=case["mode"],
        order=case["order"],
        activation=case["activation"],
        **more,
    )
    x = 1.5 * torch.randn(5, case["features"], dtype=F64)
    context = None if case["context"] is None else torch.randn(5, case["context"], dtype=F64)
    return flow, x, context


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_inverse_is_that_of_d_passes(case):
    flow, z, context = drawn(case)
    with torch.no_grad():
        found, expected = flow.inverse(z, context), in_passes(flow, z, context)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    again, log_det = flow(found[0], context)
    torch.testing.assert_close((again, -log_det), (z, found[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_gradients_of_the_inverse_are_those_of_d_passes(case):
    flow, z, context = drawn(case)
    wanted = [z.requires_grad_(), *flow.parameters()]
    if context is not None:
        wanted.append(context.requires_grad_())
    weights = torch.randn(5, case["features"], dtype=F64), torch.randn(5, dtype=F64)

    def gradients(x, log_det):
        loss = (weights[0] * x).sum() + (weights[1] * log_det).sum()
        return torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)

    found, expected = gradients(*flow.inverse(z, context)), gradients(*in_passes(flow, z, context))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inverse", [False, True])
def test_check(form, inverse):
    torch.manual_seed(1)
    flow = layer(3, form, residual=True, context_features=2, activation="silu", order="random")
    (fnn.Inverse(flow) if inverse else flow).check(
        torch.randn(4, 3), torch.randn(4, 2), gradient_tolerance=1e-4 if "freia" in form else 1e-5
    )


@pytest.mark.parametrize("form", ["affine", "spline, circular"])
def test_gradcheck_of_both_directions(form):
    torch.manual_seed(0)
    flow = layer(3, form, (5,), context_features=1, activation="tanh")
    v = torch.randn(3, 3, dtype=F64, requires_grad=True)
    context = torch.randn(3, 1, dtype=F64, requires_grad=True)
    for direction in (flow.forward, flow.inverse):
        assert torch.autograd.gradcheck(direction, (v, context))
        assert torch.autograd.gradgradcheck(direction, (v, context))


@pytest.mark.parametrize(
    "form", ["affine", "affine, exp", "affine, zuko", "spline", "spline, zuko", "spline, circular"]
)
def test_it_starts_as_the_identity(form):
    flow = MaskedAutoregressive(
        MaskedNetwork(4, MaskedAutoregressive.params_per_feature(form.split(",")[0], **FORMS[form]), (6,)),
        form.split(",")[0],
        **FORMS[form],
    )
    x = torch.randn(20, 4)
    for y, log_det in (flow(x), flow.inverse(x)):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_det, torch.zeros(20), rtol=0, atol=1e-5)


class Calls(TorchDispatchMode):
    """Counts the calls of FastFlow's ops, and matrix products."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.partition("::")[2]] += 1
        return func(*args, **kwargs or {})


def test_one_pass_or_d():
    flow, z = layer(6, "spline"), torch.randn(5, 6, dtype=F64)
    with torch.no_grad(), Calls() as one:
        flow.inverse(z)
    assert one.calls["masked_inverse"] == 1 and not one.calls["spline"]
    assert repr(flow).startswith(
        "MaskedAutoregressive(\n  'spline', bins=4, bound=2.5, inverse in one pass\n"
    )
    flow.net.register_forward_hook(lambda *_: None)
    with torch.no_grad(), Calls() as many:
        flow.inverse(z)
    assert many.calls["spline"] == 6 and not many.calls["masked_inverse"]
    assert "inverse in D passes: net has hooks" in repr(flow)
    own = MaskedAutoregressive(nn.Sequential(MaskedNetwork(2, 3, (4,))), fnn.PiecewiseLinear(3))
    assert "inverse in D passes: net is a Sequential" in repr(own)
    own = MaskedAutoregressive(MaskedNetwork(2, 3, (4,)), fnn.PiecewiseLinear(3))
    assert "inverse in D passes: transformer is a PiecewiseLinear" in repr(own)
    dropping = MaskedAutoregressive(MaskedNetwork(2, 2, (4,), dropout=0.5), scale="exp")
    assert "'affine', scale='exp', inverse in D passes: dropout is active" in repr(dropping)
    assert "inverse in one pass" in repr(dropping.eval())


class Subclass(MaskedNetwork):
    def forward(self, x, context=None):
        return 2 * super().forward(x, context)


def test_a_subclass_of_the_network_is_not_taken_for_it():
    flow = randomize(MaskedAutoregressive(Subclass(4, 2, (8,)))).double()
    x = torch.randn(5, 4, dtype=F64)
    z, _ = flow(x)
    torch.testing.assert_close(flow.inverse(z)[0], x, rtol=1e-9, atol=1e-9)
    assert "net is a Subclass" in repr(flow)


@pytest.mark.parametrize(
    "transformer", [fnn.PiecewiseLinear(3, bound=2.0), fnn.PiecewiseQuadratic(3, bound=2.0)]
)
def test_transformers_of_couplings(transformer):
    torch.manual_seed(0)
    each = transformer.params_per_element
    flow = randomize(
        MaskedAutoregressive(MaskedNetwork(3, each, (7,), activation="tanh"), transformer), std=0.4
    )
    flow.check(torch.randn(4, 3))
    # one feature of a coupling with the parameters of that feature
    flow = flow.double()
    x = torch.randn(4, 3, dtype=F64)
    params = flow.net(x).view(4, 3, each)
    columns = [transformer(x[:, k : k + 1], params[:, k]) for k in range(3)]
    z, log_det = flow(x)
    torch.testing.assert_close(z, torch.cat([c for c, _ in columns], 1))
    torch.testing.assert_close(log_det, sum(part for _, part in columns))


def test_values_that_overflow_before_their_turn():
    """Of the D passes: features that have no value yet can be infinite, and those before them do not read them."""
    torch.manual_seed(0)
    flow = MaskedAutoregressive(MaskedNetwork(12, 2, (40, 40)), scale="exp").double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(0, 0.9)
        z = torch.randn(200, 12, dtype=F64)
        expected = flow.inverse(z)[0]
        moderate = (expected.abs() < 1e3).all(1)
        assert moderate.sum() >= 3
        naive = torch.zeros_like(z)
        for _ in range(12):
            naive, _ = flow._transformed(z, flow.net(naive), inverse=True)
        assert naive[moderate].isnan().any()
        found = in_passes(flow, z)[0]
    torch.testing.assert_close(found[moderate], expected[moderate], rtol=1e-8, atol=1e-8)


def test_a_sample_of_nan_or_inf_does_not_reach_others():
    flow, z = layer(4), torch.randn(6, 4, dtype=F64)
    expected = flow.inverse(z)[0]
    z[2, 1], z[4, 0] = torch.nan, torch.inf
    found = flow.inverse(z)[0]
    others = [0, 1, 3, 5]
    assert torch.equal(found[others], expected[others]) and found[2].isnan().any()


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("form", ["affine", "spline"])
def test_an_empty_batch(features, form):
    flow = layer(features, form)
    x = torch.empty(0, features, dtype=F64, requires_grad=True)
    for y, log_det in (flow(x), flow.inverse(x)):
        assert y.shape == (0, features) and log_det.shape == (0,)
        (y.sum() + log_det.sum()).backward()


@pytest.mark.parametrize("form", ["affine", "spline"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, dtype):
    torch.manual_seed(0)
    flow = layer(4, form, std=0.2)
    x = torch.randn(30, 4)
    (z, log_det), (expected, expected_log_det) = flow.to(dtype)(x.to(dtype)), flow.float()(x)
    assert (z.dtype, log_det.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(z.float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(log_det, expected_log_det, rtol=0.1, atol=0.1)
    back, log_det = flow.to(dtype).inverse(z)
    assert (back.dtype, log_det.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(back.float(), x, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("form", ["affine", "spline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_products(form, dtype):
    """Of values in bfloat16 too, as other layers return them."""
    torch.manual_seed(0)
    chain = fnn.Sequential(*(layer(4, form, context_features=2, activation="tanh").float() for _ in range(3)))
    x, context = torch.randn(20, 4), torch.randn(20, 2).to(dtype)
    expected = chain(x, context.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chain(x, context)
        back, _ = chain.inverse(found[0], context)
        half, _ = chain[0](x.to(dtype), context)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    assert half.dtype == dtype


@pytest.mark.parametrize("residual", [False, True])
def test_dropout_is_the_same_in_both_directions(residual):
    """A reversible chain draws the zeros of forward again, and inverts the layer with them."""
    torch.manual_seed(0)
    flow = layer(4, "affine", (32, 32), dropout=0.5, residual=residual).train()
    x = torch.randn(5, 4, dtype=F64, requires_grad=True)
    assert (flow(x)[0] - flow(x)[0]).abs().max() > 1e-3
    torch.manual_seed(1)
    z, _ = flow(x)
    torch.manual_seed(1)
    torch.testing.assert_close(flow.inverse(z)[0], x, rtol=1e-9, atol=1e-9)
    results = []
    for reversible in (True, False):
        torch.manual_seed(2)
        z, log_det = fnn.Sequential(flow, reversible=reversible)(x)
        results.append(torch.autograd.grad((z**2).sum() + log_det.sum(), [x, *flow.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["affine", "spline"])
def test_reversible_chains(form):
    torch.manual_seed(0)
    chain = [layer(5, form, context_features=2, order=o) for o in (None, "reverse", "random")]
    chain.insert(1, fnn.Inverse(layer(5, form, context_features=2)))
    x = torch.randn(6, 5, dtype=F64, requires_grad=True)
    context = torch.randn(6, 2, dtype=F64, requires_grad=True)
    results = []
    for reversible in (True, False):
        z, log_det = fnn.Sequential(*chain, reversible=reversible)(x, context)
        wanted = [x, context, *(p for f in chain for p in f.parameters())]
        results.append(torch.autograd.grad((z**2).sum() + log_det.sum(), wanted))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


def test_the_inverse_compiles_without_a_graph_break():
    torch._dynamo.reset()
    flow = layer(4, "spline", context_features=2)
    z, context = torch.randn(5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    compiled = torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(z, context), flow.inverse(z, context))
        with torch.no_grad():
            flow.net.layers[0].weight.mul_(1.3)  # the graph reads the weights, and keeps none
    torch._dynamo.reset()


def test_circles():
    """Points that are one point of the circle have one density, and the same parameters of the features after them."""
    torch.manual_seed(0)
    bound = FORMS["spline, circular"]["bound"]
    flow = layer(2, "spline, circular", order=[0, 1])
    x = torch.tensor([[-bound, 0.3], [bound, 0.3]], dtype=F64)
    z, _ = flow(x)
    torch.testing.assert_close(z[:, 0], x[:, 0])
    inside = torch.tensor([[-bound + 1e-7], [bound - 1e-7]], dtype=F64)
    single = layer(1, "spline, circular")
    slopes = single(inside)[1]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4)
    y = torch.linspace(-bound, bound, 20_001, dtype=F64)[:, None]
    with torch.no_grad():
        assert torch.trapezoid(single(y)[1].exp(), y[:, 0]).item() == pytest.approx(2 * bound, rel=1e-6)


# other libraries --------------------------------------------------------------------------------------------------------------


def same(flow, x, context, theirs, inverse_of_theirs) -> None:
    """z, log-det and the density's gradient as theirs, and the samples of latents too."""
    with torch.no_grad():
        z, log_det = theirs(x)
        torch.testing.assert_close(flow(x, context), (z, log_det), rtol=1e-10, atol=1e-10)
        latents = torch.randn_like(x)
        expected = inverse_of_theirs(latents)
        torch.testing.assert_close(flow.inverse(latents, context), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("spline", [False, True])
@pytest.mark.parametrize("features", [1, 2, 7])
def test_equals_nflows(features, spline, residual, context_features):
    pytest.importorskip("nflows")
    from nflows import transforms

    torch.manual_seed(0)
    options = {
        "features": features,
        "hidden_features": 16,
        "context_features": context_features,
        "num_blocks": 2,
        "use_residual_blocks": residual,
        "random_mask": not residual,
        "activation": torch.tanh if residual else torch.nn.functional.relu,
    }
    if spline:
        kind = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        theirs = kind(**options, num_bins=5, tails="linear", tail_bound=2.0)
    else:
        theirs = transforms.MaskedAffineAutoregressiveTransform(**options)
    theirs = randomize(theirs, std=0.1).double().eval()
    flow = autoregressive_libraries.of_nflows(theirs).eval()
    assert "one pass" in repr(flow)
    x = torch.randn(50, features, dtype=F64)
    context = None if context_features is None else torch.randn(50, context_features, dtype=F64)
    same(flow, x, context, lambda v: theirs(v, context), lambda v: theirs.inverse(v, context))


@pytest.mark.parametrize("random", [False, True])
def test_equals_the_maf_of_nflows(random):
    """Log-densities of a chain with permutations, and its gradients."""
    pytest.importorskip("nflows")
    from nflows.flows import MaskedAutoregressiveFlow

    torch.manual_seed(0)
    theirs = MaskedAutoregressiveFlow(5, 12, 3, 2, use_random_permutations=random)
    theirs = randomize(theirs, std=0.1).double().eval()
    from fastflow.models import FlowModel

    model = FlowModel(autoregressive_libraries.chain_of_nflows(theirs), fnn.GaussianPrior((5,))).double()
    x = torch.randn(40, 5, dtype=F64, requires_grad=True)
    ours, expected = model.log_prob(x), theirs.log_prob(x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    scores = [torch.autograd.grad(v.sum(), x)[0] for v in (ours, expected)]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-9)
    z = torch.randn(40, 5, dtype=F64)
    expected = theirs._transform.inverse(z)[0]
    torch.testing.assert_close(model.decode((z,)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("kind", ["MAF", "NSF"])
@pytest.mark.parametrize("features, hidden", [(2, (8, 8)), (6, (16, 12)), (6, (3, 3))])
def test_equals_zuko(features, hidden, kind, context):
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    theirs = getattr(zuko.flows, kind)(
        features, context, transforms=3, randperm=True, hidden_features=hidden, activation=nn.ELU
    )
    theirs = randomize(theirs, std=0.1).double()
    flow = autoregressive_libraries.chain_of_zuko(theirs).eval()
    assert all("one pass" in repr(each) for each in flow)
    x = torch.randn(50, features, dtype=F64)
    c = torch.randn(50, context, dtype=F64) if context else None
    same(
        flow,
        x,
        c,
        lambda v: autoregressive_libraries.latents_of_zuko(theirs, v, c),
        lambda v: theirs.transform(c).inv.call_and_ladj(v),
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: MaskedAutoregressive(MaskedNetwork(3, 3, (4,))),
            "net: got 3 outputs per feature, expected 2",
        ),
        (
            lambda: MaskedAutoregressive(MaskedNetwork(3, 2, (4,)), "splines"),
            "transformer: got 'splines', expected",
        ),
        (lambda: layer(3)(torch.zeros(2, 4, dtype=F64)), "x: got shape [2, 4], expected [2, 3]"),
        (lambda: layer(3).inverse(torch.zeros(2, 4, dtype=F64)), "z: got shape [2, 4], expected [2, 3]"),
        (lambda: layer(3).inverse(torch.zeros(2, 3)), "z: got dtype torch.float32, expected torch.float64"),
        (
            lambda: layer(3).inverse(torch.zeros(2, 3, dtype=F64), torch.zeros(2, 1, dtype=F64)),
            "context: got a tensor of shape [2, 1], expected None",
        ),
        (
            lambda: layer(3, context_features=1).inverse(torch.zeros(2, 3, dtype=F64)),
            "context: got None, expected [2, 1]",
        ),
        (
            lambda: MaskedAutoregressive(nn.Linear(3, 4))(torch.zeros(2, 3)),
            "params: got shape [2, 4], expected [2, 6] (2 parameters of each of 3 features)",
        ),
        (
            lambda: MaskedAutoregressive.params_per_feature("affine", scale="abs"),
            "scale: got 'abs', expected one",
        ),
        (
            lambda: MaskedAutoregressive.params_per_feature("affine", factor=0),
            "factor: got 0, expected a positive",
        ),
        (
            lambda: MaskedAutoregressive.params_per_feature("spline", bins=0),
            "bins: got 0, expected a positive",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()


def test_options_of_another_transformer():
    with pytest.raises(TypeError, match="bins"):
        MaskedAutoregressive(MaskedNetwork(3, 2, (4,)), bins=3)
    with pytest.raises(TypeError, match="form: got bins, expected none with a transformer of one's own"):
        MaskedAutoregressive(MaskedNetwork(3, 3, (4,)), fnn.PiecewiseLinear(3), bins=3)


def test_the_density_of_two_features_integrates_to_1():
    torch.manual_seed(0)
    flow = layer(2, "affine", order="reverse", activation="tanh")
    t = torch.linspace(-12, 12, 801, dtype=F64)
    x = torch.cartesian_prod(t, t)
    with torch.no_grad():
        z, log_det = flow(x)
        p = (log_det - 0.5 * z.square().sum(1)).exp() / (2 * torch.pi)
    assert (p.sum() * (t[1] - t[0]) ** 2).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(log_det[:5], jacobian_log_det(lambda v: flow(v)[0], x[:5]))
