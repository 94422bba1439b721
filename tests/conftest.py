"""Set-up of every test: Triton's interpreter where there is no GPU, poisoned memory, one seed."""

import gc
import os

import torch

# Triton reads this once, at its first import, which must come later than here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.support")

import fastflow  # noqa: E402
from fastflow.ops import extension  # noqa: E402
from tests.support import interpreter  # noqa: E402

interpreter.round_to_nearest()
interpreter.multiply_as_tensor_cores()
interpreter.count_loops()
interpreter.patch_once_a_launch()
interpreter.skip_repeated_work()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keeps the garbage collector away from what is imported and collected: a full collection of it takes a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


deselected = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Deselects ``gpu`` tests where torch sees no device; slow tests come first, so that no worker ends with one."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if "gpu" in item.keywords]
        config.hook.pytest_deselected(items=gpu)
        config.stash[deselected] = len(gpu)
        items[:] = [item for item in items if "gpu" not in item.keywords]
    items.sort(key=lambda item: "slow" not in item.keywords)


class FromWorkers:
    """Hands the number of deselected tests from pytest-xdist's workers, which collect, to their controller."""

    @staticmethod
    def pytest_sessionfinish(session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["deselected"] = session.config.stash.get(deselected, 0)

    @staticmethod
    def pytest_testnodedown(node):
        node.config.stash[deselected] = getattr(node, "workeroutput", {}).get("deselected", 0)


def pytest_configure(config):
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(FromWorkers)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(deselected, 0):
        terminalreporter.write_line(f"{count} gpu tests were deselected: torch sees no CUDA device")


# fastflow.backend's name for each body
BACKENDS = {"interpreter": "triton", "cuda": "auto", "compiled": "auto"}


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """Gives ``each_backend`` the values of the closest marker ``bodies``; ``on_both`` of test_large.py has its own."""
    named = [marker.args[0] for marker in metafunc.definition.iter_markers("parametrize")]
    if "each_backend" in metafunc.fixturenames and not any("each_backend" in names for names in named):
        bodies = metafunc.definition.get_closest_marker("bodies").args
        metafunc.parametrize("each_backend", bodies, indirect=True)


@pytest.fixture
def each_backend(request):
    """Runs a test on each body of the ops that its marker ``bodies`` names.

    These are "reference" (plain PyTorch), "interpreter" (Triton kernels in NumPy), "compiled" (C++ for the CPU),
    "emulated" (CUDA kernels run on the CPU), and "cuda" (the kernels of a device).
    """
    if request.param == "interpreter" and not interpreter.RUNS:
        pytest.skip("kernels are compiled here, not interpreted: the device runs them")
    if request.param == "compiled" and not extension.cpu:
        pytest.skip("the C++ extension was not built here: no compiler")
    if request.param == "emulated" and not extension.emulator:
        pytest.skip("the emulator was not built here: no compiler, or no FASTFLOW_EMULATOR=1")
    torch.set_default_device("cuda" if request.param == "cuda" else None)
    with fastflow.backend(BACKENDS.get(request.param, request.param)):
        yield request.param
    torch.set_default_device(None)


# torch.manual_seed also asks for each kind of device that torch knows, which takes as long as a short test
seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def poison_and_seed():
    """Fills what ``torch.empty`` returns, in C++ too, with NaN (integers: the largest value), and seeds torch.

    torch offers the filling only together with deterministic algorithms; an operation that has none warns at most.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    seed(0)
    yield
    torch.use_deterministic_algorithms(False)
