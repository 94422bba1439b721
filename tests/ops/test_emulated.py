"""The emulation of CUDA kernels on the CPU: that it sees races and wrong addresses, and that our kernels have none."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastflow
from fastflow import ops
from fastflow.ops import extension
from fastflow.ops.masked_inverse import AFTER, BEFORE, GATE, SKIP, Affine, Spline
from fastflow.ops.masked_inverse.reference import gated, masks_of, sizes_of
from tests.support.cases import lay_out, name, pairwise
from tests.support.matrices import lu_inputs, triangular_inputs

CSRC = Path(__file__).parents[2] / "csrc"
needs_emulator = pytest.mark.skipif(
    not extension.emulator, reason="the emulator was not built here: no compiler, or no FASTFLOW_EMULATOR=1"
)
ORDERS = (0, 1, 2, 3)  # of threads and blocks: ascending, descending, two shuffles

FAULTY = """
#include <cstdio>
#include "emulated/emulated.h"
using namespace fastflow;

struct Kernel {
  static constexpr int THREADS = 8;
  int fault;
  Span<float> out;
  template <class Block>
  void operator()(Block& block) const {
    const Span<float> shared = block.template shared<float>(fault == 5 ? 64 : 8);
    block.phase([&](int t) { if (fault != 4 || t) shared[t] = t; });
    if (fault == 1) block.phase([&](int t) { shared[t] += shared[(t + 1) % 8]; });  // reads what a neighbour writes
    block.phase([&](int t) {
      if (fault == 2) out[t + 1] = shared[t];            // past the end
      else if (fault == 3) out.template load<4>(t / 2);  // misaligned
      else out[t] = shared[7 - t];
    });
  }
};

int main(int, char** argv) {
  alignas(16) float memory[8] = {};
  try {
    Emulated::order = argv[2][0] - '0';
    Emulated::launch(Kernel{argv[1][0] - '0', {memory, 8}}, 1, 8 * sizeof(float));
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 0;
  }
  for (float v : memory) std::printf("%g ", v);
}
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.cpp").write_text(FAULTY)
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        CSRC,
        "faulty.cpp",
        "-o",
        "faulty",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lambda fault, order=0: subprocess.run(
        [folder / "faulty", str(fault), str(order)], capture_output=True, text=True
    ).stdout.strip()


def test_the_emulator_detects_faults(faulty):
    assert {faulty(0, order) for order in ORDERS} == {"7 6 5 4 3 2 1 0"}
    assert len({faulty(1, order) for order in ORDERS}) > 1  # a race
    assert faulty(2) == "fastflow: element 8 of a span of 8"
    assert faulty(3).startswith("fastflow: a span is misaligned at element 1")
    assert "nan" in faulty(4)  # unwritten shared memory
    assert faulty(5) == "fastflow: a block uses more shared memory than its launch provides"


def same_in_every_order(run, multiprocessors: int = 1) -> tuple[torch.Tensor, ...]:
    """What ``run`` gives on the CUDA kernels, once in each order of threads and blocks."""
    found = []
    try:
        for order in ORDERS:
            torch.ops.fastflow_emulated.configure(order, multiprocessors)
            with fastflow.backend("emulated"):
                found.append(run())
    finally:
        torch.ops.fastflow_emulated.configure(0, 1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    return found[0]


@needs_emulator
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    "shape", [(9, 12, 16, 16), (5, 24, 8, 8), (40, 48, 4, 4), (3, 64, 7, 5), (2, 3, 5, 5)], ids=str
)
def test_conv1x1_has_no_race(shape, layout):
    x, dy = lay_out(torch.randn(shape), layout), lay_out(torch.randn(shape), layout)
    weight, bias = torch.linalg.qr(torch.randn(shape[1], shape[1])).Q, torch.randn(shape[1])

    def run():
        return (
            ops.conv1x1(x, weight, bias),
            *torch.ops.fastflow.conv1x1_backward(x, weight, dy),
            *ops.conv1x1_inverse_backward(x, weight, weight.mT, bias, dy),
        )

    same_in_every_order(run)


@needs_emulator
@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=[(20, 12, 32, 32), (60, 24, 8, 8), (70, 48, 8, 8), (1, 64, 16, 16)],
        layout=["contiguous", "channels_last"],
        multiprocessors=[1, 3, 132],
    ),
    ids=lambda c: name(c).replace(" ", ""),
)
def test_conv1x1_of_any_number_of_multiprocessors(case):
    """Blocks that take several tiles, blocks that share one: the result is the reference's, and has no race."""
    shape, layout, multiprocessors = case.values()
    x, dy = lay_out(torch.randn(shape), layout), lay_out(torch.randn(shape) / 150, layout)
    weight, bias = torch.linalg.qr(torch.randn(shape[1], shape[1])).Q, torch.randn(shape[1])

    def run():
        return (
            ops.conv1x1(x, weight, bias),
            *torch.ops.fastflow.conv1x1_backward(x, weight, dy),
            *ops.conv1x1_inverse_backward(x, weight, weight.mT, bias, dy),
        )

    found = same_in_every_order(run, multiprocessors)
    with fastflow.backend("reference"):
        torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-5)


@needs_emulator
@pytest.mark.parametrize("k, c", [(2, 1), (3, 12), (3, 24), (2, 48), (2, 61)])
def test_lu_weight_has_no_race(k, c):
    args = lu_inputs(k, c, torch.float32)
    upstream = torch.randn(k, c, c), torch.randn(k, c, c), torch.randn(k)

    def run():
        found = ops.lu_weight(*args)
        return *found, *torch.ops.fastflow.lu_weight_backward(*args, found[1], *upstream)

    same_in_every_order(run)


@needs_emulator
@pytest.mark.parametrize("k, n, m", [(3, 12, 12), (2, 48, 200), (1, 130, 129)])
@pytest.mark.parametrize("upper, transpose", [(False, False), (True, False), (True, True)])
def test_triangular_solve_has_no_race(k, n, m, upper, transpose):
    A, B = triangular_inputs(k, n, m, torch.float32)
    same_in_every_order(lambda: [ops.triangular_solve(A, B, upper=upper, transpose=transpose)])


SHARED = 227 * 1024  # bytes of a block on an H200
RESIDUAL = (0, BEFORE, BEFORE | GATE | SKIP, BEFORE)
# features, widths, layers, activation, transformer: what fits in blocks of degrees, and what does not
MASKED = {
    "one block": (5, (16, 16), (AFTER, AFTER, 0), "relu", Affine()),
    "several blocks": (40, (70, 90), (AFTER, AFTER, 0), "tanh", Affine("softplus", offset=1e-3)),
    "residual": (33, (80, 80, 80), RESIDUAL, "silu", Affine("sigmoid", "shift_first", "shift_scale")),
    "many parameters": (9, (60, 60, 60), RESIDUAL, "elu", Spline(20, tails="none")),
    "degrees that exceed a block": (3, (150, 300), (AFTER, AFTER, 0), "relu", Spline(4, convention="zuko")),
    "one degree that exceeds a block": (
        1,
        (400, 500, 400),
        RESIDUAL,
        "silu",
        Affine("soft_clip", factor=3.0),
    ),
    "narrower than the features": (70, (11, 6), (AFTER, AFTER, 0), "relu", Spline(3, tails="circular")),
    "sums in every layer": (7, (30,) * 5, (AFTER, AFTER, *[AFTER | SKIP] * 3, 0), "tanh", Affine()),
    "no hidden layer": (37, (), (0,), "relu", Affine("tanh")),
    "one feature": (1, (3,), (AFTER, 0), "relu", Spline(1, convention="nflows")),
}


def masked_inputs(name, samples, dtype=torch.float32, context=True):
    """Calls of the inverse and of the solve of a masked network with random degrees."""
    features, widths, layers, activation, transformer = MASKED[name]
    each = transformer.parameters
    sizes = sizes_of(features, list(widths), each)
    degrees = {width: torch.randint(features, (width,)).sort().values for width in widths}
    ends = torch.stack(
        [(degrees[width][:, None] <= torch.arange(features)).sum(0) for width in widths]
        or [torch.empty(features, dtype=torch.int64)]
    )[: len(widths)]
    masks = masks_of(ends, sizes, each)
    weights = torch.cat(
        [
            torch.where(mask, torch.randn(mask.shape) / mask.shape[1] ** 0.5, torch.nan).flatten()
            for mask in masks
        ]
    ).to(dtype)  # masked weights must not be read
    network = {"weights": weights, "ends": ends, "widths": list(widths), "layers": list(layers)}
    added = torch.randn((samples, sum(sizes[1:])) if context else (sum(sizes[1:]),), dtype=dtype) / 2
    count = gated(list(layers), list(widths))
    gates = torch.rand(samples, count, dtype=dtype) if count else None
    options = {"order": torch.randperm(features), "activation": activation, "transformer": transformer}
    z, units = torch.rand(samples, features, dtype=dtype), torch.rand(2, samples, sum(widths), dtype=dtype)
    jac, dparams = torch.randn(2, samples, features, each, dtype=dtype)
    rest = (dparams, *units) if context else ()

    def run():
        return (
            *ops.masked_inverse(z, added=added, gates=gates, **network, **options),
            ops.masked_solve(z, z + 1, jac, *rest, **network),
        )

    return run


@pytest.fixture
def shared_memory():
    """Sets the bytes of shared memory of a block."""
    yield torch.ops.fastflow_emulated.limit_shared_memory
    torch.ops.fastflow_emulated.limit_shared_memory(SHARED)


@needs_emulator
@pytest.mark.parametrize("samples", [1, 9, 70])  # tiles of 8 samples, and of 32 from 64 on
@pytest.mark.parametrize("name", MASKED)
def test_masked_inverse_has_no_race(name, samples):
    run = masked_inputs(name, samples)
    found = same_in_every_order(run)
    with fastflow.backend("reference"):
        torch.testing.assert_close(found, run(), rtol=1e-3, atol=1e-4)


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["several blocks", "residual", "degrees that exceed a block"])
def test_masked_inverse_with_less_shared_memory(name, dtype, shared_memory):
    """Units in global memory, and smaller tiles, give the same bits, also if a block has several tiles."""
    run = masked_inputs(name, 70, dtype)
    expected = same_in_every_order(run)
    found = {}
    for kilobytes in (112, 96, 80, 64):
        shared_memory(kilobytes * 1024)
        try:
            found[kilobytes] = same_in_every_order(run)
        except RuntimeError as error:  # too little for any tile
            assert "of shared memory" in str(error) and dtype == torch.float64 and kilobytes < 96
    assert len(found) > 1
    assert all(torch.equal(a, b) for each in found.values() for a, b in zip(each, expected, strict=True))


@needs_emulator
@pytest.mark.parametrize("name", ["several blocks", "residual"])
def test_masked_inverse_of_any_number_of_multiprocessors(name):
    """Tiles of 8 and of 32 samples give the same bits."""
    run = masked_inputs(name, 140, context=False) if name == "several blocks" else masked_inputs(name, 140)
    few, many = (same_in_every_order(run, multiprocessors) for multiprocessors in (1, 132))
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))


@needs_emulator
@pytest.mark.parametrize("name", ["several blocks", "degrees that exceed a block"])
def test_masked_inverse_stays_in_its_memory(name):
    """Whatever the values of ends and order are: the emulation checks each access."""
    features, widths, layers, activation, transformer = MASKED[name]
    sizes = sizes_of(features, list(widths), transformer.parameters)
    weights = torch.zeros(sum(a * b for a, b in zip(sizes[1:], sizes[:-1], strict=True)))
    z, jac = torch.rand(9, features), torch.rand(9, features, transformer.parameters)
    network = {"weights": weights, "widths": list(widths), "layers": list(layers)}
    with fastflow.backend("emulated"):
        for _ in range(20):
            ends = torch.randint(-3, max(widths) + 3, (len(widths), features))
            order = torch.randint(-3, features + 3, (features,))
            found, _ = ops.masked_inverse(
                z,
                added=torch.zeros(sum(sizes[1:])),
                ends=ends,
                order=order,
                transformer=transformer,
                **network,
            )
            u = ops.masked_solve(z, z + 1, jac, ends=ends, **network)
            assert found.shape == u.shape == z.shape


@needs_emulator
def test_a_singular_matrix_raises_on_the_next_call():
    """A kernel cannot raise: it reports the matrix, and the next launch or raise_singular raises once."""
    A, B = triangular_inputs(3, 4, 2)
    broken = A.clone()
    broken[1, 2, 2] = 0
    message = r"triangular_solve \(an earlier call\): diagonal of matrix 1: got 0, inf or nan at index 2"
    with fastflow.backend("emulated"):
        assert not ops.triangular_solve(broken, B, upper=False)[1].isfinite().all()
        with pytest.raises(ValueError, match=message):
            ops.triangular_solve(A, B, upper=False)
        ops.triangular_solve(A, B, upper=False)
        perm, lower, upper, log_s, sign_s = lu_inputs(3, 4)
        log_s[2, 1] = torch.nan
        ops.lu_weight(perm, lower, upper, log_s, sign_s)
        with pytest.raises(
            ValueError,
            match=r"lu_weight \(an earlier call\): diagonal of matrix 2: got 0, inf or nan at index 1",
        ):
            ops.raise_singular()
        ops.raise_singular()
