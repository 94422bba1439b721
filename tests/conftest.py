"""What every test stands on: the interpreter where there is no GPU, poisoned memory, one seed."""

import os

import torch

# Triton reads this once, at its first import, which must come later than here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

import fastflow  # noqa: E402
from fastflow.ops import extension  # noqa: E402
from tests.support import interpreter  # noqa: E402
from tests.support.cases import KERNELS  # noqa: E402

interpreter.round_to_nearest()
interpreter.count_loops()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


BACKENDS = {
    "interpreter": "triton",
    "cuda": "auto",
    "compiled": "auto",
}  # fastflow.backend's name for what runs there


@pytest.fixture(
    scope="module",
    params=["reference", *KERNELS],
)
def each_backend(request):
    """Runs a module's tests on every body of its ops: plain PyTorch, Triton's interpreter, and the kernels on a device.

    The ops of the C++ extension have others: ``@pytest.mark.parametrize("each_backend", EXTENSION, indirect=True)``.
    """
    if request.param == "interpreter" and not interpreter.RUNS:
        pytest.skip("kernels are compiled here, not interpreted: the device runs them")
    if request.param in ("compiled", "emulated") and not extension.cpu:
        pytest.skip("the C++ extension was not built here: no compiler")
    torch.set_default_device("cuda" if request.param == "cuda" else "cpu")
    with fastflow.backend(BACKENDS.get(request.param, request.param)):
        yield request.param
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def poison_and_seed():
    """Fills what ``torch.empty`` returns, in C++ too, with NaN (integers: the largest value), and seeds torch.

    torch offers the filling only together with deterministic algorithms; an operation that has none warns at most.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
