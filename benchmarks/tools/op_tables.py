"""Writes the tables of docs/backends.md from the ops' registrations and specs. Measures nothing.

    python -m benchmarks.tools.op_tables

One table has each op's implementation by device, the other the bytes that its kernels move.
"""

import argparse
import importlib
from pathlib import Path

from benchmarks.tools import harness, page
from fastflow.ops import spec
from fastflow.ops.dispatch import Implementations
from fastflow.ops.registry import OPS, folders


def limits() -> dict[tuple[str, str], str]:
    """The ``LIMITS`` of all specs."""
    found: dict[tuple[str, str], str] = {}
    for folder in folders():
        found |= getattr(importlib.import_module(f"fastflow.ops.{folder}.spec"), "LIMITS", {})
    return found


def implementation(op: Implementations, device: str, limit: str) -> str:
    if device == "cuda":
        name = "Triton" if op.triton else "CUDA C++" if "cuda" in op.compiled else "PyTorch"
    else:
        name = "C++" if "cpu" in op.compiled else "PyTorch"
    return f"{name} {limit}".strip()


def named(ops: list[str]) -> str:
    return ", ".join(f"`{op}`" for op in ops)


def implementations() -> str:
    """A line for the ops that have the same implementations on every device."""
    known, lines = limits(), {}
    for name in sorted(OPS):
        cells = [implementation(OPS[name], d, known.get((name, d), "")) for d in ("cuda", "cpu")]
        lines.setdefault((OPS[name].folder, *cells), []).append(name)
    rows = [[named(ops), *cells, "PyTorch"] for (_, *cells), ops in lines.items()]
    return page.table(["op", "CUDA tensors", "CPU tensors", "other devices"], rows)


def traffic() -> str:
    """A line for the cases of an op that move the same number of bytes in as many kernels.

    Only Triton kernels are counted, so the number of the others is left out.
    """
    groups: dict[str, dict[tuple[str, str], list[str]]] = {}
    for case in spec.cases(spec.Make(), (2, 4, 2, 2)):
        if case.bytes_moved is not None:
            cells = str(case.bytes_moved), str(case.launches) if OPS[case.op].triton else ""
            groups.setdefault(case.op, {}).setdefault(cells, []).append(case.variant)
    rows = [
        [f"`{op}`", "all" if len(found) == 1 else ", ".join(without_inverses(variants)), *cells]
        for op, found in groups.items()
        for cells, variants in found.items()
    ]
    return page.table(["op", "cases", "bytes per element of x", "kernels"], rows)


def without_inverses(variants: list[str]) -> list[str]:
    """Leaves out "A inverse" if A is there."""
    return [v for v in variants if not (v.endswith(" inverse") and v.removesuffix(" inverse") in variants)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=harness.ROOT / "docs" / "backends.md")
    page.write(parser.parse_args(argv).out, {"implementations": implementations(), "traffic": traffic()})


if __name__ == "__main__":
    main()
