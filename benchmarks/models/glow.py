"""Times a Glow, plain PyTorch, nflows and normflows: forward and backward, log_prob, and sampling.

    pip install --no-deps nflows normflows    # optional, to compare with them
    python -m benchmarks.models.glow

All providers have the same weights. Their bits/dim, gradients and samples are compared with plain PyTorch's
in float64 before anything is timed. ``log_prob`` is bits/dim without gradients; it is compared as well.

Each of the two libraries has a coupling that the other lacks, so there are two cases. ``soft_clamp``,
FastFlow's default, is compared with nflows: its ActNorm, OneByOneConvolution and AffineCouplingTransform
(with this scale function). ``sigmoid, shift first``, from OpenAI's Glow, is compared with normflows'
GlowBlock. Both have the same networks, squeezes and splits. ``plain`` is benchmarks/models/plain_glow.py.
If a library is faster than it in the same run, no row is written. On a GPU the second case needs normflows;
benchmarks/gpu_pass.sh has no time for it otherwise.

The other providers, all in channels_last as in the trainer:

- ``fastflow``: with stored activations, as in the libraries;
- ``fastflow, reversible``: FastFlow's default;
- ``fastflow, networks compiled``: after ``model.compile_networks()``;
- ``torch.compile of fastflow``: the whole model compiled.

Each provider runs in its own process, and the processes take turns. In one process all share a heap, and
other providers' tensors decide how often memory is returned to the system and fetched again.

Rows go to results/glow.csv. The table of docs/training.md is rewritten.
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

from benchmarks.models import libraries, plain_glow
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
TOLERANCE = 1e-9  # in float64, over the largest value


def build(coupling: str, side: int, levels: int, steps: int, hidden: int, batch: int) -> Glow:
    """A Glow whose weights nflows can represent: no permutation, positive diagonals."""
    torch.manual_seed(0)
    model = Glow((3, side, side), levels=levels, steps=steps, hidden=hidden, reversible=False)
    with torch.no_grad():
        for step in (step for level in model.flows for step in level.steps):
            libraries.settle(step, coupling)
    model.initialize(torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    return model.train()


class Provider:
    """A model to time: ``bits(x, noise, seed)``, ``sample(n, generator)``, parameters by a Glow's names."""

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
    """A PlainGlow with steps of a given kind. ``same_noise``: samples use a Glow's noise, not torch.randn."""

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
    """Functions that make each provider from a model, plain PyTorch first."""
    found: dict[str, Callable[[Glow], Provider]] = {"plain": Plain}
    library = libraries.COUPLINGS[coupling]
    if libraries.installed(library):
        found[library] = lambda model: Plain(model, libraries.step(library))
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
    """The largest error of each provider's bits/dim and gradients, relative to the first provider's largest.

    Raises ValueError if an error exceeds the tolerance, or if a sample differs by more than 1 of 255 or in
    more than 1 of 1000 pixel values.
    """
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
                f"{name}: {worst} is off by {each[worst]:.1e} of its largest value, a pixel by {off.max()}; "
                "no row is written"
            )
    return errors


def work(pipe, name: str, coupling: str, shape: tuple, device: str) -> None:
    """Runs a provider in its own process.

    Receives ``(mode, seconds)`` and sends the times of that turn, until it receives None.
    """
    warnings.filterwarnings("ignore", message=libraries.DEPRECATED)
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
    """Percentiles 20, 50 and 80 of the milliseconds of each provider, by mode."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in tqdm(names, desc="starting, compiling", leave=False):
        pipe, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(theirs, name, coupling, shape, options.device), daemon=True
        )
        process.start()
        theirs.close()
        workers[name] = pipe, process
        if options.compiled:  # one after the other: two that compile at once take longer
            pipe.recv()
    if not options.compiled:
        for pipe, _ in workers.values():
            pipe.recv()
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
        for c, library in libraries.COUPLINGS.items()
        if device == "cpu" or c == "soft_clamp" or libraries.installed(library)
    ]


def measure(size: str, coupling: str, shape: tuple, options: argparse.Namespace) -> list[dict]:
    side, *_, batch = shape
    exact = build(coupling, *shape).double().to(options.device)
    found = {name: make(exact) for name, make in ways(coupling, compiled=False).items()}
    errors = check(found, inputs(side, batch, options.device, torch.float64), TOLERANCE)
    del found, exact
    measured = times(list(ways(coupling, compiled=options.compiled)), coupling, shape, options)
    about, rows, library = harness.metadata(options.device), [], libraries.COUPLINGS[coupling]
    for mode, each in measured.items():
        plain, theirs = each["plain"][1], each.get(library, each["plain"])[1]
        if plain > theirs and not options.quick:
            took = f"plain PyTorch takes {plain:.1f} ms, {library} {theirs:.1f}"
            raise ValueError(f"{size}, {coupling}, {mode}: {took}: a straw man; no row is written")
        for name, (p20, p50, p80) in each.items():
            row = {"size": size, "coupling": coupling, "mode": mode, "provider": name}
            row |= {"p20_ms": f"{p20:.2f}", "p50_ms": f"{p50:.2f}", "p80_ms": f"{p80:.2f}"}
            row |= {"images_s": f"{1e3 * batch / p50:.1f}", "ratio": f"{p50 / plain:.3f}"}
            # compiled providers are the modules that were compared
            row |= {"error": f"{errors.get(name, max(errors.values())):.1e}", "tolerance": f"{TOLERANCE:.0e}"}
            rows.append(row | about)
    return rows


def table(rows: list[dict]) -> str:
    about = "{device}, torch {torch}, commit {commit}".format(**rows[0])
    return f"{report.glow_table(rows)}\n\n(p50; in parentheses the ratio to plain PyTorch's; {about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of training.md")
        parser.set_defaults(seconds=20.0)

    options = harness.arguments(__doc__, argv, add)
    warnings.filterwarnings("ignore", message=libraries.DEPRECATED)
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
