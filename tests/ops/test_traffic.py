"""What the counter of bytes and launches sees; test_specs.py holds every kernel to its bytes with it."""

import pytest
import torch

import fastflow
from tests.support import interpreter

pytestmark = pytest.mark.skipif(
    not interpreter.RUNS, reason="kernels are compiled here: only the interpreter counts what they move"
)


def test_a_large_sample_is_shared_among_programs():
    z = torch.randn(1, 12, 64, 64)
    with fastflow.backend("triton"), interpreter.traffic() as found:
        torch.ops.fastflow.gaussian_log_prob.default(z, None, None)
    assert [programs > 1 for _, programs in found.launches] == [True]
    assert found.operations == ["sum"]


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
