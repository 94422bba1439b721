"""A classifier of reversible residual blocks: accuracy on digits, and memory against the number of blocks.

From a clean clone, after `make setup` (about two minutes of one core, on Linux):

    .venv/bin/python docs/examples/reversible.py --out reversible.png

A block adds a function of one half of the channels to the other half, and then a function of the result to the first
(Prince, *Understanding Deep Learning*, eq. 16.18). `Sequential` recomputes activations from its output, and
`WithoutLogDet` makes it a layer of an ordinary network. The same network with stored activations is trained too.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastflow.nn as fnn

WAYS = {"stored": False, "reversible": True}


def branch(channels):
    layers = (
        (nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)
    )
    return nn.Sequential(*(m for layer in layers for m in layer))


def classifier(blocks, channels, reversible):
    # the first coupling of a block transforms the first half given the second
    halves = [fnn.AdditiveCoupling(branch(channels // 2), swap_halves=i % 2 == 0) for i in range(2 * blocks)]
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        fnn.WithoutLogDet(fnn.Sequential(*halves, reversible=reversible)),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def trained(model, x, y, options):
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = options.epochs * (len(x) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(options.epochs):
        for chosen in torch.randperm(len(x))[: len(x) // options.batch * options.batch].split(options.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def resident(name):
    """VmRSS, the memory of this process, or VmHWM, its peak, in MiB."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def two_steps(model, x):
    for _ in range(2):
        model.zero_grad()
        model(x).logsumexp(1).sum().backward()


def peak(blocks, reversible, options):
    """The peak of two training steps in this process over the memory before them, without gradients, in MiB."""
    two_steps(classifier(1, 4, reversible), torch.randn(2, 1, 8, 8))  # loads what any step needs
    model = classifier(blocks, options.channels, reversible)
    x = torch.randn(options.measured_batch, 1, options.size, options.size)
    before = resident("VmRSS")
    two_steps(model, x)
    gradients = sum(p.nbytes for p in model.parameters()) / 2**20
    return resident("VmHWM") - before - gradients


def peak_in_a_process(blocks, way, options):
    names = "channels", "measured_batch", "size"
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, "--one", way, str(blocks), *given]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors return to the system
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/reversible.png")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the classifier that is trained")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--measured", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="blocks")
    parser.add_argument("--measured-batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=28, help="side of the images whose memory is measured")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "BLOCKS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.one:
        way, blocks = options.one
        print(peak(int(blocks), WAYS[way], options))
        return
    from matplotlib.figure import Figure  # not a part of the memory that is measured
    from sklearn.datasets import load_digits

    memory = {way: [peak_in_a_process(n, way, options) for n in options.measured] for way in WAYS}
    digits = load_digits()
    torch.manual_seed(0)
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    y, order = torch.from_numpy(digits.target), torch.randperm(len(x))
    test, train = order[:400], order[400:]
    for way, reversible in WAYS.items():
        torch.manual_seed(0)
        model = classifier(options.blocks, options.channels, reversible)
        model = trained(model, x[train], y[train], options)
        with torch.no_grad():
            right = (model(x[test]).argmax(1) == y[test]).double().mean().item()
        print(f"{way}: {100 * right:.2f}% of {len(test)} test digits")
    for n, *both in zip(options.measured, *memory.values(), strict=True):
        print(f"{n} blocks: stored {both[0]:.1f} MiB, reversible {both[1]:.1f} MiB")

    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for way, values in memory.items():
        axes.plot(
            options.measured, values, "o-", label=way, color="#555555" if way == "stored" else "#d62728"
        )
    axes.set(xlabel="blocks", ylabel="peak memory of a training step, MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
