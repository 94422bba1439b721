"""The compiled ops as torch.ops.fastflow_C has them: what they refuse, the same bits for any number of threads, all of it written."""

import pytest
import torch
from cases import assert_same_bits_whatever_the_threads, assert_writes_everything
from test_lu_weight import inputs as lu_inputs
from test_triangular_solve import inputs as solve_inputs

import fastflow
from fastflow import ops
from fastflow.ops import extension

pytestmark = pytest.mark.skipif(not extension.cpu, reason="the C++ extension was not built here: no compiler")
C = torch.ops.fastflow_C
bodies = pytest.mark.parametrize("namespace", ["fastflow_C", "fastflow_emulated"])

X, W, PERM, LU = torch.zeros(2, 3, 4, 4), torch.zeros(3, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 3)
V = torch.zeros(2, 3)
ERRORS = [
    ("triangular_solve", (V, LU, False, False, False), "A has shape [2, 3], expected [K, n, n]"),
    ("triangular_solve", (torch.zeros(2, 3, 4), LU, False, False, False), "A has shape [2, 3, 4], expected [K, n, n]"),
    (
        "triangular_solve",
        (LU, torch.zeros(2, 4, 1), False, False, False),
        "B has shape [2, 4, 1], expected [K, n, m] with K = 2 and n",
    ),
    (
        "triangular_solve",
        (LU, torch.zeros(1, 3, 1), False, False, False),
        "B has shape [1, 3, 1], expected [K, n, m] with K = 2 and n",
    ),
    ("triangular_solve", (LU.half(), LU.half(), False, False, False), "A has dtype Half, expected Float or Double"),
    ("triangular_solve", (LU, LU.double(), False, False, False), "B has dtype Double, expected A's, Float"),
    ("conv1x1", (X[0, 0, 0], W, None), "x has shape [4], expected [N, C, ...]"),
    ("conv1x1", (X.int(), W, None), "x has dtype Int, expected Float"),
    ("conv1x1", (torch.zeros(2, 65), W, None), "x has shape [2, 65], expected 1 to 64 channels"),
    ("conv1x1", (X, W[:2], None), "weight has shape [2, 3], expected [3, 3], x has 3 channels"),
    ("conv1x1", (X, W.half(), None), "weight has dtype Half, expected Float for x of dtype Float"),
    ("conv1x1", (X, W, torch.zeros(2)), "bias has shape [2], expected [3], one for each channel of x"),
    ("conv1x1_backward", (X, W, X[:, :, 1:]), "dy has shape [2, 3, 3, 4], expected x's, [2, 3, 4, 4]"),
    ("conv1x1_backward", (X, W, X.double()), "dy has dtype Double, expected x's, Float"),
    ("conv1x1_inverse_backward", (X, W, W[:2], None, X), "weight_inverse has shape [2, 3], expected [3, 3]"),
    ("lu_weight", (PERM, V, LU, V, V), "lower has shape [2, 3], expected [K, C, C]"),
    ("lu_weight", (PERM, torch.zeros(1, 65, 65), LU, V, V), "lower has shape [1, 65, 65], expected [K, C, C] with C up to 64"),
    ("lu_weight", (PERM, LU, LU[:1], V, V), "upper has shape [1, 3, 3], expected lower's, [2, 3, 3]"),
    ("lu_weight", (PERM, LU, LU, V[:, :2], V), "log_s has shape [2, 2], expected [2, 3]"),
    ("lu_weight", (PERM.int(), LU, LU, V, V), "perm has dtype Int, expected Long"),
    ("lu_weight_backward", (PERM, LU, LU, V, V, LU, LU, V, V[:, 0]), "dweight_inverse has shape [2, 3], expected lower's, [2, 3, 3]"),
    ("lu_weight_backward", (PERM, LU, LU, V, V, LU, LU, LU, V), "dlog_det has shape [2, 3], expected [2]"),
]


@bodies
@pytest.mark.parametrize("op, args, message", ERRORS, ids=[f"{op}: {message}" for op, _, message in ERRORS])
def test_errors_say_what_came_and_what_was_expected(op, args, message, namespace):
    with pytest.raises(RuntimeError) as error:
        getattr(getattr(torch.ops, namespace), op)(*args)
    assert f"{op}: {message}" in str(error.value)


@pytest.mark.parametrize("wrong", [-1, 3, "twice"])
def test_a_perm_that_is_none_is_an_error(wrong):
    perm, *rest = lu_inputs(2, 3)
    perm[1, 2] = perm[1, 0] if wrong == "twice" else wrong
    with pytest.raises(ValueError, match=rf"lu_weight: perm of matrix 1 has {perm[1, 2]} at place 2, expected each of 0 to 2 once"):
        ops.lu_weight(perm, *rest)
    with fastflow.backend("emulated"):
        ops.lu_weight(perm, *rest)
        with pytest.raises(ValueError, match="lu_weight: perm of matrix 1 names no row, or one twice, at place [02]"):
            ops.raise_singular()


@pytest.mark.skipif(not extension.cuda, reason="the CUDA extension was not built here: no nvcc, or no CUDA build of torch")
@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_a_gpu_that_nothing_was_compiled_for_runs_pytorch(capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(extension.build, "cuda_archs", "8.0;9.0;10.0+PTX")
    assert ops.library._has_code_for.__wrapped__(torch.device("cuda", 0)) is runs


def runs():
    """Calls by name, large enough for several threads."""
    x, dy, weight = torch.randn(64, 12, 16, 16), torch.randn(64, 12, 16, 16), torch.linalg.qr(torch.randn(12, 12)).Q
    rows = torch.channels_last
    lu = lu_inputs(33, 48, torch.float32)
    upstream = torch.randn(33, 48, 48), torch.randn(33, 48, 48), torch.randn(33)
    A, B = solve_inputs(3, 48, 333, torch.float32)
    return {
        "conv1x1": lambda: (C.conv1x1(x, weight, dy[0, :, 0, 0]),),
        "conv1x1_backward": lambda: C.conv1x1_backward(x, weight, dy),
        "conv1x1_backward of rows": lambda: C.conv1x1_backward(x.to(memory_format=rows), weight, dy.to(memory_format=rows)),
        "conv1x1_inverse_backward": lambda: C.conv1x1_inverse_backward(x, weight, weight.mT, None, dy),
        "conv1x1_inverse_backward of bfloat16": lambda: C.conv1x1_inverse_backward(x.bfloat16(), weight, weight.mT, None, dy.bfloat16()),
        "lu_weight": lambda: C.lu_weight(*lu),
        "lu_weight_backward": lambda: C.lu_weight_backward(*lu, upstream[0], *upstream),
        "triangular_solve": lambda: (C.triangular_solve(A, B, False, False, False),),
        "triangular_solve of a column": lambda: (C.triangular_solve(A, B[..., :1], True, False, False),),
    }


@pytest.mark.parametrize("name", runs())
def test_same_bits_for_any_number_of_threads_and_all_written(name):
    run = runs()[name]
    assert_same_bits_whatever_the_threads(run)
    assert_writes_everything(run)
