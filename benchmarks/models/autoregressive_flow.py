"""Times masked autoregressive flows of 5 steps: log-densities, a training step, and samples.

    pip install --no-deps nflows zuko    # optional, to compare with them
    python -m benchmarks.models.autoregressive_flow

A case is a model of nflows or of zuko, affine or with splines, and FastFlow's flow with its weights. Log-densities and
samples of the same latents are compared in float64 before anything is timed; a case that differs has no row.
``D passes`` is FastFlow's flow with the inverse of other libraries: one pass of each network per feature. Without a
library, its cases have FastFlow's own weights. Log-densities and samples have no graph; a training step is forward
and backward, without an optimizer. With a context, each sample has its own.

``--clock processor`` measures the processor time of one thread instead of the time that passes: other programs on the
machine change it little.

Rows go to results/autoregressive_flow.csv. The table of docs/autoregressive.md is rewritten.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models import autoregressive_libraries, libraries
from benchmarks.tools import harness, page, sizes
from fastflow.models import MAF, NeuralSplineFlow
from fastflow.nn import MaskedAutoregressive, Sequential

STEPS = 5
MODES = ("log_prob", "training step", "sample")
PASSES = "D passes"
TOLERANCE = 1e-8  # in float64, over the largest value: samples divide by scales of 1e-3


@dataclass(frozen=True)
class Size:
    """A model: its library, its transformer and its sizes."""

    library: str
    kind: str
    batch: int
    features: int
    context: int
    hidden: int


SIZES = (
    Size("nflows", "affine", 1000, 8, 0, 64),
    Size("nflows", "affine", 1000, 21, 0, 128),
    Size("nflows", "affine", 1000, 64, 0, 512),
    Size("zuko", "affine", 1000, 21, 0, 128),
    Size("zuko", "spline", 4096, 16, 32, 128),
)
QUICK = (Size("nflows", "affine", 6, 3, 0, 8), Size("zuko", "spline", 6, 3, 2, 8))


class Flow:
    """FastFlow's flow with a standard Gaussian prior; ``passes``: with the inverse in D passes."""

    def __init__(self, flow: Sequential, passes: bool = False) -> None:
        self.flow, self.passes = flow, passes

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return with_prior(*self.flow(x, context))

    def decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        if not self.passes:
            return self.flow.inverse(z, context)[0]
        for layer in reversed(self.flow.flows):
            passing = isinstance(layer, MaskedAutoregressive)
            z, _ = layer._in_passes(z, context, None) if passing else layer.inverse(z, context)
        return z


class OfNflows:
    """A transform of nflows with a standard Gaussian prior."""

    def __init__(self, flow: nn.Module) -> None:
        self.transform = flow._transform

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return with_prior(*self.transform(x, context))

    def decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.transform.inverse(z, context)[0]


class OfZuko:
    """A transform of zuko with a standard Gaussian prior."""

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return with_prior(*autoregressive_libraries.latents_of_zuko(self.flow, x, context))

    def decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.transform(context).inv(z)


def with_prior(z: Tensor, log_det: Tensor) -> Tensor:
    """Log-densities, less a constant."""
    return log_det - 0.5 * z.square().sum(1)


def models(size: Size, dtype: torch.dtype, device: str) -> dict[str, object]:
    """FastFlow's flow by name, with the weights of the library's if it is installed; and the leaves of each."""
    torch.manual_seed(0)
    if not libraries.installed(size.library):
        kind = MAF if size.kind == "affine" else partial(NeuralSplineFlow, autoregressive=True)
        own = kind(size.features, size.context or None, steps=STEPS, hidden=size.hidden, reversible=False)
        flow = moved(own, dtype, device).flows[0]
        return {PASSES: Flow(flow, passes=True), "fastflow": Flow(flow)}
    if size.library == "nflows":
        from nflows.flows import MaskedAutoregressiveFlow

        # of one block: its networks have two hidden layers
        theirs = MaskedAutoregressiveFlow(
            size.features, size.hidden, STEPS, 1, use_residual_blocks=False, batch_norm_within_layers=False
        )
        theirs, wrapped, chain = (
            moved(theirs, dtype, device),
            OfNflows,
            autoregressive_libraries.chain_of_nflows,
        )
    else:
        from zuko.flows import MAF as ZukoMAF
        from zuko.flows import NSF

        kind = ZukoMAF if size.kind == "affine" else NSF
        theirs = kind(size.features, size.context, transforms=STEPS, hidden_features=(size.hidden,) * 2)
        theirs, wrapped, chain = moved(theirs, dtype, device), OfZuko, autoregressive_libraries.chain_of_zuko
    flow = chain(theirs).eval()
    return {PASSES: Flow(flow, passes=True), "fastflow": Flow(flow), size.library: wrapped(theirs)}


def moved(model: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """The model in eval mode, with parameters that are not at special first values."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.to(device, dtype).eval()


def inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size.batch, size.features, generator=generator).to(device, dtype)
    if not size.context:
        return x, None
    return x, torch.randn(size.batch, size.context, generator=generator).to(device, dtype)


@torch.no_grad()
def check(found: dict[str, object], x: Tensor, context: Tensor | None) -> dict[str, float]:
    """The largest relative error of log-densities and of samples of the latents x, by provider, in float64."""
    errors = {}
    truth = found[PASSES].log_prob(x, context), found[PASSES].decode(x, context)
    for name, model in found.items():
        values = model.log_prob(x, context), model.decode(x, context)
        errors[name] = max(harness.relative_error(a, b).item() for a, b in zip(values, truth, strict=True))
        if not errors[name] <= TOLERANCE:  # nor is NaN
            off = f"{errors[name]:.1e} of the largest value, expected {TOLERANCE:.0e}"
            raise ValueError(f"{name}: log-densities or samples are off by {off}; no row is written")
    return errors


def calls(found: dict[str, object], x: Tensor, context: Tensor | None, mode: str) -> dict[str, Callable]:
    """Functions to time, by provider."""

    def without_graph(function: Callable) -> Callable:
        def call() -> Tensor:
            with torch.no_grad():
                return function(x, context)

        return call

    def training_step(model: object) -> Callable:
        module = next(v for v in vars(model).values() if isinstance(v, nn.Module))
        leaves = list(module.parameters())

        def call() -> tuple[Tensor, ...]:
            loss = -model.log_prob(x, context).mean()
            return torch.autograd.grad(loss, leaves, allow_unused=True)

        return call

    if mode == "sample":
        return {name: without_graph(model.decode) for name, model in found.items()}
    rest = {name: model for name, model in found.items() if name != PASSES}  # its densities are FastFlow's
    if mode == "log_prob":
        return {name: without_graph(model.log_prob) for name, model in rest.items()}
    return {name: training_step(model) for name, model in rest.items()}


def measure(size: Size, options: argparse.Namespace) -> list[dict]:
    exact = models(size, torch.float64, options.device)
    errors = check(exact, *inputs(size, torch.float64, options.device))
    found, rows = models(size, torch.float32, options.device), []
    about, given = harness.metadata(options.device), inputs(size, torch.float32, options.device)
    for mode in MODES:
        each = calls(found, *given, mode)
        for call in each.values():
            for _ in range(2):
                call()
        taken = harness.microseconds(each, options.seconds, options.device, sizes.CLOCKS[options.clock])
        for name, (p20, p50, p80) in taken.items():
            row = {"library": size.library, "kind": size.kind, "batch": size.batch, "features": size.features}
            row |= {"context": size.context, "hidden": size.hidden, "steps": STEPS}
            row |= {"mode": mode, "provider": name, "clock": options.clock}
            row |= {"p20_ms": f"{p20 / 1e3:.3f}", "p50_ms": f"{p50 / 1e3:.3f}", "p80_ms": f"{p80 / 1e3:.3f}"}
            row |= {"error": f"{errors[name]:.1e}", "tolerance": f"{TOLERANCE:.0e}"}
            rows.append(row | about)
    return rows


def table(rows: list[dict]) -> str:
    """A line for each size and mode."""
    lines, providers = {}, ["fastflow", PASSES, "nflows", "zuko"]
    for row in rows:
        cell = f"{float(row['p50_ms']):.2f} ({float(row['p20_ms']):.2f} to {float(row['p80_ms']):.2f})"
        key = (*(str(row[k]) for k in ("kind", "batch", "features", "context", "hidden", "library", "mode")),)
        lines.setdefault(key, {})[row["provider"]] = cell
    body = [[*key[:5], key[6], *(cells.get(name, "") for name in providers)] for key, cells in lines.items()]
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    head = ["", "batch", "D", "context", "hidden", "", *providers]
    clock = " of processor time" if rows[0]["clock"] == "processor" else ""
    return f"{page.table(head, body)}\n\n(milliseconds{clock}, p50, in parentheses p20 to p80; {about})"


def main(argv: list[str] | None = None) -> list[dict]:
    return sizes.run(
        "autoregressive_flow",
        __doc__,
        argv,
        SIZES,
        QUICK,
        measure,
        table,
        docs="autoregressive.md",
        seconds=10.0,
    )


if __name__ == "__main__":
    main()
