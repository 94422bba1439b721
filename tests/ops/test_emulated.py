"""The emulation of CUDA kernels on the CPU: that it sees races and wrong addresses, and that our kernels have none."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastflow
from fastflow import ops
from fastflow.ops import extension
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
