"""Times flows of other libraries before and after they are accelerated: a training step, and samples.

    pip install --no-deps -r tests/libraries.txt
    python -m benchmarks.models.drop_in

Log-densities and their gradients by all parameters are compared in float64 before anything is timed; a flow that differs
has no row. Before and after take turns in one process. A training step is forward and backward, without an optimizer.
Each sample has its own context.

The flows have noise on all parameters that are trained, so that no layer is the identity. Rows also have the operators below autograd of
a training step, those of them that synchronize a GPU (the value of a tensor, or its nonzero elements, on the host), and
the bytes that autograd keeps for backward, parameters and inputs not counted.

Rows go to results/drop_in.csv. The table of docs/drop_in.md is rewritten.
"""

import argparse
import copy
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks.models import libraries
from benchmarks.tools import harness, page
from fastflow.trainer.cli import keep_memory

MODES = ("training step", "sample")
PROVIDERS = ("before", "after")
TOLERANCE = 1e-8  # in float64, over 1 + the largest value: gradients divide by slopes of 1e-3


@dataclass(frozen=True)
class Case:
    """A flow of a library.

    Attributes:
        integration: its module of ``fastflow.integrations``.
        build: the flow; with a True, a tiny one.
        log_prob, sample: of the flow for samples and contexts, and for contexts.
        size: batch, features, context features; then those of the tiny one.
    """

    name: str
    integration: str
    build: Callable[[int, int, bool], nn.Module]
    log_prob: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    sample: Callable[[nn.Module, int, Tensor | None], Tensor]
    size: tuple[int, int, int]


# nflows and glasflow ----------------------------------------------------------------------------------


def _spline_flow(
    package: str,
    features: int,
    context: int,
    steps: int,
    permute: bool,
    mask: Callable[[int], list[int]],
    **options: int | bool | float,
) -> nn.Module:
    """Spline couplings with residual networks, each followed by a linear map."""
    transforms, nets, flows, distributions = (
        importlib.import_module(f"{package}.{name}")
        for name in ("transforms", "nn.nets", "flows", "distributions")
    )
    spline = {name: options.pop(name) for name in ("num_bins", "tail_bound")}
    parts = []
    for i in range(steps):
        parts += [transforms.RandomPermutation(features)] if permute else []
        coupling = transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask(i),
            lambda a, b: nets.ResidualNet(a, b, context_features=context, **options),
            tails="linear",
            **spline,
        )
        parts += [coupling, transforms.LULinear(features, identity_init=True)]
    return flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([features]))


def sbi_default(features: int, context: int, tiny: bool) -> nn.Module:
    """What sbi builds for ``posterior_nn("nsf")``, without its standardization."""
    sizes = {"num_bins": 10, "tail_bound": 3.0, "hidden_features": 50, "num_blocks": 2}
    return _spline_flow(
        "nflows",
        features,
        context,
        2 if tiny else 5,
        False,
        lambda i: [(i + j) % 2 for j in range(features)],
        **sizes,
    )


def dingo_size(features: int, context: int, tiny: bool) -> nn.Module:
    """The size of dingo's flows: 30 steps, hidden 512, 5 residual blocks with batch normalization."""
    hidden, blocks = (8, 1) if tiny else (512, 5)
    sizes = {"num_bins": 8, "tail_bound": 1.0, "hidden_features": hidden, "num_blocks": blocks}
    half = [int(j >= features // 2) for j in range(features)]
    return _spline_flow(
        "glasflow.nflows",
        features,
        context,
        2 if tiny else 30,
        True,
        lambda _: half,
        use_batch_norm=True,
        **sizes,
    )


def _of_nflows(name: str, integration: str, build: Callable, size: tuple[int, int, int]) -> Case:
    return Case(
        name,
        integration,
        build,
        lambda flow, x, context: flow.log_prob(x, context),
        lambda flow, n, context: flow.sample(1, context),
        size,
    )


def _of_zuko(name: str, family: str, size: tuple[int, int, int]) -> Case:
    def build_flow(features: int, context: int, tiny: bool) -> nn.Module:
        from zuko import flows

        return getattr(flows, family)(
            features, context, transforms=3, hidden_features=(8,) if tiny else (64, 64)
        )

    return Case(
        name,
        "zuko",
        build_flow,
        lambda flow, x, context: flow(context).log_prob(x),
        lambda flow, n, context: flow(context).sample(),
        size,
    )


def circular_splines(features: int, context: int, tiny: bool) -> nn.Module:
    """Four couplings of normflows with half of the features on circles."""
    import normflows as nf

    blocks, hidden = (1, 8) if tiny else (2, 64)
    flows = [
        nf.flows.CircularCoupledRationalQuadraticSpline(
            features, blocks, hidden, list(range(0, features, 2)), reverse_mask=bool(i % 2)
        )
        for i in range(4)
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), flows)


def all_in_one(features: int, context: int, tiny: bool) -> nn.Module:
    """Eight AllInOneBlocks of FrEIA on images of 4 channels of 4 x 4."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    def network(inputs: int, outputs: int) -> nn.Module:
        hidden = 4 if tiny else 32
        return nn.Sequential(
            nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, outputs, 3, padding=1)
        )

    flow = SequenceINN(4, 4, 4)
    for _ in range(2 if tiny else 8):
        flow.append(AllInOneBlock, subnet_constructor=network)
    return flow


def _images(x: Tensor) -> Tensor:
    """64 features as images, zeros where a tiny case has fewer."""
    return nn.functional.pad(x, (0, 64 - x.shape[1])).view(-1, 4, 4, 4)


def _freia_log_prob(flow: nn.Module, x: Tensor, _: None) -> Tensor:
    z, log_det = flow(_images(x))
    return log_det - z.square().flatten(1).sum(1) / 2


CASES = (
    _of_nflows("sbi's default NSF", "nflows", sbi_default, (200, 5, 10)),
    _of_nflows("dingo-size NSF", "glasflow", dingo_size, (256, 14, 128)),
    _of_zuko("NSF", "NSF", (256, 5, 10)),
    _of_zuko("MAF", "MAF", (256, 16, 10)),
    Case(
        "circular spline flow",
        "normflows",
        circular_splines,
        lambda flow, x, _: flow.log_prob(x),
        lambda flow, n, _: flow.sample(n)[0],
        (256, 8, 0),
    ),
    Case(
        "8 AllInOneBlocks, images",
        "freia",
        all_in_one,
        _freia_log_prob,
        lambda flow, n, _: flow(_images(torch.randn(n, 64)), rev=True)[0],
        (64, 64, 0),
    ),
)


# what is measured -------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts operators below autograd, and those that synchronize a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.synchronizing = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            isinstance(v, Tensor) and v.dtype in (torch.bool, torch.uint8) for v in tree_leaves(args[1])
        )
        waits = name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        self.synchronizing += waits or masks
        return func(*args, **(kwargs or {}))


def kept_bytes(step: Callable, flow: nn.Module, given: tuple[Tensor | None, ...]) -> int:
    """Bytes of the tensors that autograd saves in ``step``, each storage once, without parameters and inputs."""
    known = {
        t.untyped_storage().data_ptr() for t in (*flow.parameters(), *flow.buffers(), *given) if t is not None
    }
    found = {}

    def save(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        step()
    return sum(s.nbytes() for pointer, s in found.items() if pointer not in known)


def build(case: Case, quick: bool) -> nn.Module:
    torch.manual_seed(0)
    _, features, context = size_of(case, quick)
    flow = case.build(features, context, quick)
    with torch.no_grad():
        for p in flow.parameters():
            if p.requires_grad:  # not FrEIA's permutations, which are parameters too
                p.add_(torch.randn_like(p), alpha=0.05)
    return flow


def size_of(case: Case, quick: bool) -> tuple[int, int, int]:
    return (8, 3, 2 if case.size[2] else 0) if quick else case.size


def inputs(case: Case, quick: bool, device: str) -> tuple[Tensor, Tensor | None]:
    batch, features, context = size_of(case, quick)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, features, generator=generator).to(device)
    return x, torch.randn(batch, context, generator=generator).to(device) if context else None


def accelerated(case: Case, flow: nn.Module) -> nn.Module:
    """A copy that is accelerated."""
    faster = copy.deepcopy(flow)
    report = importlib.import_module(f"fastflow.integrations.{case.integration}").accelerate(faster)
    if not report.replaced:
        raise ValueError(f"{case.name}: nothing was replaced")
    return faster


def check(case: Case, flow: nn.Module, faster: nn.Module, x: Tensor, context: Tensor | None) -> float:
    """The largest difference of log-densities and gradients in float64, over 1 + the largest value."""
    context = None if context is None else context.double()
    found = []
    for m in (flow, faster):
        m = copy.deepcopy(m).double()
        log_prob = case.log_prob(m, x.double(), context)
        gradients = torch.autograd.grad(
            log_prob.mean(), [p for p in m.parameters() if p.requires_grad], allow_unused=True
        )
        found.append([log_prob.detach(), *(g for g in gradients if g is not None)])
    errors = [((a - b).abs().max() / (1 + a.abs().max())).item() for a, b in zip(*found, strict=True)]
    if not max(errors) <= TOLERANCE:
        raise ValueError(
            f"{case.name}: off by {max(errors):.1e}, expected {TOLERANCE:.0e}; no row is written"
        )
    return max(errors)


def training_step(case: Case, flow: nn.Module, x: Tensor, context: Tensor | None) -> Callable:
    leaves = [p for p in flow.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(-case.log_prob(flow, x, context).mean(), leaves, allow_unused=True)


def sampling(case: Case, flow: nn.Module, x: Tensor, context: Tensor | None) -> Callable:
    def sample() -> Tensor:
        with torch.no_grad():
            return case.sample(flow, len(x), context)

    return sample


def measure(case: Case, options: argparse.Namespace) -> list[dict]:
    flow = build(case, options.quick).to(options.device)
    x, context = inputs(case, options.quick, options.device)
    flows = {"before": flow, "after": accelerated(case, flow)}
    error, rows, about = check(case, *flows.values(), x, context), [], harness.metadata(options.device)
    for mode, make in zip(MODES, (training_step, sampling), strict=True):
        for m in flows.values():
            m.train(mode == MODES[0])
        calls = {name: make(case, m, x, context) for name, m in flows.items()}
        counts = {}
        for name, call in calls.items():
            call()
            with Operators() as operators:
                call()
            kept = kept_bytes(call, flows[name], (x, context)) if mode == MODES[0] else ""
            counts[name] = operators.calls, operators.synchronizing, kept
        taken = harness.microseconds(calls, options.seconds, options.device)
        for name, (p20, p50, p80) in taken.items():
            batch, features, contexts = size_of(case, options.quick)
            row = {"flow": case.name, "library": case.integration}
            row |= {"batch": batch, "features": features, "context": contexts, "mode": mode, "provider": name}
            row |= {"p20_ms": f"{p20 / 1e3:.3f}", "p50_ms": f"{p50 / 1e3:.3f}", "p80_ms": f"{p80 / 1e3:.3f}"}
            row |= {"ratio": f"{p50 / taken['before'][1]:.3f}", "error": f"{error:.1e}"}
            row |= dict(zip(("operators", "synchronizing", "kept_bytes"), counts[name], strict=True))
            rows.append(row | about)
    return rows


def table(rows: list[dict]) -> str:
    """A line for each flow and mode: before, after, and how many times less."""
    found = {}
    for row in rows:
        found.setdefault((row["flow"], row["library"], row["mode"]), {})[row["provider"]] = row
    lines = []
    for (flow, library, mode), by in found.items():
        before, after = (by[name] for name in PROVIDERS)
        times = [
            f"{float(r['p50_ms']):.2f} ({float(r['p20_ms']):.2f} to {float(r['p80_ms']):.2f})"
            for r in by.values()
        ]
        kept = [
            f"{int(r['kept_bytes']) / 2**20:.1f}" if r["kept_bytes"] != "" else "" for r in (before, after)
        ]
        counts = [f"{r['operators']}, {r['synchronizing']}" for r in (before, after)]
        gain = f"{float(before['p50_ms']) / float(after['p50_ms']):.1f}"
        size = ", ".join(str(before[k]) for k in ("batch", "features", "context"))
        lines.append([flow, library, size, mode, *times, gain, *counts, " to ".join(kept) if kept[0] else ""])
    head = ["flow", "library", "batch, D, context", "", "before, ms", "after, ms", "times faster"]
    head += ["operators, of them synchronizing: before", "after", "kept for backward, MiB"]
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    return f"{page.table(head, lines)}\n\n(p50, in parentheses p20 to p80; {about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of drop_in.md")
        parser.add_argument("--only", default="", help="cases whose name or library has this word")
        parser.set_defaults(seconds=15.0)

    options, rows = harness.arguments(__doc__, argv, add), []
    keep_memory()
    if options.device == "cpu" and (load := os.getloadavg()[0]) > 0.3:
        print(f"other programs are running ({load:.1f} on average over the last minute): discard these times")
    warnings.filterwarnings("ignore", libraries.DEPRECATED)
    cases = [c for c in CASES if options.only in f"{c.name} {c.integration}"]
    for case in tqdm(cases, desc="drop_in"):
        found = measure(case, options)
        harness.append(options.results / "drop_in.csv", found)
        rows += found
    text = table(rows)
    if not options.only:
        page.write(options.docs / "drop_in.md", {"drop_in": text})
    print(text)
    return rows


if __name__ == "__main__":
    main()
