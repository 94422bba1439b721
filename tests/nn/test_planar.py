"""Planar, radial and Sylvester flows: formulas, normflows' layers, inverses of extreme parameters, contexts, and errors.

FLOWS has the rest.
"""

import re

import pytest
import torch

from fastflow import nn as fnn
from fastflow.nn.root import root
from tests.support.cases import randomize

F64 = torch.float64
LAYERS = {
    "planar": lambda d: fnn.Planar(d),
    "planar, leaky ReLU": lambda d: fnn.Planar(d, "leaky_relu"),
    "radial": lambda d: fnn.Radial(d),
    "Sylvester": lambda d: fnn.Sylvester(d),
    "Sylvester, one hidden unit": lambda d: fnn.Sylvester(d, 1, reflections=2),
    "Sylvester, cayley": lambda d: fnn.Sylvester(d, kind="cayley"),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
CONDITIONAL = {
    "planar": lambda c: fnn.Planar(3, context_features=c),
    "planar, leaky ReLU": lambda c: fnn.Planar(3, "leaky_relu", context_features=c),
    "radial": lambda c: fnn.Radial(3, context_features=c),
    "Sylvester": lambda c: fnn.Sylvester(3, 2, context_features=c),
    "Sylvester, cayley": lambda c: fnn.Sylvester(3, kind="cayley", context_features=c),
}
every_conditional_layer = pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL.keys())


def vectors(n, d, std=1.0, seed=0):
    return std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("activation", ["tanh", "leaky_relu"])
def test_planar_of_normflows(activation):
    flows = pytest.importorskip("normflows.flows")
    torch.manual_seed(0)
    for features in (1, 2, 7):
        other = flows.Planar((features,), act=activation).double()
        randomize(other, std=1.0)
        layer = fnn.Planar(features, activation).double()
        layer.load_state_dict({"u": other.u[0], "w": other.w[0], "b": other.b[0]})
        z = vectors(50, features)
        if activation == "tanh":
            torch.testing.assert_close(layer(z), other(z), rtol=0, atol=1e-10)
            continue
        # normflows computes the slopes of a leaky ReLU in float32: log-dets and the inverse have its rounding
        found, expected = (layer(z), layer.inverse(z)), (other(z), other.inverse(z))
        torch.testing.assert_close(found[0][0], expected[0][0], rtol=0, atol=1e-10)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_radial_of_normflows():
    flows = pytest.importorskip("normflows.flows")
    torch.manual_seed(0)
    for features in (1, 2, 7):
        other = randomize(flows.Radial((features,)).double(), std=1.0)
        layer = fnn.Radial(features).double()
        log_alpha, beta = other.alpha[0].abs().log(), other.beta[0]
        layer.load_state_dict({"log_alpha": log_alpha, "beta": beta, "center": other.z_0[0]})
        z = vectors(50, features)
        torch.testing.assert_close(layer(z), other(z), rtol=0, atol=1e-10)


def test_log_densities_of_normflows_with_equal_weights():
    """Of data, by the inverses of planar and radial layers, which normflows lacks: its samples with their log-density."""
    normflows = pytest.importorskip("normflows")
    torch.manual_seed(0)
    others = [normflows.flows.Planar((3,)), normflows.flows.Radial((3,)), normflows.flows.Planar((3,))]
    other = randomize(normflows.NormalizingFlow(normflows.distributions.DiagGaussian(3), others), std=0.7)
    other = other.double()
    layers = []
    for flow in others:
        if isinstance(flow, normflows.flows.Planar):
            layers.append(fnn.Planar(3).double())
            layers[-1].load_state_dict({"u": flow.u[0], "w": flow.w[0], "b": flow.b[0]})
        else:
            layers.append(fnn.Radial(3).double())
            named = {"log_alpha": flow.alpha[0].abs().log(), "beta": flow.beta[0], "center": flow.z_0[0]}
            layers[-1].load_state_dict(named)
    flow = fnn.Sequential(*(fnn.Inverse(layer) for layer in reversed(layers)))
    x, log_density = other.sample(200)
    z, log_det = flow(x.detach())
    torch.testing.assert_close(other.q0.log_prob(z) + log_det, log_density, rtol=0, atol=1e-8)


def test_sylvester_of_one_unit_is_planar():
    layer = randomize(fnn.Sylvester(5, 1), std=0.3).double()
    planar = fnn.Planar(5).double()
    q = fnn.OrthogonalLinear(5).double()
    q.load_state_dict({"vectors": layer.vectors, "bias": torch.zeros(5)})
    column = q.weight()[:, 0]
    outer, inner = layer.factors[0, 0].tanh(), layer.hidden_factors[0, 0].tanh()
    x = vectors(20, 5)
    expected = x + torch.outer(torch.tanh(inner * (x @ column) + layer.bias), outer * column)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-13)
    # the planar layer whose constrained u is outer * column
    w, total = inner * column, (outer * inner).detach()
    raw = torch.log(torch.expm1(1 + total))
    u = outer * column - (total - raw) * w / (w @ w)
    planar.load_state_dict({"u": u, "w": w, "b": layer.bias[0]})
    torch.testing.assert_close(planar(x), layer(x), rtol=0, atol=1e-11)


def test_the_formula_of_sylvester():
    layer = randomize(fnn.Sylvester(5, 3), std=0.4).double()
    orthogonal = fnn.OrthogonalLinear(5).double()
    orthogonal.load_state_dict({"vectors": layer.vectors, "bias": torch.zeros(5)})
    q = orthogonal.weight()[:, :3]
    outer, inner = (
        f.triu(1) + torch.diag(f.diagonal().tanh()) for f in (layer.factors, layer.hidden_factors)
    )
    x = vectors(20, 5)
    t = (inner @ q.mT @ x.mT).mT + layer.bias
    y, log_det = layer(x)
    torch.testing.assert_close(y, x + (q @ outer @ t.tanh().mT).mT, rtol=0, atol=1e-13)
    slopes = (1 - t.tanh() ** 2) * (outer.diagonal() * inner.diagonal())
    torch.testing.assert_close(log_det, (1 + slopes).log().sum(1), rtol=0, atol=1e-12)


@every_layer
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("features", [1, 2, 6])
def test_inverses_of_strong_layers(make, std, features):
    """From points near and far; also where the constraint is nearly active."""
    torch.manual_seed(1)
    for _ in range(5):
        layer = make(features)
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(std=std)
        layer = layer.double()
        for scale in (0.1, 3.0, 100.0):
            x = vectors(40, features, scale)
            y, log_det = layer(x)
            back, log_det_back = layer.inverse(y)
            # y is rounded, and the inverse multiplies its error by up to 1 over the least singular value
            jacobian = torch.autograd.functional.jacobian(lambda v, f=layer: f(v)[0].sum(0), x).transpose(
                0, 1
            )
            least = torch.linalg.svdvals(jacobian).amin(1)
            mild = least > 1e-8  # otherwise y does not determine x in float64
            bound = 1e-15 * (1 + x.norm(dim=1) + y.norm(dim=1)) * features / least + 1e-10
            assert ((back - x).norm(dim=1) <= bound)[mild].all()
            torch.testing.assert_close(layer(back)[0][mild], y[mild], rtol=1e-12, atol=1e-12)
            assert log_det.isfinite().all() and log_det_back.isfinite().all()


def test_log_dets_of_saturated_parameters_are_finite():
    """1 + w u, 1 + R R-tilde and (r + s) / (alpha + r) are computed without a difference."""
    planar, sylvester, radial = fnn.Planar(2), fnn.Sylvester(2), fnn.Radial(2)
    with torch.no_grad():
        planar.u.copy_(torch.tensor([-30.0, 0])), planar.w.copy_(torch.tensor([1.0, 0]))
        sylvester.factors.copy_(20 * torch.eye(2)), sylvester.hidden_factors.copy_(-20 * torch.eye(2))
        radial.beta.fill_(-40.0)
        radial.center.zero_()
    x = torch.tensor([[1e-4, 1.0]])
    found = planar(x)[1]  # 1 + h' w u is tanh^2 plus e^-30
    torch.testing.assert_close(
        found, torch.tensor([2 * 1e-4]).tanh().div(2).square().log(), rtol=1e-4, atol=0
    )
    assert sylvester(torch.zeros(1, 2))[1].isfinite().all()
    y, log_det = radial(x)
    assert log_det.isfinite().all()
    torch.testing.assert_close(radial.inverse(y)[0], x, rtol=1e-4, atol=1e-5)


@every_layer
def test_gradcheck(make):
    layer, x = randomize(make(3), std=0.1).double(), vectors(2, 3).requires_grad_()
    for direction in (layer, layer.inverse):
        assert torch.autograd.gradcheck(lambda x, *_, f=direction: f(x), (x, *layer.parameters()))
        assert torch.autograd.gradgradcheck(lambda x, *_, f=direction: f(x), (x, *layer.parameters()))


def test_the_root_of_a_steep_and_flat_function():
    """Of t^3 + t / 1000, for which Newton's steps alone overshoot; with its derivative."""

    def function(t, slope):
        return t**3 + slope * t, 3 * t**2 + slope

    target = torch.linspace(-8, 8, 31, dtype=F64)[:, None].expand(31, 2).clone().requires_grad_()
    slope = torch.full_like(target, 1e-3).requires_grad_()
    found = root(function, target, torch.full_like(target, -40), torch.full_like(target, 70), slope)
    torch.testing.assert_close(function(found, slope)[0], target, rtol=0, atol=1e-13)
    gradients = torch.autograd.grad(found.sum(), (target, slope))
    steep = function(found, slope)[1]
    torch.testing.assert_close(gradients, (1 / steep, -found / steep), rtol=1e-10, atol=1e-10)


def test_shapes_without_values_take_no_iterations():
    """Models are built on tensors without values, with both directions of every layer."""
    calls = []

    def function(t):
        calls.append(t.device.type)
        return t, torch.ones_like(t)

    target = torch.empty(3, 2, device="meta")
    assert root(function, target, target, target).shape == (3, 2)
    assert calls == ["meta"] * 3  # one step, and two for the derivatives


@every_conditional_layer
def test_the_context_gives_each_sample_its_parameters(make):
    layer = randomize(make(2), std=0.3).double()
    x, context = vectors(6, 3), vectors(6, 2, seed=1)
    z, log_det = layer(x, context)
    back, log_det_back = layer.inverse(z, context)
    learned = [(name, p) for name, p in layer.named_parameters() if name != "context_weight"]
    single = make(None).double()
    added = (context @ layer.context_weight.mT).split([p.numel() for _, p in learned], dim=1)
    for i in range(6):
        single.load_state_dict(
            {name: p + a[i].view_as(p) for (name, p), a in zip(learned, added, strict=True)}
        )
        of_one = slice(i, i + 1)
        torch.testing.assert_close(single(x[of_one]), (z[of_one], log_det[of_one]), rtol=0, atol=1e-13)
        found = single.inverse(z[of_one])
        torch.testing.assert_close(found, (back[of_one], log_det_back[of_one]), rtol=1e-12, atol=1e-12)
    assert ((z - layer(x, context.roll(1, 0))[0]).abs().amax(1) > 1e-4).all()


@every_conditional_layer
def test_the_context_starts_without_effect(make):
    torch.manual_seed(0)
    layer = make(2)
    torch.manual_seed(0)
    plain = make(None)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x, torch.randn(5, 2)), plain(x), rtol=1e-6, atol=1e-6)
    assert repr(layer).endswith("context_features=2)") and "context" not in repr(plain)


@every_conditional_layer
def test_checks_with_a_context(make):
    """Inverse, log-det against autograd's Jacobian of each sample, and gradients, also of the context."""
    report = randomize(make(2), std=0.3).check(vectors(4, 3), vectors(4, 2, seed=1), tolerance=1e-9)
    assert report.gradient_errors.keys() >= {"x", "context", "context_weight"}


@every_conditional_layer
def test_gradcheck_with_a_context(make):
    layer = randomize(make(2), std=0.1).double()
    inputs = vectors(2, 3).requires_grad_(), vectors(2, 2, seed=1).requires_grad_(), *layer.parameters()
    for direction in (layer, layer.inverse):
        of_all = lambda x, context, *_, f=direction: f(x, context)  # noqa: E731
        assert torch.autograd.gradcheck(of_all, inputs, fast_mode=True)


@every_conditional_layer
def test_reversible_chains_with_a_context(make):
    """Gradients are those with stored activations."""
    flow = randomize(fnn.Sequential(*(make(2) for _ in range(3))), std=0.2).double()
    stored = fnn.Sequential(*flow, reversible=False)
    x, context = vectors(5, 3).requires_grad_(), vectors(5, 2, seed=1).requires_grad_()
    found = []
    for chain in (flow, stored):
        z, log_det = chain(x, context)
        loss = z.square().sum() + log_det.sum()
        found.append(torch.autograd.grad(loss, (x, context, *flow.parameters())))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@every_conditional_layer
@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "context: got None, expected [5, 2]"),
        (torch.zeros(5, 3), "context: got shape [5, 3], expected [5, 2]"),
        (torch.zeros(1, 2), "context: got shape [1, 2], expected [5, 2]"),
        (torch.zeros(5, 2, dtype=F64), "context: got dtype torch.float64, expected torch.float32"),
        (torch.zeros(5, 2, dtype=torch.int64), "context: got dtype torch.int64, expected floating point"),
    ],
)
def test_errors_of_contexts(make, context, message):
    layer = make(2)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=re.escape(message)):
            direction(torch.zeros(5, 3), context)


@every_layer
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(make, half):
    layer, x = randomize(make(4), std=0.1), torch.randn(16, 4)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(layer.inverse(expected[0])[0], x, rtol=1e-4, atol=1e-5)
    layer = layer.to(half)
    y, log_det = layer(x.to(half))
    assert y.dtype == layer.inverse(y)[0].dtype == half and log_det.dtype == torch.float32
    exact = layer.float()(x.to(half).float())
    torch.testing.assert_close(y, exact[0].to(half), rtol=0, atol=0)
    torch.testing.assert_close(log_det, exact[1], rtol=1e-5, atol=1e-5)


@every_conditional_layer
def test_half_precision_with_a_context(make):
    layer, x, context = randomize(make(2), std=0.1), torch.randn(8, 3), torch.randn(8, 2)
    expected = layer(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, context), expected, rtol=0, atol=0)
    layer = layer.to(torch.bfloat16)
    y, log_det = layer(x.bfloat16(), context.bfloat16())
    exact = layer.float()(x.bfloat16().float(), context.bfloat16().float())
    torch.testing.assert_close((y, log_det), (exact[0].bfloat16(), exact[1]), rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 4), "got shape [5, 4], expected [N, 3]"),
        (torch.zeros(5, 3, 2, 2), "got shape [5, 3, 2, 2], expected [N, 3]"),
        (torch.zeros(5, 3, dtype=F64), "got dtype torch.float64, expected torch.float32"),
        (torch.zeros(5, 3, dtype=torch.int64), "got dtype torch.int64"),
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
        (lambda: fnn.Planar(0), "features: got 0, expected a positive integer"),
        (lambda: fnn.Planar(2, "relu"), "activation: got 'relu', expected one of 'tanh', 'leaky_relu'"),
        (lambda: fnn.Radial(2.5), "features: got 2.5, expected a positive integer"),
        (lambda: fnn.Planar(2, context_features=0), "context_features: got 0, expected a positive integer"),
        (lambda: fnn.Radial(2, 1.5), "context_features: got 1.5, expected a positive integer"),
        (lambda: fnn.Sylvester(2, context_features=-1), "context_features: got -1, expected a positive"),
        (lambda: fnn.Sylvester(2, 3), "hidden: got 3, expected 1 to 2, the number of features"),
        (lambda: fnn.Sylvester(2, kind="qr"), "kind: got 'qr', expected one of 'householder', "),
        (lambda: fnn.Sylvester(2, kind="cayley", reflections=1), "reflections: got 1, expected None with"),
    ],
)
def test_errors_of_constructors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@every_conditional_layer
def test_transforms_of_each_sample_with_its_context(make):
    """vmap gives the batch's results, and jacrev and jacfwd of each sample its log-det."""
    layer = randomize(make(2), std=0.3).double()
    x, context = vectors(4, 3), vectors(4, 2, seed=1)
    for direction in (layer, layer.inverse):
        one = lambda a, b, f=direction: tuple(v[0] for v in f(a[None], b[None]))  # noqa: E731
        expected = direction(x, context)
        torch.testing.assert_close(torch.func.vmap(one)(x, context), expected, rtol=1e-10, atol=1e-10)
        for derivative in (torch.func.jacrev, torch.func.jacfwd):
            jacobian = torch.func.vmap(derivative(lambda a, b, f=one: f(a, b)[0]))(x, context)
            found = torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(found, expected[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["planar", "radial", "Sylvester"])
def test_compiles_with_a_context(name):
    layer = randomize(CONDITIONAL[name](2), std=0.3).double()
    inputs = vectors(4, 3).requires_grad_(), vectors(4, 2, seed=1).requires_grad_(), *layer.parameters()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = (f(*inputs[:2]) for f in (compiled, layer))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(z.square().sum() + log_det.sum(), inputs) for z, log_det in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


ONNX = ("planar", "radial", "Sylvester")


class _Densities(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(randomize(CONDITIONAL[name](2), std=0.3) for name in ONNX)

    def forward(self, x, context):
        return tuple(v for layer in self.layers for v in layer(x, context))


@pytest.mark.slow
def test_runs_in_onnxruntime_with_a_context(tmp_path):
    """The direction of log-densities. The graph of an inverse by bisection would have a part for each step."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layers, given = _Densities().eval(), (torch.randn(2, 3), torch.randn(2, 2))
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        layers, given, dynamic_shapes=({0: batch}, {0: batch}), dynamo=True, verbose=False, optimize=False
    )
    program.save(tmp_path / "layers.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layers.onnx")
    for n in (1, 5):
        given = torch.randn(n, 3), torch.randn(n, 2)
        named = dict(zip((i.name for i in session.get_inputs()), (v.numpy() for v in given), strict=True))
        found = tuple(map(torch.from_numpy, session.run(None, named)))
        torch.testing.assert_close(found, layers(*given), rtol=1e-4, atol=1e-4)
