"""Machine code of each CUDA kernel of csrc/: registers, spills, loads and stores. Needs no GPU.

    python -m benchmarks.tools.cuda_code

Reads the library that `make setup` built for sm_80, sm_90 and sm_100 and writes docs/cuda_code.md.
"""

import argparse
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools.triton_code import CAPABILITIES, TOOLS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cuda_code.md"
ARCHITECTURES = tuple(f"sm_{capability}" for capability in CAPABILITIES)

THREADS = 128  # of a block of conv1x1's kernels
REGISTERS = 65536  # of a multiprocessor


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


def cuobjdump(option: str, path: Path, *options: str) -> str:
    return subprocess.run(
        [TOOLS / "cuobjdump", option, *options, path], check=True, capture_output=True, text=True
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


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)([.\w]*)\s*(.*?);", re.MULTILINE)
ENDS = ("BRA", "BRX", "CALL", "RET", "EXIT", "BAR", "BSYNC", "WARPSYNC")


def _bytes(modifiers: str) -> int:
    """Bytes of an access of a thread, from the modifiers of LDG or STG."""
    narrow = re.search(r"\.[US](8|16)\b", modifiers)
    wide = re.search(r"\.(64|128|256)\b", modifiers)
    return int((wide or narrow)[1]) // 8 if wide or narrow else 4


def in_flight(body: str) -> list[Counter]:
    """Groups of loads from global memory that overlap in time. Of each, the loads in flight at its peak, by bytes.

    A load is in flight until an instruction reads or overwrites its registers, and then no load before it is. A call, a
    barrier and the end of a block of instructions end all; a conditional branch, which waits for no load, ends none.
    A group ends when no load is in flight. `body` is a kernel's machine code.
    """
    groups, most, pending = [], Counter(), []
    for predicate, name, modifiers, operands in INSTRUCTION.findall(body):
        registers = {int(r) for r in re.findall(r"\bR(\d+)\b", operands)}
        if name in ENDS and not (name == "BRA" and predicate):
            pending = []
        used = [i for i, (_, loaded) in enumerate(pending) if loaded & registers]
        pending = pending[max(used, default=-1) + 1 :]
        if not pending and most:
            groups.append(most)
            most = Counter()
        if name == "LDG":
            size = _bytes(modifiers)
            first = int(re.match(r"(?:\w+, )?R(\d+)", operands)[1])
            pending.append((size, set(range(first, first + max(size // 4, 1)))))
            now = Counter(width for width, _ in pending)
            most = max(most, now, key=lambda c: sum(width * n for width, n in c.items()))
    return [*groups, most] if most else groups


@dataclass(frozen=True)
class Accesses:
    load: int  # bytes of the widest load of a thread
    store: int
    groups: tuple[Counter, ...]  # see `in_flight`

    def wide_groups(self) -> list[int]:
        """For each group with a widest load, the most of them in flight."""
        return [group[self.load] for group in self.groups if group[self.load]]

    def narrow_group(self) -> int:
        """The most narrower loads in flight."""
        return max((group.total() - group[self.load] for group in self.groups), default=0)

    def bytes_in_flight(self, registers: int) -> int:
        """Bytes of a multiprocessor: the largest wide group times the threads that its registers admit."""
        blocks = REGISTERS // (THREADS * -(-registers // 8) * 8)
        return max(self.wide_groups(), default=0) * self.load * THREADS * blocks


def accesses(
    path: Path, kernels: Iterable[str] = (), arch: str | None = None
) -> dict[str, dict[str, Accesses]]:
    """Loads and stores of a thread, by kernel and architecture; all of them, or those of `kernels` and `arch`."""
    options = ["--gpu-architecture", arch] if arch else []
    if kernels:
        names = _readable(re.findall(r"Function (\S+):", cuobjdump("--dump-resource-usage", path, *options)))
        options += ["--function", ",".join(symbol for symbol, name in names.items() if name in kernels)]
    found = defaultdict(dict)
    for arch, section in _sections(cuobjdump("--dump-sass", path, *options)):
        functions = re.split(r"Function : (\S+)", section)[1:]
        names = _readable(functions[::2])
        for symbol, body in zip(functions[::2], functions[1::2], strict=True):
            widths = [
                max((_bytes(m) for _, name, m, _ in INSTRUCTION.findall(body) if name == verb), default=4)
                for verb in ("LDG", "STG")
            ]
            found[names[symbol]][arch] = Accesses(*widths, tuple(in_flight(body)))
    return dict(found)


def _order(kernel: str) -> tuple:
    return (
        *re.match(r"(\w+)<(\w+)", kernel).groups(),
        *(int(n) for n in re.findall(r", (\d+)", kernel)),
        kernel,
    )


def page(found: dict[str, dict[str, Resources]], moved: dict[str, dict[str, Accesses]], nvcc: str) -> str:
    text = f"""# Machine code of the CUDA kernels

This page lists every kernel of `csrc/` as nvcc {nvcc} compiles it for sm_80, sm_90 and sm_100.
`python -m benchmarks.tools.cuda_code` writes it and needs no GPU. It describes compiled code; nothing here
has been timed.

| column | meaning |
| --- | --- |
| kernel | the number is the largest number of channels; `true`: inverse and backward in one pass |
| kernel `Masked...` | the number is the samples of a tile; `true`: units in shared memory |
| registers | registers per thread; a multiprocessor has 65,536 |
| spills | bytes of stack per thread, for values that did not fit in registers |
| load, store | bytes of the widest load and store of a thread; some strides and sizes take narrower ones |
| wide at once | loads of the widest kind that a thread has in flight, for each group of loads in the code |
| narrow at once | the most narrower loads that a thread has in flight |
| KB in flight | *predicted*: the largest wide group times the bytes of a load, {THREADS} threads and the blocks that fit |
| measured | empty until a GPU has measured it: bandwidth as a share of a copy's |

Three values are for sm_80 / sm_90 / sm_100; a single value applies to all three.

A load is in flight from its instruction to the first that uses its registers. The count follows the order of
the instructions; a call, a barrier and an unconditional branch end it, so that it is a lower bound where both
arms of a condition load. The model of KB in flight takes the blocks that {REGISTERS:,} registers of a
multiprocessor admit and assumes that all of them load at the same time. The columns are given for `conv1x1`,
whose kernels stream large tensors.

| kernel | registers | spills | load | store | wide at once | narrow at once | KB in flight | measured |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
    measured = cells(found)
    for kernel in sorted(found, key=_order):
        each = [moved[kernel][arch] for arch in ARCHITECTURES]
        wide = [_three(a.load for a in each), _three(a.store for a in each)]
        at_once = ["–"] * 3
        if kernel.startswith("Conv1x1"):
            rows = [(a, found[kernel][arch].registers) for a, arch in zip(each, ARCHITECTURES, strict=True)]
            at_once = [
                _three(" ".join(str(n) for n in a.wide_groups()) for a, _ in rows),
                _three(a.narrow_group() for a, _ in rows),
                _three(f"{a.bytes_in_flight(registers) / 1024:.0f}" for a, registers in rows),
            ]
        text += f"| `{kernel}` | {' | '.join((*measured[kernel], *wide, *at_once))} | |\n"
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
    options.out.write_text(page(found, accesses(library()), extension.build["cuda"]))
    print(f"{len(found)} kernels in {options.out}")
    print(*spills(found), sep="\n")


if __name__ == "__main__":
    main()
