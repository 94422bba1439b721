"""Priors: densities against torch.distributions, normalization, and samples by their moments, quantiles, temperature and seed."""

import copy
import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Dirichlet,
    Gamma,
    Independent,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.transforms import ExpTransform, SigmoidTransform

from fastflow import ops
from fastflow.nn import DistributionPrior, GaussianMixturePrior, GaussianPrior, LogisticPrior, UniformPrior
from tests.support.cases import randomize

VECTOR, IMAGE = (2,), (2, 1, 2)
MEANS = torch.tensor([[-1.0, 2.0], [0.5, 0.0], [3.0, -2.0]])
PRIORS = {
    "standard": lambda shape: GaussianPrior(shape),
    "learned": lambda shape: GaussianPrior(shape, learned=True),
    "classes": lambda shape: GaussianPrior(shape, classes=3),
    "mixture": lambda shape: GaussianMixturePrior(shape, MEANS),
    "fixed mixture": lambda shape: GaussianMixturePrior(shape, MEANS, learned=False),
    "logistic": lambda shape: LogisticPrior(shape),
}
every_prior = pytest.mark.parametrize("name", PRIORS)
every_shape = pytest.mark.parametrize("shape", [VECTOR, IMAGE], ids=str)
F64 = torch.float64


def trained(name, shape):
    return randomize(PRIORS[name](shape), std=0.3).double()


def classes(name, n, k=None):
    return None if name != "classes" else torch.arange(n) % 3 if k is None else torch.full((n,), k)


def columns(v, shape):
    """``[..., C]`` at every position of a latent."""
    return v.view(*v.shape, *[1] * (len(shape) - 1)).expand(*v.shape[:-1], *shape)


def expected(prior, name, shape, context=None):
    """The density as a distribution over latents; ``context`` is one class."""
    if name == "logistic":
        uniform = Uniform(torch.zeros(shape, dtype=F64), torch.ones(shape, dtype=F64), validate_args=False)
        return Independent(TransformedDistribution(uniform, SigmoidTransform().inv), len(shape))
    if name == "standard":
        mean, scale = torch.zeros(shape, dtype=F64), torch.ones(shape, dtype=F64)
    else:
        mean, scale = columns(prior.mean, shape), columns(prior.log_scale.exp(), shape)
    mean, scale = (mean, scale) if context is None else (mean[context], scale[context])
    density = Independent(Normal(mean, scale), len(shape))
    return MixtureSameFamily(Categorical(logits=prior.logit), density) if "mixture" in name else density


@every_prior
@every_shape
def test_log_prob(name, shape):
    prior, z = trained(name, shape), 3 * torch.randn(5, *shape, dtype=F64)
    z[4] = 30  # where 1 - sigmoid rounds to 0 and e^z does not
    context = classes(name, 5)
    found = prior.log_prob(z, context)
    assert found.shape == (5,) and found.dtype == F64
    if name == "logistic":
        z = z[:4]
    wanted = torch.stack(
        [
            expected(prior, name, shape, None if context is None else context[i]).log_prob(v)
            for i, v in enumerate(z)
        ]
    )
    torch.testing.assert_close(found[: len(z)], wanted, rtol=1e-12, atol=1e-12)
    if name == "logistic":
        torch.testing.assert_close(
            found[4:], torch.tensor([-30.0 * z[0].numel()], dtype=F64), rtol=1e-12, atol=0
        )
    single = copy.deepcopy(prior).float().log_prob(z.float(), None if context is None else context[: len(z)])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=1e-6, atol=1e-5)
    assert prior.log_prob(z[:0], classes(name, 0)).shape == (0,)


@every_prior
def test_density_integrates_to_one(name):
    prior, line = trained(name, VECTOR), torch.linspace(-40, 40, 801, dtype=F64)
    z = torch.cartesian_prod(line, line)
    total = prior.log_prob(z, classes(name, len(z), 1)).exp().sum() * 0.1**2
    assert (
        abs(total.item() - 1) < 1e-9
    )  # of smooth densities that end well inside, sums over a grid are exact


@every_prior
def test_gradients(name):
    prior, z = trained(name, VECTOR), torch.randn(3, 2, dtype=F64)
    parameters = list(prior.parameters())
    assert len(parameters) == {"learned": 2, "classes": 2, "mixture": 3}.get(name, 0)
    context = classes(name, 3)
    assert torch.autograd.gradcheck(
        lambda z, *_: prior.log_prob(z, context), (z.requires_grad_(), *parameters)
    )


@every_prior
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_of_the_density(name, temperature):
    """Each value's distribution function, by whole images, since a component of the mixture is that of a whole latent."""
    prior, n = trained(name, IMAGE), 20000
    like = torch.empty(0, dtype=F64)
    x = prior.sample(n, like, temperature, classes(name, n, 2), torch.Generator().manual_seed(1))
    assert x.shape == (n, *IMAGE) and x.dtype == F64
    if name == "logistic":
        cdf = torch.sigmoid(x / temperature)
    else:
        terms = (
            (torch.zeros(1, 2), torch.ones(1, 2))
            if name == "standard"
            else (prior.mean.view(-1, 2), prior.log_scale.exp().view(-1, 2))
        )
        mean, scale = (columns(v.double(), IMAGE).unsqueeze(1) for v in terms)
        weights = (
            prior.logit.softmax(0) if "mixture" in name else torch.ones(len(mean), dtype=F64) / len(mean)
        )
        if name == "classes":
            mean, scale, weights = mean[2:], scale[2:], torch.ones(1, dtype=F64)
        cdf = (weights.view(-1, *[1] * 4) * Normal(mean, temperature * scale).cdf(x)).sum(0)
    cdf = cdf.detach().flatten(1).sort(0).values
    steps = torch.arange(1, n + 1, dtype=F64).unsqueeze(1) / n
    # Kolmogorov and Smirnov's bound, passed by chance once in a million
    assert (cdf - steps).abs().max() < 2.7 / n**0.5
    assert cdf.min() < 10 / n and cdf.max() > 1 - 10 / n


def test_a_component_is_that_of_a_whole_latent():
    prior = GaussianMixturePrior(IMAGE, torch.tensor([[-50.0, -50.0], [50.0, 50.0]]))
    with torch.no_grad():
        prior.logit.copy_(torch.tensor([0.25, 0.75]).log())
    signs = prior.sample(4000, torch.empty(0)).sign().flatten(1)
    assert (signs == signs[:, :1]).all()
    assert abs((signs[:, 0] > 0).float().mean() - 0.75) < 5 * (0.25 * 0.75 / 4000) ** 0.5


@every_prior
def test_temperature_and_seed(name):
    prior, like, context = trained(name, IMAGE), torch.empty(0, dtype=F64), classes(name, 6)

    def draw(seed, temperature=1.0):
        return prior.sample(6, like, temperature, context, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    cold = draw(1, 0.0)
    means = columns(prior.mean, IMAGE) if hasattr(prior, "mean") else torch.zeros(IMAGE, dtype=F64)
    if name == "classes":
        assert torch.equal(cold, means[context])
    elif "mixture" in name:
        assert all(any(torch.equal(v, m) for m in means) for v in cold)
    else:
        assert torch.equal(cold, means.expand(6, *IMAGE))
    torch.testing.assert_close(draw(1, 0.25) - cold, 0.25 * (draw(1) - cold), rtol=1e-10, atol=1e-12)
    torch.manual_seed(5)
    first = prior.sample(6, like, context=context)
    torch.manual_seed(5)
    assert torch.equal(prior.sample(6, like, context=context), first)
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert prior.sample(0, like, context=classes(name, 0)).shape == (0, *IMAGE)


@pytest.mark.parametrize("noise, sign", [(0, -1), (65535 / 65536, 1)], ids=["smallest", "largest"])
def test_logistic_samples_are_finite(noise, sign, monkeypatch):
    """The smallest and the largest of the 2^32 uniform numbers lie 2^-33 from 0 and from 1."""
    monkeypatch.setattr(ops, "uniform_noise", lambda size, *_, **kw: torch.full(size, noise, **kw))
    x = LogisticPrior((1,)).sample(1, torch.empty(0))
    torch.testing.assert_close(x, torch.tensor([[sign * 33 * math.log(2)]]), rtol=1e-6, atol=0)


def test_logistic_tails():
    """Values as large as one in ten million, which 16 bits of noise alone would not reach, and none that is infinite."""
    x = LogisticPrior((1000,)).sample(1000, torch.empty(0), generator=torch.Generator().manual_seed(1))
    assert x.isfinite().all() and x.max() > 12 and x.min() < -12  # 1 in 160,000, of a million


@pytest.mark.parametrize("learned", [True, False])
def test_what_a_mixture_learns_and_keeps(learned):
    prior = GaussianMixturePrior(VECTOR, MEANS, learned=learned)
    assert len(list(prior.parameters())) == 3 * learned and set(prior.state_dict()) == {
        "mean",
        "log_scale",
        "logit",
    }
    other = GaussianMixturePrior(VECTOR, torch.zeros(3, 2), learned=learned)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(4, 2)
    assert torch.equal(other.log_prob(z), prior.log_prob(z))
    given = MEANS.clone()
    prior = GaussianMixturePrior(VECTOR, given, learned=learned)
    given.zero_()
    assert torch.equal(prior.mean, MEANS)


def test_what_is_learned_starts_as_the_standard_gaussian():
    z = torch.randn(4, *IMAGE, dtype=F64)
    standard = GaussianPrior(IMAGE).log_prob(z)
    torch.testing.assert_close(
        GaussianPrior(IMAGE, learned=True).double().log_prob(z), standard, rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        GaussianPrior(IMAGE, classes=2).double().log_prob(z, torch.tensor([0, 1, 1, 0])),
        standard,
        rtol=1e-14,
        atol=0,
    )


def of_context(shape, hidden=None):
    return GaussianPrior(shape, context_features=3, hidden=hidden)


conditional = pytest.mark.parametrize(
    ("shape", "hidden"), [(VECTOR, None), (IMAGE, None), (VECTOR, 4), (IMAGE, 4)]
)


@conditional
def test_a_prior_given_the_context(shape, hidden):
    """The density and the samples are those of the Gaussians that the network names, one for each row."""
    z, context = torch.randn(5, *shape, dtype=F64), torch.randn(5, 3, dtype=F64)
    prior = of_context(shape, hidden).double()
    torch.testing.assert_close(prior.log_prob(z, context), GaussianPrior(shape).log_prob(z))
    prior = randomize(prior, std=0.3)
    mean, log_scale = (columns(v, shape) for v in prior.net(context).chunk(2, dim=1))
    expected = Independent(Normal(mean, log_scale.exp()), len(shape)).log_prob(z)
    torch.testing.assert_close(prior.log_prob(z, context), expected, rtol=1e-12, atol=1e-12)
    noise, found = (
        p.sample(5, z, 0.5, c, torch.Generator().manual_seed(1))
        for p, c in ((GaussianPrior(shape), None), (prior, context))
    )
    torch.testing.assert_close(found, mean + log_scale.exp() * noise, rtol=1e-12, atol=1e-12)
    assert prior.log_prob(z[:0], context[:0]).shape == (0,)
    assert prior.sample(0, z, context=context[:0]).shape == (0, *shape)


@conditional
def test_derivatives_of_a_prior_given_the_context(shape, hidden):
    prior = randomize(of_context(shape, hidden), std=0.3).double()
    z, context = torch.randn(3, *shape, dtype=F64), torch.randn(3, 3, dtype=F64)
    names, parameters = zip(*prior.named_parameters(), strict=True)
    prior.forward = prior.log_prob

    def log_prob(z, context, *parameters):
        return torch.func.functional_call(prior, dict(zip(names, parameters, strict=True)), (z, context))

    def sample(context, *_):
        return prior.sample(3, z, context=context, generator=torch.Generator().manual_seed(1))

    variables = [v.detach().clone().requires_grad_() for v in (z, context, *parameters)]
    assert torch.autograd.gradcheck(log_prob, variables)
    assert torch.autograd.gradgradcheck(log_prob, variables, fast_mode=True)
    assert torch.autograd.gradcheck(sample, (context.clone().requires_grad_(), *parameters))
    score = torch.func.grad(lambda z, c: prior.log_prob(z[None], c[None])[0], argnums=(0, 1))
    one_by_one = [torch.stack(v) for v in zip(*map(score, z, context), strict=True)]
    torch.testing.assert_close(torch.vmap(score)(z, context), tuple(one_by_one))


ONE_OF_EACH = [make(VECTOR) for make in PRIORS.values()]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: GaussianPrior(VECTOR, classes=0), "classes: got 0, expected a positive integer or None"),
        (lambda: GaussianPrior(VECTOR, classes=1.5), "classes: got 1.5, expected a positive integer or None"),
        (lambda: GaussianMixturePrior(VECTOR, torch.zeros(3)), r"means: got shape \[3\], expected \[K, 2\]"),
        (
            lambda: GaussianMixturePrior(VECTOR, torch.zeros(2, 3)),
            r"means: got shape \[2, 3\], expected \[K, 2\]",
        ),
        (
            lambda: GaussianMixturePrior(VECTOR, torch.zeros(0, 2)),
            r"means: got shape \[0, 2\], expected \[K, 2\]",
        ),
        (
            lambda: GaussianPrior(VECTOR, 3).log_prob(torch.zeros(2, 2)),
            r"context: got None, expected int64 classes \[2\] in \[0, 3\)",
        ),
        (
            lambda: GaussianPrior(VECTOR, 3).log_prob(torch.zeros(2, 2), torch.zeros(2)),
            r"context: got torch.float32 of shape \[2\]",
        ),
        (
            lambda: GaussianPrior(VECTOR, 3).sample(3, torch.zeros(0), context=torch.tensor([1])),
            r"context: got torch.int64 of shape \[1\]",
        ),
        (
            lambda: GaussianPrior(VECTOR, context_features=0),
            "context_features: got 0, expected a positive integer or",
        ),
        (
            lambda: GaussianPrior(VECTOR, context_features=2, hidden=-1),
            "hidden: got -1, expected a positive integer or",
        ),
        (lambda: GaussianPrior(VECTOR, hidden=4), "hidden: got 4, expected None without context_features"),
        (
            lambda: GaussianPrior(VECTOR, 3, context_features=2),
            "classes: got 3, expected None with context_features",
        ),
        (
            lambda: of_context(VECTOR).log_prob(torch.zeros(2, 2)),
            r"context: got None, expected torch.float32 of shape \[2, 3\]",
        ),
        (
            lambda: of_context(VECTOR).log_prob(torch.zeros(2, 2), torch.zeros(1, 3)),
            r"context: got shape \[1, 3\], expected torch.float32 of shape \[2, 3\]",
        ),
        (
            lambda: of_context(VECTOR).sample(2, torch.zeros(0), context=torch.zeros(2, 3).long()),
            "context: got dtype torch.int64, expected torch.float32",
        ),
        (
            lambda: of_context(VECTOR).sample(2, torch.zeros(0), context=torch.zeros(2, 3).double()),
            "context: got dtype torch.float64, expected torch.float32",
        ),
        *(
            (
                lambda p=p: p.log_prob(torch.zeros(2, 2).long()),
                "z: got dtype torch.int64, expected a floating point",
            )
            for p in ONE_OF_EACH
        ),
        *(
            (lambda p=p: p.log_prob(torch.zeros(2, 3)), r"z: got shape \[2, 3\], expected \[2, 2\]")
            for p in ONE_OF_EACH
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@every_prior
@every_shape
def test_second_derivatives_and_vmap(name, shape):
    prior, z = trained(name, shape), torch.randn(3, *shape, dtype=F64)
    context = classes(name, 3)
    variables = [v.detach().clone().requires_grad_() for v in (z, *prior.parameters())]
    names = [n for n, _ in prior.named_parameters()]

    def log_prob(z, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(prior, given, (z, context))

    prior.forward = prior.log_prob
    assert torch.autograd.gradgradcheck(log_prob, variables, fast_mode=True)
    score = torch.func.grad(lambda z, c: prior.log_prob(z[None], None if c is None else c[None])[0])
    found = torch.vmap(score, (0, None if context is None else 0))(z, context)
    one_by_one = [score(z[i], None if context is None else context[i]) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(one_by_one))


def test_the_hessian_of_a_standard_gaussian():
    prior = GaussianPrior((2,))
    found = torch.autograd.functional.hessian(lambda z: prior.log_prob(z[None])[0], torch.tensor([0.3, -1.2]))
    torch.testing.assert_close(found, -torch.eye(2))


def test_uniform():
    """Against torch.distributions inside the box; -inf outside, where that raises."""
    prior = UniformPrior((2, 3), -2.0, 1.5)
    z = prior.sample(2000, torch.empty(0, dtype=F64), generator=torch.Generator().manual_seed(0))
    expected = (
        Uniform(torch.tensor(-2.0, dtype=F64), torch.tensor(1.5, dtype=F64)).log_prob(z).flatten(1).sum(1)
    )
    torch.testing.assert_close(prior.log_prob(z), expected)
    assert (
        z.min() > -2 and z.max() < 1.5 and abs(z.mean() + 0.25) < 0.05 and abs(z.var() - 3.5**2 / 12) < 0.05
    )
    assert (prior.sample(9, z, temperature=0) == -0.25).all()
    z[0, 1, 2], z[1, 0, 0] = 1.51, -2.01
    assert prior.log_prob(z[:3]).isinf().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="high: got 1.0, expected a finite number above low, 1.0"):
        UniformPrior((2,), 1.0, 1.0)
    with pytest.raises(ValueError, match="low: got -inf, expected a finite number"):
        UniformPrior((2,), -math.inf)


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (Uniform(torch.zeros(2), torch.ones(2), validate_args=True), [0.5, 0.1], [0.5, 1.1]),
        (
            Independent(Uniform(torch.zeros(2), torch.ones(2), validate_args=True), 1, validate_args=True),
            [0.5, 0.1],
            [-0.1, 1.1],
        ),
        (Gamma(torch.ones(2), torch.ones(2), validate_args=True), [0.5, 0.1], [-0.5, 0.1]),
        (Dirichlet(torch.ones(2), validate_args=True), [0.25, 0.75], [0.5, 0.75]),
        (
            TransformedDistribution(Normal(torch.zeros(2), 1.0), ExpTransform(), validate_args=True),
            [0.5, 0.1],
            [0.5, -0.1],
        ),
    ],
    ids=["Uniform", "Independent", "Gamma", "Dirichlet", "TransformedDistribution"],
)
def test_outside_the_support_of_a_distribution(distribution, inside, outside):
    prior = DistributionPrior(distribution)
    z = torch.tensor([inside, outside, inside], requires_grad=True)
    log_prob = prior.log_prob(z)
    expected = distribution.log_prob(torch.tensor(inside)).sum()
    torch.testing.assert_close(log_prob[::2].detach(), expected.expand(2))
    assert log_prob[1] == -math.inf
    if log_prob.requires_grad:  # not of uniform densities
        assert torch.autograd.grad(log_prob[0], z)[0][0].isfinite().all()
    assert distribution._validate_args
    assert not prior.log_prob(torch.full((1, 2), math.nan)).isfinite().any()


class Undescribed(torch.distributions.Distribution):
    """The density of N(0, 1) on vectors [2]; it declares no support."""

    arg_constraints = {}

    def __init__(self):
        super().__init__(torch.Size([2]), validate_args=False)

    def log_prob(self, value):
        return Normal(0.0, 1.0).log_prob(value)


def test_a_distribution_without_a_declared_support():
    z = torch.randn(5, 2)
    torch.testing.assert_close(DistributionPrior(Undescribed()).log_prob(z), Undescribed().log_prob(z).sum(1))
