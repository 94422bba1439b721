"""Residual flows of photographs of 16x16 pixels, without and with batch normalization inside their networks.

From a clean clone, after `make setup` (some minutes on one core):

    .venv/bin/python docs/examples/residual_batch_norm.py --out residual_batch_norm.png

Batch normalization divides by standard deviations of the data. No bound holds for that, so the network need not be a
contraction. The script measures the largest slope of each network in the data, and what the inverse does.
"""

import argparse

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from fastflow import nn as fnn
from fastflow.models import ResidualFlow
from fastflow.trainer import data


def with_batch_norm(model):
    """Batch normalization after each hidden convolution of each network, as released code of the paper can have."""
    for net in nets(model):
        layers = []
        for layer in net.net:
            hidden = isinstance(layer, fnn.LipschitzConv2d) and layer is not net.net[-1]
            layers += [layer, nn.BatchNorm2d(layer.weight.shape[0])] if hidden else [layer]
        net.net = nn.Sequential(*layers)
    return model


def nets(model):
    return [block.net for block in blocks(model)]


def blocks(model):
    return [m for m in model.modules() if isinstance(m, fnn.Residual)]


def slopes(model, x):
    """The largest singular value of each network's Jacobian in the images x, by power iteration in eval mode."""
    found = []

    def measured(block, given, _):
        h = given[0]
        v = torch.randn_like(h)
        for _ in range(20):
            _, u = torch.func.jvp(block.net, (h,), (v,))
            _, pull = torch.func.vjp(block.net, h)
            v = pull(u)[0]
            v = v / v.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]
        _, u = torch.func.jvp(block.net, (h,), (v,))
        found.append(u.flatten(1).norm(dim=1).max().item())

    hooks = [block.register_forward_hook(measured) for block in blocks(model)]
    with torch.no_grad():
        model.eval().log_prob(x, seed=0)
    for hook in hooks:
        hook.remove()
    model.train()
    return max(found)


@torch.no_grad()
def inverted(model, x):
    """What the inverse does with the latents of x."""
    model.eval()
    try:
        back = model.decode(model.encode(x))
    except RuntimeError as error:
        return str(error)
    wrong = (back != x).sum().item()
    return f"{wrong} of {x.numel()} pixels differ, at most {max(model.inverse_iterations())} iterations"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/residual_batch_norm.png")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--side", type=int, default=16, help="pixels of the corner that is used")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=16)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = data.load(options.data, options.data_dir)
    random = np.random.default_rng(0)
    indices = random.integers(source.length, size=options.samples)
    images, _ = source.draw(indices, random.random((options.samples, 3)))
    images = images[:, :, : options.side, : options.side].contiguous()
    held_out, images = images[:100], images[100:]
    figure = Figure(figsize=(8, 3), layout="constrained")
    losses, largest = figure.subplots(1, 2)
    for name in ("absent", "present"):
        torch.manual_seed(0)
        shape = tuple(images.shape[1:])
        model = ResidualFlow(shape, blocks=2, hidden=options.hidden, scales=2, dense_blocks=None)
        if name == "present":
            model = with_batch_norm(model)
        model.initialize(images[:200])
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        steps, bits, test, slope = [], [], [], []
        for step in tqdm(range(options.steps), desc=name):
            loss = model.train()(images[torch.randint(0, len(images), (options.batch,))]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bits.append(loss.item())
            if (step + 1) % options.every == 0:
                with torch.no_grad():
                    test.append(model.eval()(held_out, seed=0).mean().item())
                slope.append(slopes(model, held_out[:8]))
                steps.append(step + 1)
        print(f"batch normalization {name}: {test[-1]:.3f} bits/dim of held-out images in eval mode,")
        print(f"  {np.mean(bits[-options.every :]):.3f} of the last training batches")
        print(f"  largest slope of a network {slope[-1]:.3f}, during training {max(slope):.3f}")
        print(f"  inverse of held-out images: {inverted(model, held_out[:16])}")
        color = {"absent": "C0", "present": "C1"}[name]
        losses.plot(range(1, len(bits) + 1), bits, color=color, alpha=0.3)
        losses.plot(steps, test, color=color, label=name)
        largest.plot(steps, slope, color=color, label=name)
    largest.axhline(1, color="0.6", linewidth=0.8)
    losses.set(title="bits/dim: training (pale), held out", xlabel="step", ylim=(3, 10))
    largest.set(title="largest slope of a network in the data", xlabel="step", yscale="log")
    largest.legend(title="batch normalization", fontsize=8, title_fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
