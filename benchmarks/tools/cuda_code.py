"""Machine code of each CUDA kernel of csrc/: registers, spills, widths of loads and stores. Needs no GPU.

    python -m benchmarks.tools.cuda_code

Reads the library that `make setup` built for sm_80, sm_90 and sm_100 and writes docs/cuda_code.md.
"""

import argparse
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools.triton_code import CAPABILITIES, TOOLS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cuda_code.md"
ARCHITECTURES = tuple(f"sm_{capability}" for capability in CAPABILITIES)


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int  # bytes per thread: spilled registers, and arrays that are not in registers


def library() -> Path:
    found = sorted((ROOT / "fastflow").glob("_cuda.*"))
    if not found:
        raise FileNotFoundError(
            "the CUDA extension was not built; `make setup` builds it with nvcc and a CUDA build of torch"
        )
    return found[0]


def cuobjdump(option: str, path: Path) -> str:
    return subprocess.run(
        [TOOLS / "cuobjdump", option, path], check=True, capture_output=True, text=True
    ).stdout


def _readable(symbols: Iterable[str]) -> dict[str, str]:
    """Names of kernels: ``_ZN8fastflow3runI...`` becomes ``Conv1x1Kernel<float, 24>``."""
    symbols = list(symbols)
    names = subprocess.run(
        ["c++filt", *symbols], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    inner = re.compile(r"run<(.*?) *>\(")
    return {
        s: inner.search(n.replace("fastflow::", "").replace("c10::", ""))[1]
        for s, n in zip(symbols, names, strict=True)
    }


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(architecture, text) of each cubin that cuobjdump describes; "cubin" if there is only one."""
    for section in text.split("Fatbin elf code:")[1:] or [text]:
        arch = re.search(r"arch = (sm_\w+)", section)
        yield arch[1] if arch else "cubin", section


def resources(path: Path) -> dict[str, dict[str, Resources]]:
    """Resources by kernel and architecture, of a library or a cubin."""
    found = defaultdict(dict)
    for arch, section in _sections(cuobjdump("--dump-resource-usage", path)):
        rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", section)
        names = _readable(symbol for symbol, *_ in rows)
        for symbol, registers, stack in rows:
            found[names[symbol]][arch] = Resources(int(registers), int(stack))
    return dict(found)


def spills(found: dict[str, dict[str, Resources]]) -> list[str]:
    return [
        f"{kernel} on {arch}: {r.stack} bytes of stack"
        for kernel, each in found.items()
        for arch, r in each.items()
        if r.stack
    ]


def widest(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Bytes of the widest load and store of a thread, by kernel and architecture."""
    found = defaultdict(dict)
    for arch, section in _sections(cuobjdump("--dump-sass", path)):
        functions = re.split(r"Function : (\S+)", section)[1:]
        names = _readable(functions[::2])
        for symbol, body in zip(functions[::2], functions[1::2], strict=True):
            widths = []
            for verb in ("LDG", "STG"):
                bits = [int(b) for b in re.findall(rf"\b{verb}\.E[.\w]*?\.(64|128|256)\b", body)]
                widths.append(max(bits, default=32) // 8)
            found[names[symbol]][arch] = tuple(widths)
    return dict(found)


def _order(kernel: str) -> tuple:
    return (
        *re.match(r"(\w+)<(\w+)", kernel).groups(),
        *(int(n) for n in re.findall(r", (\d+)", kernel)),
        kernel,
    )


def page(
    found: dict[str, dict[str, Resources]], widths: dict[str, dict[str, tuple[int, int]]], nvcc: str
) -> str:
    text = f"""# Machine code of the CUDA kernels

This page lists every kernel of `csrc/` as nvcc {nvcc} compiles it for sm_80, sm_90 and sm_100.
`python -m benchmarks.tools.cuda_code` writes it and needs no GPU. It describes compiled code; nothing here
has been timed.

| column | meaning |
| --- | --- |
| kernel | the number is the largest number of channels; `true`: inverse and backward in one pass |
| registers | registers per thread; a multiprocessor has 65,536 |
| spills | bytes of stack per thread, for values that did not fit in registers |
| load, store | bytes of the widest load and store of a thread; some strides and sizes take narrower ones |

Three values are for sm_80 / sm_90 / sm_100; a single value applies to all three.

| kernel | registers | spills | load | store |
| --- | --- | --- | --- | --- |
"""
    measured = cells(found)
    for kernel in sorted(found, key=_order):
        wide = [_three(v) for v in zip(*(widths[kernel][arch] for arch in ARCHITECTURES), strict=True)]
        text += f"| `{kernel}` | {' | '.join((*measured[kernel], *wide))} |\n"
    return text


def _three(values: Iterable) -> str:
    values = [str(v) for v in values]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def cells(found: dict[str, dict[str, Resources]]) -> dict[str, tuple[str, str]]:
    """The cells of each kernel's row for registers and spills."""
    each = {kernel: [archs[arch] for arch in ARCHITECTURES] for kernel, archs in found.items()}
    return {
        kernel: (" / ".join(str(r.registers) for r in rs), _three(r.stack for r in rs))
        for kernel, rs in each.items()
    }


def listed(text: str) -> dict[str, tuple[str, str]]:
    """The cells of :func:`cells` in a page."""
    return {
        kernel: (registers, stack)
        for kernel, registers, stack in re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    }


def main() -> None:
    from fastflow.ops import extension

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    found = resources(library())
    options.out.write_text(page(found, widest(library()), extension.build["cuda"]))
    print(f"{len(found)} kernels in {options.out}")
    print(*spills(found), sep="\n")


if __name__ == "__main__":
    main()
