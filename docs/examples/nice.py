"""NICE as Su's article trains it: float images with a little noise, networks that end in a ReLU, samples at 0.75.

From a clean clone, after `make setup` (eight minutes on one core):

    .venv/bin/python docs/examples/nice.py --out nice.png

Pixels are x in [0, 1], and training adds noise in [-0.01, 0]. A coupling subtracts a network m >= 0 towards the
latents, so samples add it. The article's networks have 1000 hidden units (`--hidden 1000`), and its loss is
|z|^2 / 2 - sum(s), which leaves out the constant of the Gaussian prior.
"""

import argparse
import math

import numpy as np
import torch
from torch import nn

import fastflow
import fastflow.nn as fnn
from fastflow.models import FlowModel
from fastflow.trainer import data, picture


class Noise(fnn.Flow):
    """Adds uniform noise in [-width, 0] in training mode; the identity in eval mode, and as the inverse."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x, context=None):
        noise = self.width * torch.rand_like(x) if self.training else 0
        return x - noise, x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z, z.new_zeros(len(z))


class MinusReLU(nn.Module):
    def forward(self, x):
        return -x.relu()


def network(features, hidden, layers=5):
    """-m: a coupling adds it to the latents' side, so it subtracts m."""
    widths = [features, *[hidden] * layers, features]
    linear = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    for layer in linear:  # not zeros, from which a last ReLU has no gradient
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    hidden_layers = [m for layer in linear[:-1] for m in (layer, nn.ReLU())]
    return nn.Sequential(*hidden_layers, linear[-1], MinusReLU())


def nice(shape, hidden, noise):
    """Four couplings between the even and the odd pixels, in turn, and a scale."""
    size = math.prod(shape)
    flow = fnn.Sequential(
        Noise(noise),
        fnn.Flatten(shape),
        fnn.Permute(size, "interleaved"),
        *(fnn.AdditiveCoupling(network(size // 2, hidden), swap_halves=i % 2 == 0) for i in range(4)),
        fnn.Scale(size),
        reversible=False,  # noise has no inverse
    )
    return FlowModel(flow, fnn.GaussianPrior((size,)), shape=shape)


@torch.no_grad()
def report(model, x, name):
    size = math.prod(model.shape)
    nats = -torch.cat([model.log_prob(part) for part in x.split(500)]).double().mean().item()
    loss = nats - size / 2 * math.log(2 * math.pi)  # without the constant of the prior
    bits = nats / (size * math.log(2)) + math.log2(255)  # of values that are 255 x
    print(f"{name}: loss {loss:.1f}, {nats:.1f} nats, {bits:.3f} bits/dim")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/nice.png")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--hidden", type=int, default=250, help="units of each hidden layer")
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=0.75)
    options = parser.parse_args(argv)
    source = data.load(options.data, options.data_dir, 28 if options.data == "mnist" else None)
    train, _ = source.draw(np.arange(source.length), np.zeros((source.length, 3)))
    train, test = train / 255, source.test / 255

    torch.manual_seed(0)
    model = nice(source.shape, options.hidden, options.noise)
    history = fastflow.fit(model, train, batch_size=128, max_epochs=options.epochs)
    print(history)
    report(model.eval(), test, "test images")
    report(model.train(), test, "test images with noise")

    samples = model.eval().sample(60, temperature=options.temperature)
    pixels = (255 * samples.clamp(0, 1)).round().to(torch.uint8)
    picture.save_grid(options.out, pixels, columns=12)


if __name__ == "__main__":
    main()
