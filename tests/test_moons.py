"""Two moons: Glow's steps on vectors learn the density, with a mixture as the prior, better than a mixture of 10 Gaussians does."""

import runpy
from pathlib import Path

import pytest
import torch

from fastflow import explore

pytest.importorskip("sklearn")
mixture = pytest.importorskip("sklearn.mixture")
pytest.importorskip("tqdm")

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "examples" / "density.py"))
moons, trained = EXAMPLE["moons"], EXAMPLE["trained"]


@pytest.fixture(scope="module")
def held_out():
    return moons(20_000, seed=10**6)


@pytest.fixture(scope="module")
def ten_gaussians(held_out):
    return mixture.GaussianMixture(10, random_state=0).fit(moons(20_000, seed=10**6 + 1)).score(held_out)


@pytest.mark.slow
def test_the_density_is_one_and_above_a_mixture_of_gaussians(held_out, ten_gaussians):
    model = trained("mixture", steps=350, batch=512)
    _, integral = explore.density(model, EXAMPLE["LIMITS"], size=400)
    assert integral == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        assert model.log_prob(held_out).mean().item() > ten_gaussians
