"""Models as distributions, flows as transforms of torch.distributions."""

import re

import pytest
import torch
from torch import distributions as td

from fastflow import explore
from fastflow import nn as fnn
from fastflow.models import NICE, FlowModel, VectorGlow
from tests.support.cases import randomize

F64 = torch.float64


@pytest.fixture(autouse=True)
def validated(monkeypatch):
    """Distributions validate by default; importing zuko turns that off for all of torch.distributions."""
    monkeypatch.setattr(td.Distribution, "_validate_args", True)


def model_of(context_features=3):
    model = VectorGlow(4, steps=2, hidden=5, context_features=context_features)
    return randomize(model, std=0.3).double().eval()


def contexts(n=5):
    return torch.randn(n, 3, dtype=F64)


@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_shapes_and_values(sample_shape, rows):
    model = model_of(None if rows is None else 3)
    context = None if rows is None else contexts(rows)
    distribution = model.distribution(context)
    batch = () if rows is None else (rows,)
    assert distribution.batch_shape == batch and distribution.event_shape == (4,) and distribution.has_rsample
    for draw in (distribution.sample, distribution.rsample):
        x = draw(sample_shape)
        assert x.shape == (*sample_shape, *batch, 4)
        assert x.requires_grad == (draw == distribution.rsample) and not x.is_inference()
    log_prob = distribution.log_prob(x)
    assert log_prob.shape == (*sample_shape, *batch)
    each = x.reshape(log_prob.numel() // (rows or 1), rows or 1, 4)
    expected = [model.log_prob(v, context) for v in each]
    assert len(expected) == log_prob.numel() // (rows or 1)
    for got, one in zip(log_prob.reshape(-1, rows or 1), expected, strict=True):
        torch.testing.assert_close(got, one)


def test_values_broadcast_with_the_contexts():
    model, context, x = model_of(), contexts(), torch.randn(4, dtype=F64)
    expected = model.log_prob(x.expand(5, 4), context)
    torch.testing.assert_close(model.distribution(context).log_prob(x), expected)


@pytest.mark.parametrize(
    ("rows", "batch_shape"), [(5, (2, 5)), (5, (5,)), (1, (6,)), (1, (2, 6)), (None, (2, 3)), (None, ())]
)
def test_expand(rows, batch_shape):
    model = model_of(None if rows is None else 3)
    context = None if rows is None else contexts(rows)
    distribution = model.distribution(context).expand(batch_shape)
    assert distribution.batch_shape == batch_shape and distribution.event_shape == (4,)
    x = distribution.sample((7,))
    assert x.shape == (7, *batch_shape, 4)
    log_prob = distribution.log_prob(x)
    assert log_prob.shape == (7, *batch_shape)
    torch.testing.assert_close(log_prob, model.distribution(context).log_prob(x))


def test_every_sample_is_that_of_its_context():
    class Shift(torch.nn.Module):
        def forward(self, x, context):
            return torch.cat([context, torch.zeros_like(context)], dim=1)

    model = FlowModel(fnn.AffineCoupling(Shift()), fnn.GaussianPrior((2,)))
    context = torch.tensor([[0.0], [-300.0], [-900.0]])
    for x in (
        model.distribution(context).expand((2, 3)).sample((20,)),
        model.sample((20, 2), context),
        model.rsample((20, 2), context),
    ):
        assert x.shape == (20, 2, 3, 2)
        torch.testing.assert_close(x[..., 1] + context[:, 0], torch.zeros(20, 2, 3), rtol=0, atol=8.0)


def test_gradients_reach_parameters_and_context():
    model, context = model_of(), contexts().requires_grad_()
    model.distribution(context).rsample((2,)).square().sum().backward()
    assert context.grad.abs().sum(1).min() > 0
    assert all(p.grad is not None for p in model.flows.parameters())


def test_wrappers_of_torch_distributions_take_it():
    model, context = model_of(), contexts()
    distribution = model.distribution(context)
    independent = td.Independent(distribution, 1)
    x = independent.sample((2,))
    assert independent.event_shape == (5, 4)
    torch.testing.assert_close(independent.log_prob(x), distribution.log_prob(x).sum(-1))
    scaled = td.TransformedDistribution(distribution, td.AffineTransform(1.0, 2.0, event_dim=1))
    expected = distribution.log_prob((x - 1) / 2) - 4 * torch.log(torch.tensor(2.0, dtype=F64))
    torch.testing.assert_close(scaled.log_prob(x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NICE(4, hidden=3, layers=1).distribution(), "distribution: got a model of uint8 samples"),
        (lambda: model_of().distribution(), "context: got None, expected torch.float64 of shape"),
        (lambda: model_of().distribution(contexts().float()), "context: got dtype torch.float32"),
        (lambda: model_of().distribution(contexts()).expand((4,)), r"batch_shape: got \[4\], expected a shape that \[5\]"),
        (lambda: model_of(None).distribution().log_prob(torch.full((4,), torch.nan).double()), "within the support"),
        (lambda: VectorGlow(2, 1, prior="mixture").distribution().rsample(), "rsample: got the prior Gaussian"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def test_density_of_one_context_on_a_grid():
    model = FlowModel(fnn.AffineCoupling(fnn.MLP(1, 2, 5, context_features=1)), fnn.GaussianPrior((2,)))
    randomize(model, std=0.3).eval()
    context = torch.tensor([[2.0]])
    density, integral = explore.density(model, ((-9.0, 9.0), (-9.0, 9.0)), 90, context=context)
    assert abs(integral - 1) < 1e-3
    x = torch.tensor([[-8.9 + 0.2 * 30, -8.9 + 0.2 * 40]])
    torch.testing.assert_close(density[40, 30].float(), model.log_prob(x, context)[0].exp())


# transforms -------------------------------------------------------------------------------------------------------------------


def conditional_flow():
    flow = fnn.Sequential(fnn.AffineCoupling(fnn.MLP(2, 4, 5, context_features=3)), fnn.InvertibleConv1x1(4))
    return randomize(flow, std=0.3).double()


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_transformed_distribution_is_the_model(cache_size, rows):
    flow, context = conditional_flow(), contexts(rows)
    base = td.Independent(td.Normal(torch.zeros(5, 4, dtype=F64), 1.0), 1)
    transform = fnn.FlowTransform(flow, context, cache_size=cache_size)
    distribution = td.TransformedDistribution(base, transform)
    model = FlowModel(flow, fnn.GaussianPrior((4,))).double()
    x = distribution.rsample((2,))
    assert x.shape == (2, 5, 4) and x.requires_grad
    expected = torch.stack([model.log_prob(v, context) for v in x])
    torch.testing.assert_close(distribution.log_prob(x), expected)
    torch.testing.assert_close(distribution.log_prob(x.clone()), expected)


def test_both_directions_and_their_log_det():
    flow = conditional_flow()
    transform = fnn.FlowTransform(flow, contexts(1))
    z = torch.randn(6, 4, dtype=F64)
    x = transform(z)
    torch.testing.assert_close(transform.inv(x.clone()), z)
    torch.testing.assert_close(x, flow.inverse(z, transform.context.expand(6, 3))[0])
    jacobian = torch.autograd.functional.jacobian(lambda z: transform(z.unsqueeze(0))[0], z[0])
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x)[0], expected)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z)[0], -expected)
    assert transform.inv.inv is transform and transform.with_cache(0) == transform


def test_a_density_takes_one_pass():
    calls = []

    class Counted(fnn.ActNorm):
        def forward(self, x, context=None):
            calls.append("forward")
            return super().forward(x, context)

        def inverse(self, z, context=None):
            calls.append("inverse")
            return super().inverse(z, context)

    base = td.Independent(td.Normal(torch.zeros(2), torch.ones(2)), 1)
    distribution = td.TransformedDistribution(base, fnn.FlowTransform(Counted(2).eval()))
    distribution.log_prob(torch.randn(3, 2))
    assert calls == ["forward"]
    distribution.log_prob(distribution.rsample((3,)))
    assert calls == ["forward", "inverse"]


def test_images():
    flow = randomize(fnn.ActNorm(2), std=0.3).double().eval()
    base = td.Independent(td.Normal(torch.zeros(2, 3, 3, dtype=F64), 1.0), 3)
    x = torch.randn(4, 2, 3, 3, dtype=F64)
    found = td.TransformedDistribution(base, fnn.FlowTransform(flow, event_dim=3)).log_prob(x)
    torch.testing.assert_close(
        found, FlowModel(flow, fnn.GaussianPrior((2, 3, 3))).double().eval().log_prob(x)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.FlowTransform(torch.nn.Linear(2, 2)), "flow: got Linear, expected a Flow"),
        (lambda: fnn.FlowTransform(fnn.ActNorm(2), event_dim=0), "event_dim: got 0, expected a positive integer"),
        (
            lambda: fnn.FlowTransform(conditional_flow(), contexts(2))(torch.zeros(6, 4).double()),
            "context: got shape [2, 3], expected 6 rows or one",
        ),
    ],
)  # fmt: skip
def test_errors_of_the_transform(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_pyro_samples_it():
    pyro = pytest.importorskip("pyro", reason="needs pyro-ppl")
    model, context = model_of(), contexts()

    def program(observed=None):
        with pyro.plate("contexts", 5):
            return pyro.sample("x", model.distribution(context), obs=observed)

    trace = pyro.poutine.trace(program).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 4)
    torch.testing.assert_close(trace.log_prob_sum(), model.log_prob(x, context).sum())
    trace = pyro.poutine.trace(program).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), model.log_prob(x, context).sum())
    with pyro.plate("more", 2, dim=-2):
        assert program().shape == (2, 5, 4)
