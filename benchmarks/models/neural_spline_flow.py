"""Times conditional neural spline flows of 5 steps: a training step (forward + backward), and samples.

    pip install --no-deps nflows zuko    # optional, to compare with them
    python -m benchmarks.models.neural_spline_flow

``plain`` is the model with its ops in plain PyTorch. ``nflows`` is nflows' RQ-NSF (C) with the same weights.
Log-densities and gradients by the parameters of both are compared with FastFlow's in float64 before anything is
timed. A model that differs has no row. ``compiled`` is FastFlow's model in torch.compile: ``log_prob``, and ``decode``
of latents that are drawn each time. ``networks only`` computes the five coupling networks, and nothing else: no
coupling can take less. ``zuko, autoregressive`` is zuko's NSF with two hidden layers per network, a different model.

``--clock processor`` measures the processor time of one thread instead of the time that passes: other programs on the
machine change it little.

A training step has no optimizer. Each sample has its own context. Models take turns in one process, which keeps the
memory that tensors free, as the command line does.

Rows go to results/neural_spline_flow.csv. The table of docs/splines.md is rewritten.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models import libraries, spline_libraries
from benchmarks.tools import harness, page, sizes
from fastflow import backend
from fastflow.models import NeuralSplineFlow
from fastflow.nn import SplineCoupling

SIZES = ((200, 5, 10, 50), (512, 16, 32, 64), (4096, 16, 32, 128))  # batch, features, context, hidden
QUICK = ((8, 3, 2, 4),)
MODES = ("training step", "sample")
TOLERANCE = 1e-8  # in float64, over the largest value: gradients divide by slopes of 1e-3
NETWORKS, ZUKO = "networks only", "zuko, autoregressive"


def build(features: int, context: int, hidden: int, device: str) -> NeuralSplineFlow:
    """A model in eval mode whose couplings are not the identity."""
    torch.manual_seed(0)
    model = NeuralSplineFlow(features=features, context_features=context, steps=5, hidden=hidden)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.to(device).eval()


def inputs(batch: int, features: int, context: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Samples and their contexts."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, n, generator=generator).to(device, dtype) for n in (features, context))


class Plain:
    """A model with its ops in plain PyTorch."""

    def __init__(self, model: NeuralSplineFlow) -> None:
        self.model = model

    def parameters(self):
        return self.model.parameters()

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        with backend("reference"):
            return self.model.log_prob(x, context)

    def sample(self, n: int, context: Tensor) -> Tensor:
        with backend("reference"):
            return self.model.sample(n, context=context)


def check(
    model: NeuralSplineFlow, others: dict[str, object], given: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """The largest relative error of log-densities and of the gradient by a network, by provider, in float64.

    Raises ValueError if one exceeds the tolerance.
    """

    def computed(flow, weight: nn.Parameter) -> tuple[Tensor, Tensor]:
        log_prob = flow.log_prob(*given)
        return log_prob.detach(), torch.autograd.grad(log_prob.mean(), weight)[0]

    couplings = [m for m in model.modules() if isinstance(m, SplineCoupling)]
    truth, errors = computed(model, couplings[0].net.linear_in.weight), {"fastflow": 0.0}
    for name, other in others.items():
        if name == "nflows":
            weight = other._transform._transforms[2].transform_net.initial_layer.weight
        else:
            weight = couplings[0].net.linear_in.weight
        found = computed(other, weight)
        errors[name] = max(harness.relative_error(a, b).item() for a, b in zip(found, truth, strict=True))
        if not errors[name] <= TOLERANCE:  # nor is NaN
            off = f"{errors[name]:.1e} of the largest value, expected {TOLERANCE:.0e}"
            raise ValueError(f"{name}: log-densities or gradients are off by {off}; no row is written")
    return errors


def same(model: NeuralSplineFlow) -> dict[str, object]:
    """The same model by other means."""
    found = {"plain": Plain(model)}
    if libraries.installed("nflows"):
        found["nflows"] = spline_libraries.copy_weights(model, spline_libraries.nflows(model)).eval()
    return found


def training_step(flow, x: Tensor, context: Tensor, log_prob: Callable | None = None) -> Callable:
    leaves, log_prob = list(flow.parameters()), log_prob or flow.log_prob
    return lambda: torch.autograd.grad(-log_prob(x, context).mean(), leaves)


def networks(model: NeuralSplineFlow, x: Tensor, context: Tensor, mode: str) -> Callable:
    nets = [m.net for m in model.modules() if isinstance(m, SplineCoupling)]
    x_a, leaves = x[:, : x.shape[1] // 2].contiguous(), [p for net in nets for p in net.parameters()]
    with torch.no_grad():
        upstream = [torch.randn_like(net(x_a, context)) for net in nets]

    def sample() -> list[Tensor]:
        with torch.no_grad():
            return [net(x_a, context) for net in nets]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad([net(x_a, context) for net in nets], leaves, upstream)

    return sample if mode == "sample" else step


def calls(
    model: NeuralSplineFlow, x: Tensor, context: Tensor, compiled: bool
) -> dict[str, dict[str, Callable]]:
    """Functions to time, by mode and provider, plain PyTorch first."""
    n, found = len(x), {mode: {} for mode in MODES}
    flows = same(model)
    flows = {"plain": flows.pop("plain"), "fastflow": model, **flows}
    for name, flow in flows.items():
        found["training step"][name] = training_step(flow, x, context)
        found["sample"][name] = lambda flow=flow: flow.sample(n, context=context)
    if compiled:
        log_prob, decode = (torch.compile(f, dynamic=False) for f in (model.log_prob, model.decode))
        found["training step"]["compiled"] = training_step(model, x, context, log_prob)
        found["sample"]["compiled"] = lambda: decode((model.prior.sample(n, x),), context)
    if "nflows" in flows:
        found["sample"]["nflows"] = without_graph(lambda: flows["nflows"].sample(1, context))
    if libraries.installed("zuko"):
        other = spline_libraries.zuko(model).to(x)
        leaves = list(other.parameters())
        found["training step"][ZUKO] = lambda: torch.autograd.grad(-other(context).log_prob(x).mean(), leaves)
        found["sample"][ZUKO] = without_graph(lambda: other(context).sample())
    for mode in MODES:
        found[mode][NETWORKS] = networks(model, x, context, mode)
    return found


def without_graph(call: Callable) -> Callable:
    def wrapped() -> object:
        with torch.no_grad():
            return call()

    return wrapped


def measure(size: tuple[int, int, int, int], options: argparse.Namespace) -> list[dict]:
    batch, features, context, hidden = size
    exact = build(features, context, hidden, options.device).double()
    errors = check(exact, same(exact), inputs(batch, features, context, torch.float64, options.device))
    model, rows = build(features, context, hidden, options.device), []
    about = harness.metadata(options.device)
    given = inputs(batch, features, context, torch.float32, options.device)
    for mode, each in calls(model, *given, options.compiled).items():
        for call in each.values():
            for _ in range(3):
                call()
        taken = harness.microseconds(each, options.seconds, options.device, sizes.CLOCKS[options.clock])
        harness.refuse_straw_man(taken, f"{size} {mode}", options.quick)
        for name, (p20, p50, p80) in taken.items():
            row = {"batch": batch, "features": features, "context": context, "hidden": hidden, "steps": 5}
            row |= {"mode": mode, "provider": name, "clock": options.clock}
            row |= {"p20_ms": f"{p20 / 1e3:.3f}", "p50_ms": f"{p50 / 1e3:.3f}", "p80_ms": f"{p80 / 1e3:.3f}"}
            row |= {"ratio": f"{p50 / taken['plain'][1]:.3f}"}
            error = errors.get(name)
            row |= {"error": "" if error is None else f"{error:.1e}", "tolerance": f"{TOLERANCE:.0e}"}
            rows.append(row | about)
    return rows


def table(rows: list[dict]) -> str:
    """A line for each size and mode."""
    lines, providers = {}, list(dict.fromkeys(row["provider"] for row in rows))
    for row in rows:
        cell = f"{float(row['p50_ms']):.2f} ({float(row['p20_ms']):.2f} to {float(row['p80_ms']):.2f})"
        key = *(str(row[k]) for k in ("batch", "features", "context", "hidden")), row["mode"]
        lines.setdefault(key, {})[row["provider"]] = cell
    body = [[*key, *(cells.get(name, "") for name in providers)] for key, cells in lines.items()]
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    head = ["batch", "D", "context", "hidden", "", *providers]
    clock = " of processor time" if rows[0]["clock"] == "processor" else ""
    return f"{page.table(head, body)}\n\n(milliseconds{clock}, p50, in parentheses p20 to p80; {about})"


def main(argv: list[str] | None = None) -> list[dict]:
    return sizes.run(
        "neural_spline_flow", __doc__, argv, SIZES, QUICK, measure, table, docs="splines.md", seconds=15.0
    )


if __name__ == "__main__":
    main()
