"""A Glow beside plain PyTorch, torch.compile of that, nflows and normflows: forward and backward, log_prob, and sampling.

    pip install --no-deps nflows normflows    # to compare with; one that is not installed is left out
    python -m benchmarks.models.glow

All have the same weights and compute the same: bits/dim, gradients and samples are compared with plain PyTorch's in float64 before anything
is timed. ``log_prob`` is bits/dim without gradients, as one scores images; its results are compared too.

Each of the two libraries has a coupling that the other has not, so there are two cases: ``soft_clamp``, the default here, beside nflows,
and ``sigmoid, shift first``, that of OpenAI's Glow, beside normflows. ``nflows`` has its ActNorm, OneByOneConvolution and
AffineCouplingTransform (with this scale function), ``normflows`` its GlowBlock, both around the same networks, squeezes and splits.
``plain`` is benchmarks/models/plain_glow.py, and has to be no slower than the library in the same run: a straw man would void the rows.
On a GPU
the second case is left out where normflows is not installed: that comparison is what it is for, and benchmarks/gpu_pass.sh has no time for
as much again.

``fastflow`` is the library with stored activations, as the others have them, ``reversible`` its default, ``networks compiled`` after
``model.compile_networks()``, ``torch.compile of fastflow`` the whole model; all in channels_last, as the trainer has it. Each is timed in a
process of its own, as one would run it, in turns with the others: in one process all share a heap, and how often a step's large tensors are
given back to the system and fetched again depends on what the others keep there.

Rows go to results/glow.csv, and the table of docs/training.md is written anew.
"""

import argparse
import copy
import itertools
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.models import plain_glow, published
from benchmarks.tools import harness, page, report
from fastflow import ops
from fastflow.models import Glow
from fastflow.ops.noise import random_seed

SIZES = {"L=3 K=8 hidden 128 batch 16": (32, 3, 8, 128, 16)}
ON_A_GPU = {
    "L=3 K=32 hidden 512 batch 64": (32, 3, 32, 512, 64),
    "L=3 K=32 hidden 512 batch 256": (32, 3, 32, 512, 256),
}
QUICK = {"L=2 K=2 hidden 8 batch 3": (8, 2, 2, 8, 3)}
TOLERANCE = 1e-9  # of float64, over the largest value


def build(coupling: str, side: int, levels: int, steps: int, hidden: int, batch: int) -> Glow:
    """A Glow with weights that nflows can have too: no permutation, and positive diagonals."""
    torch.manual_seed(0)
    model = Glow((3, side, side), levels=levels, steps=steps, hidden=hidden, reversible=False)
    with torch.no_grad():
        for step in (step for level in model.flows for step in level.steps):
            published.settle(step, coupling)
    model.initialize(torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    return model.train()


class Provider:
    """``bits(x, noise, seed)``, ``sample(n, generator)`` and the parameters that it has by a Glow's names."""

    def __init__(self, made: nn.Module, names: dict[str, nn.Parameter], compiled: bool = False) -> None:
        self.made, self.names = made, names
        self.parameters = list(made.parameters())
        self.forward, self.decode = made, made.sample
        if compiled:
            self.forward, self.decode = (torch.compile(f, dynamic=False) for f in (made, made.sample))

    def bits(self, x, noise, seed):
        return self.forward(x, seed=torch.tensor(seed, device=x.device))

    def sample(self, n, generator):
        return self.decode(n) if self.forward is not self.made else self.decode(n, generator=generator)


class Plain(Provider):
    """A PlainGlow, of steps of one kind or another; ``same_noise`` is that of a Glow's samples, in place of torch.randn."""

    def __init__(self, model: Glow, step=plain_glow.Step, compiled: bool = False) -> None:
        made = plain_glow.PlainGlow(model, step).train()
        own = {id(p) for p in made.parameters()}
        super().__init__(made, {name: p for name, p in model.named_parameters() if id(p) in own}, compiled)
        self.shapes, self.like, self.same_noise = model.latent_shapes(), model.dequantize.like, False

    def bits(self, x, noise, seed):
        return self.forward(x, noise)

    def sample(self, n, generator):
        about = {"dtype": self.like.dtype, "device": self.like.device}
        if not self.same_noise:
            return self.decode([torch.randn(n, *shape, **about) for shape in self.shapes])
        noise = [
            ops.gaussian_sample(
                (n, *shape), None, None, seed=random_seed(self.like.device, generator), **about
            )
            for shape in reversed(self.shapes)
        ]
        return self.decode(noise[::-1])


def fastflow(model: Glow, reversible: bool = False, compiled: bool = False) -> Provider:
    made = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for flow in made.flows:
        flow.reversible = reversible
    return Provider(made, dict(made.named_parameters()), compiled)


def ways(coupling: str, compiled: bool) -> dict[str, Callable[[Glow], Provider]]:
    """What makes each provider of a model; plain PyTorch first."""
    found: dict[str, Callable[[Glow], Provider]] = {"plain": Plain}
    library = published.COUPLINGS[coupling]
    if published.installed(library):
        found[library] = lambda model: Plain(model, published.step(library))
    found |= {"fastflow": fastflow, "fastflow, reversible": lambda model: fastflow(model, reversible=True)}
    if compiled:
        found["torch.compile of plain"] = lambda model: Plain(model, compiled=True)
        found["fastflow, networks compiled"] = networks_compiled
        found["torch.compile of fastflow"] = lambda model: fastflow(model, compiled=True)
    return found


def networks_compiled(model: Glow) -> Provider:
    provider = fastflow(model)
    provider.made.compile_networks()
    return provider


def inputs(side: int, batch: int, device: str, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
    return x, ops.uniform_noise(tuple(x.shape), seed=1, dtype=dtype, device=device), 1


def step(provider: Provider, given: tuple) -> None:
    for p in provider.parameters:
        p.grad = None
    provider.bits(*given).mean().backward()


@torch.no_grad()
def log_prob(provider: Provider, given: tuple) -> torch.Tensor:
    return provider.bits(*given)


def check(found: dict[str, Provider], given: tuple, tolerance: float) -> dict[str, float]:
    """The largest error of bits/dim and of any gradient that a provider shares with the first, over the largest value. Raises
    ValueError for one above the tolerance, and for a sample that is off by more than a value of a pixel, or in more than 1 in 1000."""
    errors, expected, pixels = {}, None, None
    for name, provider in found.items():
        step(provider, given)
        results = {
            "bits/dim": provider.bits(*given).detach().double(),
            "bits/dim without gradients": log_prob(provider, given).double(),
        }
        results |= {n: p.grad.double() for n, p in provider.names.items()}
        if isinstance(provider, Plain):
            provider.same_noise = True
        sample = provider.sample(len(given[0]), torch.Generator(given[0].device).manual_seed(5)).int()
        if isinstance(provider, Plain):
            provider.same_noise = False
        if expected is None:
            expected, pixels = results, sample
        each = {n: harness.relative_error(v, expected[n]).item() for n, v in results.items()}
        worst = max(each, key=each.get)
        errors[name] = each[worst]
        off = (sample - pixels).abs()
        if not each[worst] <= tolerance or off.max() > 1 or (off > 0).float().mean() > 1e-3:
            raise ValueError(
                f"{name}: {worst} is off by {each[worst]:.1e} of its largest value, a pixel by {off.max()}; no row is written"
            )
    return errors


def work(pipe, name: str, coupling: str, shape: tuple, device: str) -> None:
    """A provider in its process: warmed up, then ``(mode, seconds)`` in and the times of that turn out, until None comes."""
    warnings.filterwarnings("ignore", message=published.DEPRECATED)
    provider = ways(coupling, compiled=True)[name](build(coupling, *shape).to(device))
    given = inputs(shape[0], shape[-1], device, torch.float32)
    generator = torch.Generator(device)
    calls = {
        "forward+backward": lambda: step(provider, given),
        "log_prob": lambda: log_prob(provider, given),
        "sample": lambda: provider.sample(len(given[0]), generator),
    }
    for call in calls.values():
        for _ in range(2):
            call()
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        mode, seconds = asked
        pipe.send(harness.turn(calls[mode], seconds, device))


def times(
    names: list[str], coupling: str, shape: tuple, options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds, p20, p50 and p80, of each provider in each mode."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in tqdm(
        names, desc="starting, compiling", leave=False
    ):  # one after the other: two compiling at once take longer
        pipe, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(theirs, name, coupling, shape, options.device), daemon=True
        )
        process.start()
        theirs.close()
        pipe.recv()
        workers[name] = pipe, process
    taken = {mode: {name: [] for name in names} for mode in report.GLOW_MODES}
    turns = list(itertools.product(taken, range(harness.ROUNDS), names))
    for mode, _, name in tqdm(turns, desc="turns", leave=False):
        pipe, _ = workers[name]
        pipe.send((mode, options.seconds / harness.ROUNDS))
        taken[mode][name] += pipe.recv()
    for pipe, process in workers.values():
        pipe.send(None)
        process.join()
    return {
        mode: {name: [us / 1e3 for us in np.quantile(t, harness.QUANTILES)] for name, t in each.items()}
        for mode, each in taken.items()
    }


def couplings(device: str) -> list[str]:
    return [
        c
        for c, library in published.COUPLINGS.items()
        if device == "cpu" or c == "soft_clamp" or published.installed(library)
    ]


def measure(size: str, coupling: str, shape: tuple, options: argparse.Namespace) -> list[dict]:
    side, *_, batch = shape
    exact = build(coupling, *shape).double().to(options.device)
    found = {name: make(exact) for name, make in ways(coupling, compiled=False).items()}
    errors = check(found, inputs(side, batch, options.device, torch.float64), TOLERANCE)
    del found, exact
    measured = times(list(ways(coupling, compiled=options.compiled)), coupling, shape, options)
    about, rows, library = harness.metadata(options.device), [], published.COUPLINGS[coupling]
    for mode, each in measured.items():
        plain, theirs = each["plain"][1], each.get(library, each["plain"])[1]
        if plain > theirs and not options.quick:
            took = f"plain PyTorch takes {plain:.1f} ms, {library} {theirs:.1f}"
            raise ValueError(f"{size}, {coupling}, {mode}: {took}: a straw man; no row is written")
        for name, (p20, p50, p80) in each.items():
            row = {"size": size, "coupling": coupling, "mode": mode, "provider": name}
            row |= {"p20_ms": f"{p20:.2f}", "p50_ms": f"{p50:.2f}", "p80_ms": f"{p80:.2f}"}
            row |= {"images_s": f"{1e3 * batch / p50:.1f}", "ratio": f"{p50 / plain:.3f}"}
            # compiled ones are the same modules as those that were compared
            row |= {"error": f"{errors.get(name, max(errors.values())):.1e}", "tolerance": f"{TOLERANCE:.0e}"}
            rows.append(row | about)
    return rows


def table(rows: list[dict]) -> str:
    about = f"p50, in parentheses over plain PyTorch's, on {rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}"
    return f"{report.glow_table(rows)}\n\n({about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of training.md")
        parser.set_defaults(seconds=20.0)

    options = harness.arguments(__doc__, argv, add)
    warnings.filterwarnings("ignore", message=published.DEPRECATED)
    sizes = QUICK if options.quick else ON_A_GPU if options.device == "cuda" else SIZES
    rows = []
    for (size, shape), coupling in itertools.product(sizes.items(), couplings(options.device)):
        found = measure(size, coupling, shape, options)
        harness.append(options.results / "glow.csv", found)
        rows += found
    found = table(rows)
    page.write(options.docs / "training.md", {"glow": found})
    print(found)
    return rows


if __name__ == "__main__":
    main()
