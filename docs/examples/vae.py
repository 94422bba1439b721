"""A VAE whose posterior is a diagonal Gaussian, an inverse autoregressive flow, or a Sylvester flow, at equal CPU time.

From a clean clone, after `make setup` (three minutes of one core, and one for the bounds of test images):

    .venv/bin/python docs/examples/vae.py --out vae.png

The latents z of an image x have the prior N(0, I). The encoder makes features h of x, and the posterior q(z | h) is a
`FlowModel` with the context h: a Gaussian, and a flow from its samples to z. Images are binarized: in training each
pixel is white with the probability of its gray value, drawn anew in each step, and once for the test images.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import fastflow.nn as fnn
from fastflow.models import FlowModel
from fastflow.trainer import data


def iaf(latents, features, layers):
    """Inverse autoregressive flow: the fast direction of masked autoregressive layers makes z."""
    options = {"context_features": features, "activation": "elu"}
    for i in range(layers):
        order = None if i % 2 == 0 else "reverse"
        net = fnn.MaskedNetwork(latents, 2, hidden=(64,), order=order, **options)
        yield fnn.MaskedAutoregressive(net)


def sylvester(latents, features, layers):
    for _ in range(layers):
        yield fnn.Sylvester(latents, hidden=8, reflections=8, context_features=features)


FLOWS = {"diagonal Gaussian": lambda *_: (), "IAF": iaf, "Sylvester": sylvester}


def network(*widths):
    """Linear layers with ReLU in between."""
    layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    def __init__(self, pixels, posterior_layers, latents, hidden, layers):
        super().__init__()
        self.encoder = nn.Sequential(network(pixels, hidden, hidden), nn.ReLU())
        self.decoder = network(latents, hidden, hidden, pixels)
        self.prior = fnn.GaussianPrior((latents,))
        gaussian = fnn.GaussianPrior((latents,), context_features=hidden)
        # a FlowModel's flow is from data to the Gaussian, here from z to it
        to_z = fnn.Sequential(*posterior_layers(latents, hidden, layers), reversible=False)
        self.posterior = FlowModel(fnn.Inverse(to_z), gaussian)

    def log_weights(self, x, n):
        """log p(x | z) + log p(z) - log q(z | x) of n draws of z for each image: [n, N], nats."""
        z, log_q = self.posterior.rsample_and_log_prob((n,), context=self.encoder(x))
        z = z.flatten(0, 1)
        logits = self.decoder(z)
        log_p = -F.binary_cross_entropy_with_logits(logits, x.repeat(n, 1), reduction="none").sum(1)
        return (log_p + self.prior.log_prob(z)).view(n, len(x)) - log_q

    def reconstructed(self, x):
        z = self.posterior.sample((1,), context=self.encoder(x))[0]
        return self.decoder(z).sigmoid()

    def sampled(self, n):
        return self.decoder(self.prior.sample(n, like=self.decoder[0].weight)).sigmoid()


@torch.no_grad()
def bounds(model, x, n):
    """The ELBO and the importance-weighted bound of n draws, means over images in nats."""
    found = []
    for part in x.split(max(1, 20_000 // n)):
        log_w = model.log_weights(part, n).double()
        found.append(torch.stack([log_w.mean(0), log_w.logsumexp(0) - math.log(n)], dim=1))
    return torch.cat(found).mean(0).tolist()


def train_for(seconds, model, optimizer, images, batch):
    """Training for so much CPU time; the number of steps."""
    steps, start = 0, time.process_time()
    while time.process_time() < start + seconds:
        x = torch.bernoulli(images[torch.randint(len(images), (batch,))] / 255)
        loss = -model.log_weights(x, 1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        steps += 1
    return steps


def draw(path, curves, rows, shape):
    figure = Figure(figsize=(11, 0.4 + 0.62 * len(rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    axes = left.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.set(xlabel="CPU minutes of training", ylabel="ELBO of test images, nats")
    last = [curve[-1][1] for curve in curves.values()]
    axes.set_ylim(min(last) - 12, max(last) + 2)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    panels = right.subplots(len(rows), 1)
    for panel, (title, images) in zip(panels, rows.items(), strict=True):
        strip = images.view(-1, *shape[1:]).permute(1, 0, 2).flatten(1)
        panel.imshow(strip, cmap="gray", vmin=0, vmax=1)
        panel.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        panel.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/vae.png")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--minutes", type=float, default=1.0, help="CPU time of each training")
    parser.add_argument("--parts", type=int, default=20, help="the models take turns in so many parts")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=300, help="units of each hidden layer")
    parser.add_argument("--layers", type=int, default=4, help="layers of each flow")
    parser.add_argument("--images", type=int, default=5000, help="test images")
    parser.add_argument("--draws", type=int, default=100, help="draws of z for the importance-weighted bound")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = data.load(options.data, options.data_dir, 28 if options.data == "mnist" else None)
    train, _ = source.draw(np.arange(source.length), np.zeros((source.length, 3)))
    train = train.flatten(1).float()
    torch.manual_seed(0)
    test = torch.bernoulli(source.test[: options.images].flatten(1) / 255)
    models, optimizers, steps, curves = {}, {}, {}, {}
    for name, layers in FLOWS.items():
        torch.manual_seed(1)
        models[name] = VAE(train.shape[1], layers, options.latents, options.hidden, options.layers)
        optimizers[name] = torch.optim.Adam(models[name].parameters(), lr=1e-3)
        steps[name], curves[name] = 0, []
    for part in range(1, options.parts + 1):
        for name, model in models.items():
            seconds = 60 * options.minutes / options.parts
            steps[name] += train_for(seconds, model, optimizers[name], train, options.batch)
            curves[name].append((options.minutes * part / options.parts, bounds(model, test, 1)[0]))
    for name, model in models.items():
        elbo, weighted = bounds(model, test, options.draws)
        print(
            f"{name}: {steps[name]:,} steps, ELBO {elbo:.2f}, bound of {options.draws} draws {weighted:.2f} nats,"
            f" {sum(p.numel() for p in model.parameters()):,} parameters"
        )
    few, rows = test[:12], {"test images": test[:12]}
    with torch.no_grad():
        rows |= {f"{name}:\nreconstructions": model.reconstructed(few) for name, model in models.items()}
        rows |= {f"{name}:\nsamples": model.sampled(len(few)) for name, model in models.items()}
    draw(options.out, curves, rows, source.shape)


if __name__ == "__main__":
    main()
