"""Times a training step of residual flows of vectors and of images, compared with normflows.

    pip install --no-deps normflows    # optional, to compare with it
    python -m benchmarks.models.residual_flow

Both flows have the same weights, the same number of terms of the series and the same number of power iterations. Latents and
exact log-dets are compared in float64 before anything is timed, on small images in place of images; a case that differs
has no row. ``until convergence`` is FastFlow's own rule for the number of power iterations. ``by autograd`` is FastFlow's layer
with a network that has no ``linearized``, as one's own networks are. A step is forward, backward and the power
iterations, without an optimizer.

``--clock processor`` measures the processor time of one thread instead of the time that passes: other programs on the
machine change it little.

Rows go to results/residual_flow.csv. The table of docs/residual.md is rewritten.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models import libraries
from benchmarks.tools import harness, page, sizes
from fastflow.nn import LipschitzConvNet, LipschitzMLP, Residual
from fastflow.nn.batched_linalg import log_abs_det
from fastflow.nn.networks.lipschitz import MARGIN

TERMS = 8
ITERATIONS = 5
COEFFICIENT = 0.98  # of each layer
CONVERGENCE, AUTOGRAD = "until convergence", "by autograd"
TOLERANCE = 1e-8  # in float64, over the largest value


@dataclass(frozen=True)
class Size:
    """A flow of vectors, or of square images of a ``side``."""

    batch: int
    features: int
    hidden: int
    blocks: int
    side: int = 0

    def small(self) -> "Size":
        """The size at which log-dets are compared."""
        return replace(self, batch=4, hidden=min(self.hidden, 8), side=min(self.side, 4))


SIZES = (Size(512, 2, 128, 8), Size(512, 16, 128, 8), Size(512, 64, 256, 4), Size(16, 12, 64, 4, 16))
QUICK = (Size(6, 3, 8, 2), Size(2, 2, 4, 1, 4))


class Hidden(nn.Module):
    """A network of which the layer knows the forward pass only."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Flow(nn.Module):
    """FastFlow's layers; ``iterations`` None: until convergence."""

    def __init__(self, size: Size, iterations: int | None, by_autograd: bool = False) -> None:
        super().__init__()
        bound, first = COEFFICIENT**3, {"activation_first": True}
        nets = [
            LipschitzConvNet(size.features, (size.side,) * 2, size.hidden, bound, **first)
            if size.side
            else LipschitzMLP(size.features, (size.hidden,) * 2, bound, **first)
            for _ in range(size.blocks)
        ]
        self.blocks = nn.ModuleList(
            Residual(Hidden(net) if by_autograd else net, log_det="series", terms=TERMS, noise="gaussian")
            for net in nets
        )
        for layer in self.layers():
            layer.bound = COEFFICIENT * MARGIN  # normflows adds no margin
            if iterations is not None:
                layer.update_norm = partial(layer.update_norm, -1.0, iterations)

    def layers(self) -> list[nn.Module]:
        return [m for m in self.modules() if hasattr(m, "update_norm")]

    def converge(self) -> None:
        for layer in self.layers():
            type(layer).update_norm(layer, -1.0, 200)
            layer.update_norm = lambda **_: None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = 0.0
        for block in self.blocks:
            x, log_det = block(x)
            total = total + log_det
        return x, total

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            block.log_det = "exact"
        return self(x)

    def after_step(self) -> None:
        """Norms are updated in forward."""


class OfNormflows(nn.Module):
    """normflows' layers."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from normflows.flows.residual import Residual as Block
        from normflows.nets.lipschitz import LipschitzCNN
        from normflows.nets.lipschitz import LipschitzMLP as MLP

        channels = [size.features, size.hidden, size.hidden, size.features]
        form = {"lipschitz_const": COEFFICIENT, "max_lipschitz_iter": ITERATIONS, "init_zeros": False}
        nets = [
            LipschitzCNN(channels, [3, 1, 3], **form) if size.side else MLP(channels, **form)
            for _ in range(size.blocks)
        ]
        self.blocks = nn.ModuleList(Block(net, reverse=False, n_power_series=TERMS) for net in nets)

    def layers(self) -> list[nn.Module]:
        return [m for m in self.modules() if hasattr(m, "compute_weight")]

    def update(self, iterations: int) -> None:
        from normflows.utils.optim import update_lipschitz

        update_lipschitz(self, iterations)

    def converge(self) -> None:
        self.update(500)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = 0.0
        for block in self.blocks:
            x, log_det = block(x)
            total = total + log_det
        return x, total

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(x.dtype)  # of the factor by which a weight is divided
        try:
            return self._exact(x)
        finally:
            torch.set_default_dtype(before)

    def _exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = 0.0
        for block in self.blocks:
            net = block.iresblock.nnet
            jacobian = torch.autograd.functional.jacobian(lambda v, net=net: net(v).sum(0), x)
            size = x[0].numel()
            jacobian = jacobian.reshape(size, len(x), size).movedim(1, 0)
            eye = torch.eye(size, dtype=x.dtype, device=x.device)
            total = total + log_abs_det(jacobian + eye)
            x = x + net(x)
        return x, total

    def after_step(self) -> None:
        self.update(ITERATIONS)


def flows(size: Size, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """Flows by name, all with the weights of the first."""
    torch.manual_seed(0)
    found = {
        "fastflow": Flow(size, ITERATIONS),
        CONVERGENCE: Flow(size, None),
        AUTOGRAD: Flow(size, ITERATIONS, by_autograd=True),
    }
    if libraries.installed("normflows"):
        found["normflows"] = OfNormflows(size)
        found["normflows"](inputs(size, torch.float32, "cpu"))  # finds the sizes of images
    with torch.no_grad():
        for each in zip(*(flow.layers() for flow in found.values()), strict=True):
            weight = torch.randn_like(each[0].weight) / math.sqrt(each[0].weight[0].numel())
            for layer in each:
                layer.weight.copy_(weight)
                layer.bias.copy_(each[0].bias)
    return {name: flow.to(device, dtype).train() for name, flow in found.items()}


def inputs(size: Size, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.features) + ((size.side,) * 2 if size.side else ())
    return torch.randn(shape, generator=generator).to(device, dtype)


def check(found: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """The largest relative error of latents and exact log-dets, by provider, in float64, with norms that have converged."""
    truth, errors = None, {}
    for name, flow in found.items():
        flow.converge()
        values = [v.detach() for v in flow.exact(x)]
        truth = truth or values
        errors[name] = max(harness.relative_error(a, b).item() for a, b in zip(values, truth, strict=True))
        if not errors[name] <= TOLERANCE:  # nor is NaN
            off = f"{errors[name]:.1e} of the largest value, expected {TOLERANCE:.0e}"
            raise ValueError(f"{name}: latents or log-dets are off by {off}; no row is written")
    return errors


def step(flow: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward, backward and the power iterations."""

    def call() -> None:
        z, log_det = flow(x)
        loss = 0.5 * z.square().sum() - log_det.sum()
        flow.zero_grad()
        loss.backward()
        flow.after_step()

    return call


def measure(size: Size, options: argparse.Namespace) -> list[dict]:
    small = size.small()
    errors = check(flows(small, torch.float64, "cpu"), inputs(small, torch.float64, "cpu"))
    x = inputs(size, torch.float32, options.device)
    calls = {name: step(flow, x) for name, flow in flows(size, torch.float32, options.device).items()}
    for call in calls.values():
        for _ in range(2):
            call()
    taken = harness.microseconds(calls, options.seconds, options.device, sizes.CLOCKS[options.clock])
    rows, about = [], harness.metadata(options.device)
    for name, (p20, p50, p80) in taken.items():
        row = {"batch": size.batch, "features": size.features, "side": size.side or "", "hidden": size.hidden}
        row |= {
            "blocks": size.blocks,
            "terms": TERMS,
            "iterations": "" if name == CONVERGENCE else ITERATIONS,
        }
        row |= {"provider": name, "clock": options.clock}
        row |= {"p20_ms": f"{p20 / 1e3:.3f}", "p50_ms": f"{p50 / 1e3:.3f}", "p80_ms": f"{p80 / 1e3:.3f}"}
        row |= {"error": f"{errors[name]:.1e}", "tolerance": f"{TOLERANCE:.0e}"}
        rows.append(row | about)
    return rows


def table(rows: list[dict]) -> str:
    """A line for each size, with the ratio of FastFlow to normflows."""
    lines, providers = {}, ["fastflow", CONVERGENCE, AUTOGRAD, "normflows"]
    for row in rows:
        lines.setdefault(tuple(str(row[k]) for k in ("batch", "features", "side", "hidden", "blocks")), {})[
            row["provider"]
        ] = row
    body = []
    for key, found in lines.items():
        cells = [
            "{p50_ms} ({p20_ms} to {p80_ms})".format(**found[p]) if p in found else "" for p in providers
        ]
        theirs = found.get("normflows")
        ratio = f"{float(found['fastflow']['p50_ms']) / float(theirs['p50_ms']):.2f}" if theirs else ""
        body.append([*key, *cells, ratio])
    head = ["batch", "features", "side", "hidden", "blocks", *providers, "fastflow / normflows"]
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    clock = " of processor time" if rows[0]["clock"] == "processor" else ""
    how = f"{TERMS} terms, {ITERATIONS} power iterations"
    return (
        f"{page.table(head, body)}\n\n(milliseconds{clock}, p50, in parentheses p20 to p80; {how}; {about})"
    )


def main(argv: list[str] | None = None) -> list[dict]:
    return sizes.run(
        "residual_flow", __doc__, argv, SIZES, QUICK, measure, table, docs="residual.md", seconds=20.0
    )


if __name__ == "__main__":
    main()
