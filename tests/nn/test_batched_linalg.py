"""Log-dets and solutions of batches are right after the number of threads is set, where torch's own are not."""

import subprocess
import sys

import pytest
import torch

from fastflow.nn.batched_linalg import log_abs_det, solve

SCRIPT = """
import torch
from fastflow import nn as fnn
from fastflow.nn.batched_linalg import log_abs_det, solve
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
A = torch.randn(4, 192, 192, dtype=torch.float64, generator=generator) / 28 + torch.eye(192, dtype=torch.float64)
expected = torch.stack([torch.linalg.slogdet(a).logabsdet for a in A])
torch.testing.assert_close(log_abs_det(A), expected, rtol=0, atol=1e-10)
torch.manual_seed(0)
flow = fnn.Residual(fnn.LipschitzMLP(160, (32,)), log_det="exact").double()
x = torch.randn(4, 160, dtype=torch.float64)
each = torch.cat([flow(row[None])[1] for row in x])
torch.testing.assert_close(flow(x)[1], each, rtol=0, atol=1e-8)
B = torch.randn(4, 192, 2, dtype=torch.float64, generator=generator)
torch.testing.assert_close(A @ solve(A, B), B, rtol=0, atol=1e-8)
conv = fnn.PeriodicConv(160, 1).double()
x = torch.randn(1, 160, 2, 4, dtype=torch.float64)
torch.testing.assert_close(conv.inverse(conv(x)[0])[0], x, rtol=0, atol=1e-8)
weight = torch.randn(4, 160, 160, dtype=torch.float64, generator=generator)
basis = fnn.linear.orthogonal_matrix(weight, "cayley")
torch.testing.assert_close(basis.mT @ basis, torch.eye(160, dtype=torch.float64).expand(4, -1, -1))
"""


def test_two_threads():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4, 4), (2, 2, 70, 70), (0, 70, 70)])
def test_values_and_gradients_are_those_of_each_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(shape, dtype=torch.float64, generator=generator) + 3 * torch.eye(
        shape[-1], dtype=torch.float64
    )
    A.requires_grad_()
    found = log_abs_det(A)
    assert found.shape == shape[:-2]
    expected = torch.linalg.slogdet(A).logabsdet
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), A)[0] for v in (found, expected)))


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4, 4), (2, 2, 70, 70), (0, 70, 70)])
def test_solutions_and_gradients_are_those_of_each_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(shape, dtype=torch.float64, generator=generator) / shape[-1] + torch.eye(
        shape[-1], dtype=torch.float64
    )
    B = torch.randn(*shape[:-1], 2, dtype=torch.float64, generator=generator)
    inputs = A.requires_grad_(), B.requires_grad_()
    found, expected = solve(A, B), torch.linalg.solve(A, B)
    torch.testing.assert_close(found, expected)
    for each in zip(*(torch.autograd.grad(v.square().sum(), inputs) for v in (found, expected)), strict=True):
        torch.testing.assert_close(*each)
