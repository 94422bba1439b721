"""Two moons: data, density and samples of a VectorGlow with a Gaussian prior and with a mixture prior.

From a clean clone, after `make setup` (a minute on 2 cores):

    .venv/bin/python docs/examples/density.py --out moons.png
"""

import argparse

import torch
from sklearn.datasets import make_moons
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

from fastflow import explore
from fastflow.models import VectorGlow
from fastflow.trainer import picture

LIMITS = (-1.75, 2.75), (-1.25, 1.75)


def moons(n, seed):
    return torch.from_numpy(make_moons(n, noise=0.05, random_state=seed)[0]).float()


def trained(prior, steps=1000, batch=2048, lr=5e-3):
    torch.manual_seed(0)
    model = VectorGlow(prior=prior, reversible=False)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), desc=f"{prior} prior"):
        loss = -model.log_prob(moons(batch, seed=step)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/density.png")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=500, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    held_out, densities = moons(20_000, seed=10**6), {}
    mixture = GaussianMixture(10, random_state=0).fit(moons(20_000, seed=10**6 + 1))
    print(f"mixture of 10 Gaussians: held-out log-likelihood {mixture.score(held_out):.4f} nats")
    for prior in ("gaussian", "mixture"):
        model = trained(prior, options.steps)
        density, integral = explore.density(model, LIMITS, options.size)
        with torch.no_grad():
            log_likelihood = model.log_prob(held_out).mean().item()
        print(
            f"{prior} prior: held-out log-likelihood {log_likelihood:.4f} nats, integral of the density {integral:.5f}"
        )
        densities[f"{prior} prior"] = density, model.sample(5000)
    picture.save_densities(options.out, held_out[:5000], densities, LIMITS)


if __name__ == "__main__":
    main()
