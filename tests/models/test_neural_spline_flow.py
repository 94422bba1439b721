"""NeuralSplineFlow: one dimension, odd D, contexts, files, its size, its density, its launches, nflows' model."""

import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastflow
from benchmarks.models import spline_libraries
from fastflow.models import NeuralSplineFlow
from fastflow.nn import ElementwiseSpline, LULinear, SplineCoupling
from tests.support.cases import jacobian_log_det, randomize

SMALL = {"steps": 2, "hidden": 6, "blocks": 1, "bins": 4}


def flow(features, context_features=None, **kwargs):
    """A model in float64 that is not the identity."""
    torch.manual_seed(0)
    model = NeuralSplineFlow(features=features, context_features=context_features, **SMALL | kwargs)
    return randomize(model, std=0.3).double().eval()


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("features", [1, 2, 5])
def test_density_inverse_and_context(features, context_features):
    model = flow(features, context_features)
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


def test_one_dimension_without_a_context_has_no_network():
    model = flow(1)
    assert not [m for m in model.modules() if isinstance(m, SplineCoupling)]
    assert sum(isinstance(m, ElementwiseSpline) for m in model.modules()) == SMALL["steps"]


@pytest.mark.parametrize("features, kept", [(2, 1), (3, 1), (5, 2), (6, 3)])
def test_half_of_the_features_pass_rounded_down(features, kept):
    layers = list(flow(features).flows[0])
    assert [type(m) for m in layers[:-1]] == [LULinear, SplineCoupling, ElementwiseSpline] * SMALL["steps"]
    for coupling, passing in zip(layers[1::3], layers[2::3], strict=True):
        assert coupling.net.linear_in.in_features == kept == passing.channels
        assert passing.first_channel == 0
        assert coupling.net.linear_out.out_features == (features - kept) * (3 * SMALL["bins"] - 1)


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("features", [1, 2, 5])
def test_size(features, context_features):
    steps, hidden, blocks, bins, c = 3, 7, 2, 5, context_features or 0
    each, kept = 3 * bins - 1, features // 2
    network = (kept + c + 1) * hidden + (hidden + 1) * (features - kept) * each
    network += blocks * (2 * (hidden + 1) * hidden + (c + 1) * hidden * (c > 0))
    splines = features * each if features == 1 and not c else network + kept * each
    expected = (steps + 1) * (features**2 + features) + steps * splines
    model = NeuralSplineFlow(
        features=features, context_features=context_features, steps=steps, hidden=hidden, bins=bins
    )
    assert sum(p.numel() for p in model.parameters()) == expected


def test_density_of_one_dimension_integrates_to_1():
    for context in (None, torch.tensor([[0.7, -1.2]], dtype=torch.float64)):
        model = flow(1, None if context is None else 2)
        x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
        with torch.no_grad():
            p = model.log_prob(x.unsqueeze(1), context).exp()
        # the density has kinks at the knots: the error is of the order of a cell squared
        assert torch.trapezoid(p, x).item() == pytest.approx(1, abs=1e-6)


def test_density_of_two_dimensions_integrates_to_1():
    model = flow(2)
    x = torch.linspace(-15, 15, 1501, dtype=torch.float64)
    with torch.no_grad():
        p = torch.stack([model.log_prob(torch.cartesian_prod(part, x)).exp() for part in x.split(100)[:-1]])
        p = p.reshape(-1, len(x))
    area = (x[1] - x[0]).square()
    assert (p.sum() * area).item() == pytest.approx(1, abs=1e-4)


def test_fit_save_load_and_samples_of_a_context(tmp_path):
    torch.manual_seed(0)
    context = torch.randint(0, 2, (2000, 1)).float()
    x = torch.cat([context + 0.2 * torch.randn(2000, 1), 5 + 3 * torch.randn(2000, 1)], 1)
    model = NeuralSplineFlow(features=2, context_features=1, steps=2, hidden=16)
    before = model.log_prob(x[:100], context[:100]).mean().item()
    history = fastflow.fit(model, x, context, max_epochs=8, lr=5e-3, standardize=True, progress=False)
    exact = -0.5 * (1 + torch.tensor(2 * torch.pi).log()).item() * 2 - torch.tensor(0.2 * 3.0).log().item()
    assert exact - 0.1 < history.best < exact + 0.1 and before < exact - 1
    fastflow.save(tmp_path / "flow.pt", model)
    other = fastflow.load(tmp_path / "flow.pt")
    assert torch.equal(other.log_prob(x, context), model.log_prob(x, context))
    drawn = other.sample((1000,), context=torch.tensor([[0.0], [1.0]]))
    assert drawn.shape == (1000, 2, 2)
    assert torch.allclose(drawn[..., 0].mean(0), torch.tensor([0.0, 1.0]), atol=0.1)
    assert torch.allclose(drawn[..., 1].std(0), torch.tensor([3.0, 3.0]), rtol=0.15)


def test_dropout():
    with pytest.raises(
        ValueError, match="^" + re.escape("dropout: got 0.1, expected 0 for a reversible flow")
    ):
        NeuralSplineFlow(features=2, dropout=0.1, reversible=True)
    model = randomize(NeuralSplineFlow(features=4, dropout=0.5, **SMALL))
    x = torch.randn(8, 4)
    assert not torch.equal(model.train().log_prob(x), model.log_prob(x))
    assert torch.equal(model.eval().log_prob(x), model.log_prob(x))


def test_compiles_without_a_graph_break():
    """Without a context a network has one operation less, and Model passes None, as in test_maf.py."""
    model, x, context = (
        flow(4, 2),
        torch.randn(5, 4, dtype=torch.float64),
        torch.randn(5, 2, dtype=torch.float64),
    )
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), model.log_prob(x, context))


class Launches(TorchDispatchMode):
    """Counts the calls of FastFlow's ops."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastflow":
            self.calls[func._schema.name.removeprefix("fastflow::")] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("context_features", [None, 2])
def test_launches_of_a_training_step(steps, context_features):
    """A coupling is one launch in each direction, and so are the splines of the part that passes through."""
    model = NeuralSplineFlow(features=5, context_features=context_features, steps=steps, hidden=6)
    context = None if context_features is None else torch.randn(7, context_features)
    with Launches() as launches:
        (-model.log_prob(torch.randn(7, 5), context).mean()).backward()
    splines = {name: n for name, n in launches.calls.items() if name.startswith("spline")}
    assert splines == {"spline": 2 * steps, "spline_backward": 2 * steps}


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("features", [2, 5])
def test_equals_the_model_of_nflows(features, context_features):
    pytest.importorskip("nflows")
    model = flow(features, context_features)
    other = spline_libraries.copy_weights(model, spline_libraries.nflows(model)).eval()
    x = 2 * torch.randn(50, features, dtype=torch.float64)
    context = None if context_features is None else torch.randn(50, context_features, dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x, context), other.log_prob(x, context), rtol=1e-10, atol=1e-10)
    z = other.transform_to_noise(x, context)
    torch.testing.assert_close(model.encode(x, context)[0], z, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())
