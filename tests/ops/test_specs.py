"""Every registered op, by the cases of its spec: equal to the reference, registered correctly, minimal traffic."""

import functools

import pytest
import torch

import fastflow
from fastflow.ops import extension, spec
from fastflow.ops.registry import OPS
from tests.conftest import BACKENDS
from tests.support import interpreter
from tests.support.cases import (
    CUDA,
    STATIC,
    assert_as_reference,
    assert_same_bits_whatever_the_threads,
    assert_writes_everything,
    functional,
    lay_out,
)

SHAPE = (2, 12, 16, 16)  # Glow's first level; values per channel or sample are below the tolerance of traffic
SMALL = (2, 8, 6, 10)
NAMES = [str(case) for case in spec.cases(spec.Make(), SMALL)]


def laid_out(layout: str):
    def apply(x: torch.Tensor) -> torch.Tensor:
        if layout == "channels_last sliced":
            both = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)
            return both.chunk(2, dim=1)[1]
        return lay_out(x, layout)

    return apply


def find(name: str, dtype: str, layout: str, shape: tuple[int, ...], device: str = "cpu") -> spec.Case:
    return cases(OPS[name.split()[0]].folder, dtype, layout, shape, device)[name]


@functools.lru_cache(maxsize=4)  # a layout each of one folder: successive tests take the same cases
def cases(folder: str, dtype: str, layout: str, shape: tuple[int, ...], device: str) -> dict[str, spec.Case]:
    make = spec.Make(getattr(torch, dtype), laid_out(layout))
    with torch.device(device):
        return {str(case): case for case in spec.cases(make, shape, folder)}


def bodies(name: str) -> list:
    """The implementations of an op besides its reference."""
    op = OPS[name.split()[0]]
    found = ["interpreter"] if op.triton else []
    found += ["compiled"] if "cpu" in op.compiled else []
    found += ["emulated"] if "cuda" in op.compiled else []
    return found + ([CUDA] if op.triton or "cuda" in op.compiled else [])


def on(name: str, body: str) -> fastflow.backend:
    """The block that runs an op by ``body``; skips the test where the body is not to be had."""
    if body == "interpreter" and not interpreter.RUNS:
        pytest.skip("kernels are compiled here, not interpreted")
    if body == "compiled" and not extension.cpu:
        pytest.skip("the C++ extension was not built here: no compiler")
    if body == "emulated" and not extension.emulator:
        pytest.skip("the emulator was not built here: no compiler, or no FASTFLOW_EMULATOR=1")
    return fastflow.backend(BACKENDS.get(body, body))


def runs_compiled(case: spec.Case) -> bool:
    """Whether the C++ op takes the arguments of a case."""
    eligible = OPS[case.op].eligible_compiled
    return eligible is None or eligible(*case.args)


def test_every_op_has_cases_whose_names_differ():
    assert {name.split()[0] for name in NAMES} == set(OPS)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    "name, body",
    [
        pytest.param(name, *body.values, marks=body.marks) if body is CUDA else (name, body)
        for name in NAMES
        for body in bodies(name)
    ],
)
@pytest.mark.parametrize(
    "dtype, layout", [("float32", "contiguous"), ("bfloat16", "channels_last"), ("float64", "sliced")]
)
def test_matches_reference(name, body, dtype, layout):
    case = find(name, dtype, layout, SMALL, "cuda" if body == "cuda" else "cpu")
    twice = body != "interpreter" or dtype == "float32"  # NumPy's bits repeat in every dtype if in one
    with on(name, body):
        op = getattr(torch.ops.fastflow, case.op).default
        assert_as_reference(op, *case.args, twice=twice, ill_conditioned=case.ill_conditioned)


@pytest.mark.parametrize("name", NAMES)
def test_registration(name):
    """Schema, fake and autograd registration, contiguous and channels_last, also for inputs that require grad."""
    for layout in ("contiguous", "channels_last"):
        case = find(name, "float64", layout, SMALL)
        op = getattr(torch.ops.fastflow, case.op).default
        torch.library.opcheck(op, case.args, test_utils=STATIC)


@pytest.mark.skipif(not extension.cpu, reason="the C++ extension was not built here: no compiler")
@pytest.mark.parametrize("dtype, layout", [("float32", "contiguous"), ("bfloat16", "channels_last")])
@pytest.mark.parametrize("name", [name for name in NAMES if "cpu" in OPS[name.split()[0]].compiled])
def test_same_bits_for_any_number_of_threads_and_all_written(name, dtype, layout):
    case = find(name, dtype, layout, (64, 12, 16, 16))
    if not runs_compiled(case):
        pytest.skip(
            "PyTorch runs: its bits may depend on the number of threads, as those of bfloat16 convolutions"
        )

    op = functional(getattr(torch.ops.fastflow, case.op).default)

    def run() -> tuple[torch.Tensor, ...]:
        found = op(*case.args)
        return found if isinstance(found, tuple) else (found,)

    assert_same_bits_whatever_the_threads(run)
    assert_writes_everything(run)


COUNTED = [
    str(case)
    for case in spec.cases(spec.Make(), SHAPE)
    if OPS[case.op].triton and case.bytes_moved is not None
]


LAID_OUT = ["contiguous", "channels_last sliced", "channels_last", "sliced"]


def in_layouts(names: list[str]) -> list[tuple[str, str]]:
    """Each op in all layouts, and each variant in one of them, in turns; a launcher finds the layout, whatever the variant.

    Two or three variants have two layouts each, a single one has all.
    """
    found = []
    for op in dict.fromkeys(name.split()[0] for name in names):
        variants = [name for name in names if name.split()[0] == op]
        each = {1: 4, 2: 2, 3: 2}.get(len(variants), 1)
        for i, variant in enumerate(variants):
            first = i * each if each > 1 else i + i // 4  # directions take turns too
            found += [(variant, LAID_OUT[(first + j) % 4]) for j in range(each)]
    return found


@pytest.mark.skipif(not interpreter.RUNS, reason="kernels are compiled here: only the interpreter counts")
@pytest.mark.parametrize("name, layout", in_layouts(COUNTED))
def test_bytes_and_launches(name, layout):
    # half of the elements of those that the interpreter searches for seconds
    shape = (2, 12, 8, 16) if OPS[name.split()[0]].folder in ("mixture_cdf", "spline") else SHAPE
    case = find(name, "float32", layout, shape)
    with fastflow.backend("triton"), interpreter.traffic() as found:
        case()
    elements = torch.Size(shape).numel()
    moved = (found.read + found.written) / elements
    assert moved >= case.bytes_moved, "fewer bytes than there are: the counter is broken"
    report = f"{found.read} bytes read, {found.written} written"
    assert moved <= case.tolerance * case.bytes_moved, report
    assert found.operations == [*case.operations], "an operation ran that is not a kernel and may be a copy"
    assert len(found.launches) == case.launches, found.launches


def test_every_op_with_a_kernel_is_counted():
    assert {op for op, found in OPS.items() if found.triton} == {name.split()[0] for name in COUNTED}
