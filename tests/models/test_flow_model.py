"""FlowModel, and drawing with log-densities and gradients from every model of continuous samples."""

import copy
import pickle
import re

import pytest
import torch
from torch import distributions as td
from torch import nn

from fastflow import nn as fnn
from fastflow.models import NICE, FlowModel, VectorGlow
from tests.support.cases import jacobian_log_det, randomize

F64 = torch.float64
PRIORS = {
    "GaussianPrior": lambda: fnn.GaussianPrior((4,), learned=True),
    "LogisticPrior": lambda: fnn.LogisticPrior((4,)),
    "StudentT": lambda: td.StudentT(torch.tensor(5.0), torch.zeros(4)),
    "MultivariateNormal": lambda: td.MultivariateNormal(torch.ones(4), 2 * torch.eye(4)),
    "TransformedDistribution": lambda: td.Independent(
        td.TransformedDistribution(
            td.Normal(torch.zeros(4), torch.ones(4)), td.AffineTransform(torch.ones(4), 2.0)
        ),
        1,
    ),
}
of_priors = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())


class Network(nn.Module):
    """Coupling network that is linear in the context."""

    def __init__(self):
        super().__init__()
        self.of_x, self.of_context = nn.Linear(2, 4), nn.Linear(3, 4)

    def forward(self, x, context):
        return torch.tanh(self.of_x(x)) + self.of_context(context)


def flow():
    return fnn.Sequential(
        fnn.AffineCoupling(Network()), fnn.InvertibleConv1x1(4), fnn.AffineCoupling(Network())
    )


def made(prior=PRIORS["GaussianPrior"], **kwargs):
    return randomize(FlowModel(flow(), prior(), **kwargs), std=0.3).double()


@of_priors
def test_log_prob_is_the_jacobian_s(prior):
    model, x, context = made(prior), torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    z, _ = model.flow(x, context)
    given = model.prior if isinstance(prior(), fnn.Prior) else prior()
    base = given.log_prob(z if isinstance(given, fnn.Prior) else z.float()).reshape(5, -1).sum(1)
    expected = base + jacobian_log_det(lambda x: model.flow(x, context)[0], x)
    accuracy = 1e-9 if isinstance(given, fnn.Prior) else 1e-5
    torch.testing.assert_close(
        model.log_prob(x, context), expected, rtol=accuracy, atol=accuracy, check_dtype=False
    )


@of_priors
def test_one_pass_has_the_log_prob_of_its_samples_and_its_gradient(prior):
    model, context = made(prior), torch.randn(6, 3, dtype=F64, requires_grad=True)
    weights = torch.randn(6, 4, dtype=F64)

    def gradients(log_prob_of):
        x, log_prob = log_prob_of(torch.Generator().manual_seed(3))
        loss = (weights * x).sum() + log_prob.sum()
        variables = [context, *model.parameters()]
        return x, log_prob, *torch.autograd.grad(loss, variables, materialize_grads=True, allow_unused=True)

    def two_passes(generator):
        x = model.rsample(6, context, generator=generator)
        return x, model.log_prob(x, context)

    one = gradients(lambda generator: model.rsample_and_log_prob(6, context, generator=generator))
    torch.testing.assert_close(one, gradients(two_passes), rtol=1e-9, atol=1e-9)
    x, log_prob = model.sample_and_log_prob(6, context, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close((x, log_prob), one[:2], rtol=1e-12, atol=1e-12)
    assert not x.requires_grad and not log_prob.requires_grad
    assert not x.is_inference() and not log_prob.is_inference()
    assert torch.equal(model.sample(6, context, generator=torch.Generator().manual_seed(3)), x)


@pytest.mark.parametrize(
    ("n", "rows", "shape"),
    [(5, None, (5,)), (5, 1, (5,)), (5, 5, (5,)), (0, 1, (0,)), (1, 1, (1,)), ((), 3, (3,)), ((2,), 3, (2, 3)),
     ((2, 4), 3, (2, 4, 3)), ((2,), 1, (2, 1)), ((2, 3), None, (2, 3)), (torch.Size([2]), 0, (2, 0))],
)  # fmt: skip
def test_leading_dimensions(n, rows, shape):
    model = FlowModel(flow() if rows is not None else fnn.ActNorm(4), fnn.GaussianPrior((4,)))
    context = None if rows is None else torch.randn(rows, 3)
    x, log_prob = model.sample_and_log_prob(n, context)
    assert x.shape == model.sample(n, context).shape == model.rsample(n, context).shape == (*shape, 4)
    assert log_prob.shape == shape
    if x.numel() and rows:  # every sample is that of its own row
        per_row = x.reshape(-1, rows, 4)
        again = torch.stack([model.log_prob(x, context) for x in per_row])
        torch.testing.assert_close(again.flatten(), log_prob.flatten())


def test_embedding_is_computed_once_per_row():
    rows = []

    class Embedding(nn.Embedding):
        def forward(self, context):
            rows.append(len(context))
            return super().forward(context)

    model = made(embedding=Embedding(7, 3))
    classes = torch.tensor([6, 2, 5])
    x = model.sample((100,), classes)
    assert rows == [3]
    assert model.sample(50, classes[:1]).shape == (50, 4)
    assert rows == [3, 1]
    expected = FlowModel(model.flow, model.prior).double().log_prob(x[0], model.embedding.weight[classes])
    torch.testing.assert_close(model.log_prob(x[0], classes), expected)


def test_embedding_and_context_receive_gradients():
    model = made(embedding=nn.Linear(2, 3))
    context = torch.randn(1, 2, dtype=F64, requires_grad=True)
    model.rsample_and_log_prob(9, context)[1].sum().backward()
    assert context.grad.abs().min() > 0 and model.embedding.weight.grad.abs().min() > 0


def test_classes_reach_the_prior():
    prior = fnn.GaussianPrior((4,), classes=2)
    with torch.no_grad():
        prior.mean[1] = 50.0
    model = FlowModel(fnn.InvertibleConv1x1(4), prior)
    labels = torch.tensor([0, 1])
    x, log_prob = model.sample_and_log_prob((3,), labels)
    assert (x.norm(dim=-1) > 50).tolist() == [[False, True]] * 3
    torch.testing.assert_close(model.log_prob(x[1], labels), log_prob[1], rtol=1e-4, atol=1e-4)


def test_a_context_reaches_the_prior():
    """Also one row for all samples, and a sample shape; the flow gets the embedding, the prior the context."""
    torch.manual_seed(0)
    prior = fnn.GaussianPrior((4,), context_features=2)
    model = randomize(FlowModel(flow(), prior, embedding=nn.Linear(2, 3)), std=0.3).double()
    context = torch.randn(2, 2, dtype=F64, requires_grad=True)
    x, log_prob = model.rsample_and_log_prob((5,), context)
    assert x.shape == (5, 2, 4) and log_prob.shape == (5, 2)
    torch.testing.assert_close(model.log_prob(x[1], context), log_prob[1])
    torch.testing.assert_close(
        model.log_prob(x[0], context[:1]), model.log_prob(x[0], context[:1].expand(2, 2))
    )
    log_prob.sum().backward()
    assert context.grad.abs().min() > 0 and all(p.grad is not None for p in prior.parameters())


def test_encode_and_decode_with_gradients():
    model, context = made(), torch.randn(1, 3, dtype=F64, requires_grad=True)
    x = torch.randn(5, 4, dtype=F64, requires_grad=True)
    (z,) = model.encode(x, context, differentiable=True)
    back = model.decode((z,), context, differentiable=True)
    torch.testing.assert_close(back, x)
    (dx,) = torch.autograd.grad(back.sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, torch.ones_like(x))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(z.square().sum(), [x, context]))
    (z,) = model.encode(x, context)
    assert not z.requires_grad and not model.decode((z,), context).requires_grad


def test_a_flow_that_changes_the_shape():
    level = fnn.Sequential(fnn.Squeeze(), fnn.ActNorm(4))
    model = FlowModel(level, fnn.GaussianPrior((4, 2, 3)), shape=(1, 4, 6)).eval()
    x, log_prob = model.sample_and_log_prob((2, 3))
    assert x.shape == (2, 3, 1, 4, 6)
    torch.testing.assert_close(model.log_prob(x[1]), log_prob[1])


def test_ready_models_draw_with_gradients():
    model = randomize(VectorGlow(features=4, steps=2, hidden=5), std=0.3).double().eval()
    x, log_prob = model.rsample_and_log_prob((2, 3))
    torch.testing.assert_close(log_prob[1], model.log_prob(x[1]))
    log_prob.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", ["rsample", "rsample_and_log_prob", "sample_and_log_prob"])
def test_uint8_models_refuse_with_the_reason(method):
    with pytest.raises(ValueError, match=f"{method}: got a model of uint8 samples, .*rounding to integers"):
        getattr(NICE(features=4, hidden=3, layers=1), method)(2)


def test_uint8_models_refuse_a_graph():
    model = NICE(features=4, hidden=3, layers=1)
    for call in (model.encode, lambda x, **kw: model.decode((x.float(),), **kw)):
        with pytest.raises(ValueError, match="differentiable: got a model of uint8 samples"):
            call(torch.zeros(2, 4, dtype=torch.uint8), differentiable=True)


@pytest.mark.parametrize(
    "prior",
    [
        fnn.GaussianMixturePrior((2,), torch.tensor([[-1.0, 0], [1, 0]])),
        td.MixtureSameFamily(
            td.Categorical(torch.ones(2)), td.Independent(td.Normal(torch.zeros(2, 2), torch.ones(2, 2)), 1)
        ),
    ],
    ids=["learned mixture", "MixtureSameFamily"],
)
def test_a_prior_without_reparameterized_samples(prior):
    model = FlowModel(fnn.ActNorm(2), prior).eval()
    for method in ("rsample", "rsample_and_log_prob"):
        with pytest.raises(ValueError, match=f"{method}: got the prior .*, whose samples have no gradient"):
            getattr(model, method)(3)
    x, log_prob = model.sample_and_log_prob(3)
    torch.testing.assert_close(model.log_prob(x), log_prob)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowModel(nn.Linear(2, 2), fnn.GaussianPrior((2,))), "flow: got Linear, expected a Flow"),
        (lambda: FlowModel(fnn.ActNorm(2), nn.Linear(2, 2)), "prior: got Linear, expected a fastflow.nn.Prior or"),
        (lambda: FlowModel(fnn.ActNorm(2), td.Normal(0.0, 1.0)), "distribution: got Normal of shape [], expected"),
        (
            lambda: FlowModel(fnn.ActNorm(2), td.Poisson(torch.ones(2))),
            "distribution: got Poisson of shape [2], expected a continuous",
        ),
        (lambda: fnn.DistributionPrior(3), "distribution: got int, expected a torch.distributions"),
        (
            lambda: FlowModel(fnn.ActNorm(2), fnn.GaussianPrior((2,)), embedding=3),
            "embedding: got int, expected a torch.nn.Module or None",
        ),
        (lambda: made().sample(-1), "n: got -1, expected 0 or more"),
        (lambda: made().sample((2, -1)), "n: got (2, -1), expected 0 or more"),
        (lambda: made().sample(2, temperature=-1), "temperature: got -1"),
        (
            lambda: FlowModel(flow(), PRIORS["StudentT"]()).sample(2, torch.ones(1, 3), temperature=0.5),
            "temperature: got 0.5, expected 1, with the prior StudentT",
        ),
        (lambda: made().sample(4, torch.ones(3, 3)), "context: got shape [3, 3], expected a tensor [4, ...] or"),
        (lambda: made().sample(4, [1.0]), "context: got list, expected a tensor [4, ...] or [1, ...]"),
        (lambda: made().sample(4, torch.ones(4, 3)), "context: got dtype torch.float32, expected a tensor [4, ...] or"),
        (lambda: made().sample(1, torch.full((1, 3), torch.nan).double()), "context: got inf or NaN"),
        (
            lambda: made(embedding=nn.Flatten(0)).sample(2, torch.ones(2, 3).double()),
            "embedding: got shape [6], expected [2, ...], one row per context",
        ),
        (lambda: made().log_prob(torch.ones(4, 3).double()), "x: got shape [4, 3], expected float64 vectors [N, 4]"),
        (lambda: VectorGlow(steps=1).sample(2, torch.ones(2, 3)), "temperature: got a tensor"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("flow", "shape", "message"),
    [
        (fnn.ActNorm(4), None, "prior, shape: got shapes [3], [3], expected a shape that the flow takes (x: got shape [1, 3], ex"),
        (fnn.Flatten((1, 2, 2)), (1, 2, 2), "prior: got shape [3], expected [4], the shape of the flow's latents"),
    ],
)  # fmt: skip
def test_priors_of_another_shape(flow, shape, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        FlowModel(flow, fnn.GaussianPrior((3,)), shape=shape)


def test_distribution_prior_computes_in_the_dtype_of_the_latents():
    base = td.MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    prior = fnn.DistributionPrior(base)
    z = torch.randn(5, 2)
    assert prior.log_prob(z).dtype == prior.log_prob(z.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(prior.log_prob(z), base.log_prob(z))
    torch.testing.assert_close(
        prior.double().log_prob(z.double()), base.log_prob(z).double(), rtol=1e-5, atol=1e-5
    )
    for like in (z, z.double(), z.bfloat16()):
        x = prior.sample(3, like, generator=torch.Generator().manual_seed(0))
        assert x.dtype == like.dtype
        assert torch.equal(x, prior.sample(3, like, generator=torch.Generator().manual_seed(0)))
    assert base.loc.dtype == torch.float32


def test_a_generator_leaves_torch_s_own_as_it_was():
    prior = fnn.DistributionPrior(td.Laplace(torch.zeros(2), torch.ones(2)))
    before = torch.get_rng_state()
    prior.sample(3, torch.zeros(1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_the_parameters_of_a_distribution():
    scale = torch.tensor([0.5, 2.0], requires_grad=True)
    model = FlowModel(fnn.Permute(2), td.Normal(torch.zeros(2), scale))
    x = torch.randn(7, 2)
    (found,) = torch.autograd.grad(model.log_prob(x).sum(), scale)
    (expected,) = torch.autograd.grad(td.Normal(0.0, scale).log_prob(model.encode(x)[0]).sum(), scale)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(model.rsample(5).sum(), scale)[0].abs().min() > 0


@of_priors
def test_copies_and_pickles(prior):
    model, context = made(prior), torch.randn(3, 3, dtype=F64)
    x = torch.randn(3, 4, dtype=F64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x, context), model.log_prob(x, context))


# densities with a known answer ------------------------------------------------------------------------------------------------


def conditional_gaussian(n, generator):
    """Samples, their contexts and log-densities; the mean is linear and the scale log-linear in the context."""
    context = 2 * torch.rand(n, 2, generator=generator) - 1
    mean = context @ torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
    log_scale = context @ torch.tensor([[0.4, -0.3], [0.0, 0.5]]) - 0.5
    x = mean + log_scale.exp() * torch.randn(n, 2, generator=generator)
    return x, context, td.Normal(mean, log_scale.exp()).log_prob(x).sum(1)


def banana(x):
    """Log-density of a Gaussian that is bent: x1 ~ N(0, 1), x2 ~ N(x1² / 2, 1/4)."""
    x1, x2 = x.unbind(1)
    return td.Normal(0.0, 1.0).log_prob(x1) + td.Normal(x1.square() / 2, 0.5).log_prob(x2)


def couplings(k, context_features=None):
    return FlowModel(
        fnn.Sequential(
            *(
                fnn.AffineCoupling(
                    fnn.MLP(1, 2, 16, 1, context_features=context_features), swap_halves=i % 2 == 1
                )
                for i in range(k)
            )
        ),
        fnn.GaussianPrior((2,)),
    )


def minimize(model, loss_of, steps=200):
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        schedule.step()


def test_a_conditional_gaussian_is_learned():
    torch.manual_seed(0)
    model, generator = couplings(2, context_features=2), torch.Generator().manual_seed(0)
    minimize(model, lambda: -model.log_prob(*conditional_gaussian(256, generator)[:2]).mean())
    x, context, log_prob = conditional_gaussian(20_000, generator)
    with torch.no_grad():
        divergence = (log_prob - model.log_prob(x, context)).mean()
    assert -0.01 < divergence < 0.03


def test_reverse_kl_finds_a_banana():
    torch.manual_seed(0)
    model = couplings(3)

    def divergence(draw, n):
        x, log_prob = draw(n)
        return (log_prob - banana(x)).mean()

    before = divergence(model.sample_and_log_prob, 20_000)
    minimize(model, lambda: divergence(model.rsample_and_log_prob, 256), steps=250)
    assert before > 0.5
    assert -0.005 < divergence(model.sample_and_log_prob, 20_000) < 0.02
