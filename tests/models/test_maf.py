"""MAF, IAF and autoregressive NeuralSplineFlow: densities, contexts, sizes, files, batch normalization, passes."""

import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastflow
from fastflow.models import IAF, MAF, NeuralSplineFlow
from fastflow.nn import BatchNorm, ElementwiseSpline, Inverse, MaskedAutoregressive, Permute
from tests.support.cases import jacobian_log_det, randomize


def autoregressive_spline(**kwargs):
    return NeuralSplineFlow(autoregressive=True, blocks=1, bins=4, **kwargs)


MODELS = {"MAF": MAF, "IAF": IAF, "RQ-NSF (AR)": autoregressive_spline}
of_models = pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())


def flow(kind, features, context_features=None, std=0.2, **kwargs):
    """A model in float64 that is not the identity."""
    torch.manual_seed(0)
    more = {} if kind is autoregressive_spline else {"activation": "tanh"}
    options = {"steps": 2, "hidden": 9} | more | kwargs
    model = kind(features=features, context_features=context_features, **options)
    return randomize(model, std=std).double().eval()


@of_models
@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("features", [1, 2, 5])
def test_density_inverse_and_context(kind, features, context_features):
    model = flow(kind, features, context_features)
    torch.manual_seed(1)
    x = 2 * torch.randn(6, features, dtype=torch.float64)
    context = None if context_features is None else torch.randn(6, context_features, dtype=torch.float64)
    z = model.encode(x, context)[0]
    torch.testing.assert_close(model.decode((z,), context), x, rtol=1e-9, atol=1e-9)
    log_det = jacobian_log_det(lambda v: model.encode(v, context, differentiable=True)[0], x)
    expected = log_det - 0.5 * (z.square() + torch.tensor(2 * torch.pi).double().log()).sum(1)
    torch.testing.assert_close(model.log_prob(x, context), expected)
    if context is not None:
        assert (model.log_prob(x, context + 1) - expected).abs().min() > 1e-6


@of_models
def test_density_integrates_to_1(kind):
    model = flow(kind, 2, std=0.1)
    x = torch.linspace(-15, 15, 1201, dtype=torch.float64)
    with torch.no_grad():
        p = torch.cat([model.log_prob(torch.cartesian_prod(part, x)).exp() for part in x.split(100)])
    assert (p.sum() * (x[1] - x[0]).square()).item() == pytest.approx(1, abs=1e-3)


@of_models
def test_samples_have_the_density(kind):
    """The mean of a function over samples is its integral with the density, and log_prob of samples is their own."""
    model = flow(kind, 2)
    torch.manual_seed(0)
    x, log_prob = model.sample_and_log_prob(20_000)
    torch.testing.assert_close(model.log_prob(x), log_prob, rtol=1e-8, atol=1e-8)
    t = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(t, t)
    with torch.no_grad():
        p = model.log_prob(grid).exp() * (t[1] - t[0]).square()
    for function in (lambda v: v[:, 0].tanh(), lambda v: (v[:, 0] * v[:, 1]).tanh()):
        values = function(x)
        error = values.std() / len(x) ** 0.5
        assert (values.mean() - (p * function(grid)).sum()).abs() < 4 * error + 1e-3


def layers_of(model, kind=MaskedAutoregressive):
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("kind", [MAF, IAF])
@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("residual", [False, True])
def test_layers_and_size(kind, features, residual):
    steps, hidden, layers, c = 3, 7, 2, 2
    model = kind(
        features=features, context_features=c, steps=steps, hidden=hidden, layers=layers, residual=residual
    )
    assert len(layers_of(model)) == steps and len(layers_of(model, Permute)) == (steps - 1) * (features > 1)
    assert len(layers_of(model, Inverse)) == steps * (kind is IAF)
    linears = 2 * layers if residual else layers - 1
    contexts = 1 + layers * residual
    each = (features + 1) * hidden + linears * (hidden + 1) * hidden + (hidden + 1) * 2 * features
    each += contexts * (c + 1) * hidden
    assert sum(p.numel() for p in model.parameters()) == steps * each


def test_orders():
    assert all(
        p.order == "reverse" and p.perm.tolist() == [3, 2, 1, 0] for p in layers_of(MAF(4, hidden=4), Permute)
    )
    torch.manual_seed(0)
    perms = [tuple(p.perm.tolist()) for p in layers_of(MAF(9, hidden=4, order="random"), Permute)]
    assert len(set(perms)) == 4


def test_one_dimension_of_splines_without_a_context_has_no_network():
    model = flow(autoregressive_spline, 1)
    assert not layers_of(model) and len(layers_of(model, ElementwiseSpline)) == 2
    assert len(layers_of(flow(autoregressive_spline, 1, 2))) == 2


@of_models
def test_it_starts_as_a_gaussian(kind):
    model = kind(features=3, steps=2, hidden=8)
    x = torch.randn(20, 3)
    expected = -0.5 * (x.square() + torch.tensor(2 * torch.pi).log()).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-5, atol=1e-5)


def test_saved_models_keep_their_scale(tmp_path):
    """The default of MAF was "soft_clamp"."""
    for scale in ("soft_clamp", "soft_clip"):
        fastflow.save(tmp_path / "flow.pt", MAF(features=2, hidden=4, scale=scale))
        assert fastflow.load(tmp_path / "flow.pt").config["scale"] == scale
    assert MAF(features=2, hidden=4).config["scale"] == "soft_clip"


@pytest.mark.parametrize("batch_norm", [False, True])
def test_fit_save_load_and_samples_of_a_context(tmp_path, batch_norm):
    torch.manual_seed(0)
    context = torch.randint(0, 2, (2000, 1)).float()
    first = context + 0.2 * torch.randn(2000, 1)
    x = torch.cat([first, 5 + 3 * first + 0.5 * torch.randn(2000, 1)], 1)
    model = MAF(features=2, context_features=1, steps=2, hidden=16, batch_norm=batch_norm)
    history = fastflow.fit(model, x, context, max_epochs=10, lr=5e-3, standardize=True, progress=False)
    exact = -(1 + torch.tensor(2 * torch.pi).log()).item() - torch.tensor(0.2 * 0.5).log().item()
    assert exact - 0.1 < history.best < exact + 0.1
    fastflow.save(tmp_path / "flow.pt", model)
    other = fastflow.load(tmp_path / "flow.pt")
    assert torch.equal(other.log_prob(x, context), model.log_prob(x, context))
    drawn = other.sample((1000,), context=torch.tensor([[0.0], [1.0]]))
    assert drawn.shape == (1000, 2, 2)
    assert torch.allclose(drawn[..., 0].mean(0), torch.tensor([0.0, 1.0]), atol=0.1)
    assert torch.allclose(drawn[..., 1].mean(0), torch.tensor([5.0, 8.0]), atol=0.3)


def test_batch_normalization():
    """Each layer but the last is followed by it, and it starts the next with standardized features."""
    model = MAF(features=3, steps=3, hidden=8, batch_norm=True)
    kinds = [type(m).__name__ for m in model.flows[0]]
    step = ["MaskedAutoregressive", "BatchNorm", "Permute"]
    assert kinds == [*step, *step, "MaskedAutoregressive"]
    x = 5 + 3 * torch.randn(500, 3)
    model.train().log_prob(x)
    z = model.eval().encode(x)[0]
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.std(0), torch.ones(3), rtol=0, atol=1e-2)
    assert [b.batches.item() for b in layers_of(model, BatchNorm)] == [1, 1]
    torch.testing.assert_close(model.decode((z,)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [MAF, IAF])
def test_dropout(kind):
    with pytest.raises(ValueError, match="^" + re.escape("dropout: got 0.1, expected 0 for a reversible")):
        kind(features=2, dropout=0.1, reversible=True)
    model = randomize(kind(features=4, dropout=0.5, steps=2, hidden=16))
    x = torch.randn(8, 4)
    assert not torch.equal(model.train().log_prob(x), model.log_prob(x))
    assert torch.equal(model.eval().log_prob(x), model.log_prob(x))


@of_models
def test_reversible_gradients(kind):
    models = [flow(kind, 4, 2, reversible=r) for r in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x, context = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    found = [torch.autograd.grad(m.log_prob(x, context).sum(), list(m.parameters())) for m in models]
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind, context_features", [(MAF, None), (IAF, 2), (MODELS["RQ-NSF (AR)"], 2)])
def test_compiles_without_a_graph_break(kind, context_features):
    """A context adds the same to the networks of each model."""
    torch._dynamo.reset()
    model = flow(kind, 4, context_features)
    x = torch.randn(5, 4, dtype=torch.float64)
    context = None if context_features is None else torch.randn(5, context_features, dtype=torch.float64)
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), model.log_prob(x, context))
    torch._dynamo.reset()


class Launches(TorchDispatchMode):
    """Counts the calls of FastFlow's ops."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastflow":
            self.calls[func._schema.name.removeprefix("fastflow::")] += 1
        return func(*args, **kwargs or {})


@of_models
def test_one_inverse_per_layer(kind):
    model = flow(kind, 6, steps=3)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad(), Launches() as of_density:
        model.log_prob(x)
    with torch.no_grad(), Launches() as of_samples:
        model.sample(5)
    slow, fast = (of_density, of_samples) if kind is IAF else (of_samples, of_density)
    assert slow.calls["masked_inverse"] == 3 and fast.calls["masked_inverse"] == 0
