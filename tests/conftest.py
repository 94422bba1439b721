"""What every test stands on: the interpreter where there is no GPU, poisoned memory, one seed."""

import os

import torch

# Triton reads this once, at its first import, which must come later than here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def poison_and_seed():
    """Fills what ``torch.empty`` returns, in C++ too, with NaN (integers: the largest value), and seeds torch.

    torch offers the filling only together with deterministic algorithms; an operation that has none warns at most.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
