"""VectorGlow's scale function, alternating couplings and priors of one's own."""

import copy
import re

import pytest
import torch
from torch.distributions import Independent, Laplace, Normal

import fastflow
from fastflow.models import VectorGlow
from fastflow.nn import AffineCoupling, GaussianPrior, UniformPrior
from tests.support.cases import randomize


def test_couplings_as_the_exercise_has_them(tmp_path):
    model = randomize(VectorGlow(5, steps=3, hidden=4, scale="exp", alternate=True), std=0.3).double().eval()
    couplings = [m for m in model.modules() if isinstance(m, AffineCoupling)]
    assert [(m.swap_halves, m.scale) for m in couplings] == [(False, "exp"), (True, "exp"), (False, "exp")]
    x = torch.randn(4, 5, dtype=torch.float64)
    model.flows[0].check(x)
    torch.testing.assert_close(model.decode(model.encode(x)), x)
    fastflow.save(tmp_path / "model.pt", model)
    torch.testing.assert_close(fastflow.load(tmp_path / "model.pt").log_prob(x), model.log_prob(x))


@pytest.mark.parametrize(
    "prior", [Independent(Laplace(torch.zeros(2), torch.ones(2)), 1), UniformPrior((2,), -9, 9)]
)
def test_any_prior(prior, tmp_path):
    model = VectorGlow(2, steps=1, hidden=4, prior=prior)
    assert model.sample(3).shape == (3, 2) and model.log_prob(torch.zeros(3, 2)).isfinite().all()
    fastflow.save(tmp_path / "model.pt", model)
    other = fastflow.load(
        tmp_path / "model.pt", into=VectorGlow(2, steps=1, hidden=4, prior=copy.deepcopy(prior))
    )
    assert torch.equal(other.log_prob(torch.ones(1, 2)), model.eval().log_prob(torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (
            "uniform",
            "prior: got 'uniform', expected one of 'gaussian', 'mixture', or a Prior or a Distribution",
        ),
        (
            GaussianPrior,
            "prior: got <class 'fastflow.nn.priors.gaussian.GaussianPrior'>, expected one of 'gaussian'",
        ),
        (GaussianPrior((3,)), "prior: got shape [3], expected [2], the shape of the last latent"),
        (
            Normal(0.0, 1.0),
            "distribution: got Normal of shape [], expected a distribution of vectors or images",
        ),
    ],
)
def test_priors_that_do_not_fit(prior, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        VectorGlow(2, steps=1, hidden=4, prior=prior)
