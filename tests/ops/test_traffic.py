"""Bytes that each kernel moves an element of x, and what it launches: counted in the interpreter, held to the design's table."""

import importlib
import inspect
import pkgutil

import pytest
import torch

import fastflow
import fastflow.triton_kernels
from tests.support import interpreter
from tests.support.cases import lay_out

pytestmark = pytest.mark.skipif(
    not interpreter.RUNS, reason="kernels are compiled here: only the interpreter counts what they move"
)

SHAPE = (
    4,
    12,
    16,
    16,
)  # Glow's first level; large enough that a value a channel or a sample is below the tolerance
LAYOUTS = ("contiguous", "channels_last", "sliced", "channels_last sliced")
SEED = torch.tensor(1)
MAP = (8, 0.9, 0.05, True)  # bits, scale, shift, logit


def coupling(kind: str, mask: str, scale: str):
    def arguments(x, like):
        transformed = x.shape[1] // (2 if mask == "halves" else 1)
        h = like(x.shape[0], transformed * (1 if scale == "none" else 2), *x.shape[2:])
        factor = torch.rand(transformed) + 0.5 if scale == "soft_clamp" else None
        variant = (mask, False, scale, "scale_first", "shift_scale")
        if kind in ("forward", "inverse"):
            return x, h, factor, *variant, kind == "inverse"
        gradients = like(*x.shape), torch.randn(x.shape[0])
        return (x, h, factor, *gradients, *variant, *([False] if kind == "backward" else []))

    return arguments


def actnorm(kind: str):
    def arguments(x, like):
        given = x, torch.randn(x.shape[1]), torch.randn(x.shape[1])
        if kind in ("forward", "inverse"):
            return *given, kind == "inverse"
        return *given, like(*x.shape), torch.randn(x.shape[0]), *([False] if kind == "backward" else [])

    return arguments


def squeeze(order: str, inverse: bool):
    return lambda x, like: (x, order, inverse)


def dequantize(noise: bool, squeeze_order: str | None):
    def arguments(x, like):
        u = like(*x.shape).sigmoid() if noise else None
        return pixels(x), u, None if noise else SEED, 0, *MAP, squeeze_order, torch.float32

    return arguments


def dequantize_backward(x, like):
    return pixels(x), like(*x.shape).sigmoid(), like(*x.shape), torch.randn(x.shape[0]), *MAP, None


def pixels(x):
    return (x.sigmoid() * 255).to(torch.uint8)  # in the layout of x, and dense


def gaussian(terms: str, backward: bool = False):
    def arguments(x, like):
        mean, log_scale = given(x, like, terms)
        return (x, mean, log_scale, *([torch.randn(x.shape[0])] if backward else []))

    return arguments


def given(x, like, terms: str):
    if terms == "standard":
        return None, None
    return (
        (like(*x.shape), like(*x.shape))
        if terms == "full"
        else (torch.randn(x.shape[1]), torch.randn(x.shape[1]))
    )


def gaussian_sample(terms: str):
    return lambda x, like: (list(x.shape), *given(x, like, terms), 0.7, SEED, 0, torch.float32)


# op, what it is called in the test's id, arguments for an x, bytes an element of x, launches; the second launch sums over programs
TABLE = [
    ("affine_coupling", "halves", coupling("forward", "halves", "sigmoid"), 12, 1),
    ("affine_coupling", "inverse", coupling("inverse", "halves", "soft_clamp"), 12, 1),
    ("affine_coupling", "checkerboard", coupling("forward", "checkerboard", "soft_clamp"), 16, 1),
    ("affine_coupling", "additive", coupling("forward", "halves", "none"), 10, 1),
    ("affine_coupling_backward", "halves", coupling("backward", "halves", "sigmoid"), 18, 1),
    ("affine_coupling_backward", "factor", coupling("backward", "halves", "soft_clamp"), 18, 2),
    ("affine_coupling_backward", "checkerboard", coupling("backward", "checkerboard", "soft_clamp"), 28, 2),
    ("affine_coupling_backward", "additive", coupling("backward", "halves", "none"), 10, 1),
    (
        "affine_coupling_backward",
        "additive checkerboard",
        coupling("backward", "checkerboard", "none"),
        12,
        1,
    ),
    ("affine_coupling_inverse_backward", "halves", coupling("inverse_backward", "halves", "sigmoid"), 24, 1),
    (
        "affine_coupling_inverse_backward",
        "factor",
        coupling("inverse_backward", "halves", "soft_clamp"),
        24,
        2,
    ),
    (
        "affine_coupling_inverse_backward",
        "checkerboard",
        coupling("inverse_backward", "checkerboard", "soft_clamp"),
        32,
        2,
    ),
    ("affine_coupling_inverse_backward", "additive", coupling("inverse_backward", "halves", "none"), 20, 1),
    ("actnorm", "forward", actnorm("forward"), 8, 1),
    ("actnorm", "inverse", actnorm("inverse"), 8, 1),
    ("actnorm_backward", "", actnorm("backward"), 12, 2),
    ("actnorm_inverse_backward", "", actnorm("inverse_backward"), 16, 2),
    ("actnorm_statistics", "", lambda x, like: (x,), 4, 2),
    ("squeeze", "channel", squeeze("channel", False), 8, 1),
    ("squeeze", "space", squeeze("space", False), 8, 1),
    ("squeeze", "inverse", squeeze("realnvp", True), 8, 1),
    ("dequantize", "seed", dequantize(False, None), 5, 1),
    ("dequantize", "noise", dequantize(True, None), 9, 1),
    ("dequantize", "squeezed", dequantize(False, "channel"), 5, 1),
    ("dequantize_backward", "", dequantize_backward, 13, 1),
    ("dequantize_inverse", "", lambda x, like: (x, *MAP, None), 5, 1),
    ("dequantize_inverse", "squeezed", lambda x, like: (x, *MAP, "channel"), 5, 1),
    ("gaussian_log_prob", "standard", gaussian("standard"), 4, 1),
    ("gaussian_log_prob", "channels", gaussian("channels"), 4, 1),
    ("gaussian_log_prob", "full", gaussian("full"), 12, 1),
    ("gaussian_log_prob_backward", "standard", gaussian("standard", True), 8, 1),
    ("gaussian_log_prob_backward", "channels", gaussian("channels", True), 8, 2),
    ("gaussian_log_prob_backward", "full", gaussian("full", True), 24, 1),
    ("gaussian_sample", "standard", gaussian_sample("standard"), 4, 1),
    ("gaussian_sample", "full", gaussian_sample("full"), 12, 1),
    ("uniform_noise", "", lambda x, like: (list(x.shape), SEED, 0, torch.float32), 4, 1),
]


def laid_out(shape, layout: str):
    x = torch.randn(shape)
    if layout == "channels_last sliced":
        both = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)
        return both.chunk(2, dim=1)[1]
    return lay_out(x, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("op", "_", "arguments", "expected", "launches"),
    TABLE,
    ids=[f"{op} {case}".strip() for op, case, *_ in TABLE],
)
def test_bytes_and_launches(op, _, arguments, expected, launches, layout):
    x = laid_out(SHAPE, layout)
    args = arguments(x, lambda *shape: laid_out(shape, layout))
    with fastflow.backend("triton"), interpreter.traffic() as found:
        getattr(torch.ops.fastflow, op).default(*args)
    moved = (found.read + found.written) / x.numel()
    assert moved >= expected, "fewer bytes than there are: the counter is broken"
    # of the statistics each program leaves three numbers a channel, which are read twice
    assert moved <= (1.07 if op == "actnorm_statistics" else 1.05) * expected, (
        f"{found.read} bytes read, {found.written} written"
    )
    assert found.operations == [], "something else ran than kernels, which may be a copy"
    assert len(found.launches) == launches, found.launches


def test_a_large_sample_is_shared_among_programs():
    z = torch.randn(1, 12, 64, 64)
    with fastflow.backend("triton"), interpreter.traffic() as found:
        torch.ops.fastflow.gaussian_log_prob.default(z, None, None)
    assert [programs > 1 for _, programs in found.launches] == [True]
    assert found.operations == ["sum"]


def test_every_op_with_a_kernel_is_in_the_table():
    launchers = set()
    for module in pkgutil.iter_modules(fastflow.triton_kernels.__path__):
        launchers |= vars(importlib.import_module(f"fastflow.triton_kernels.{module.name}")).keys()
    ops = {
        name
        for name in launchers
        if inspect.isfunction(getattr(fastflow.reference, name, None)) and hasattr(torch.ops.fastflow, name)
    }
    assert ops == {op for op, *_ in TABLE}


def test_copies_and_other_operations_are_seen():
    x, parameter = torch.randn(2, 4, 2, 3).mT, torch.zeros(4)
    with fastflow.backend("triton"), interpreter.traffic() as found:
        torch.ops.fastflow.actnorm.default(x, parameter, parameter, False)
    assert found.operations == ["contiguous", "copy_"], "a transposed image is copied before and after"
    with interpreter.traffic() as found:
        x.mT.view(-1)
        torch.cat([x, x])
        x.contiguous()
        x.mT.contiguous()  # is as it lies
        x.clone().add_(1)
    assert found.operations == ["cat", "clone", "clone", "add_"]
    assert not found.launches
