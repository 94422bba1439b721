"""Runs pytest in forks of one process, which has imported torch: a run starts in one second instead of ten."""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import types
from pathlib import Path
from typing import NamedTuple

# Before the first import of torch and Triton.  The faults are for a machine without a GPU.
os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import hypothesis  # noqa: E402, F401
import pytest  # noqa: E402
import torch._dynamo  # noqa: E402
import torch._inductor.config  # noqa: E402, F401
import triton.language  # noqa: E402, F401

forks = multiprocessing.get_context("fork")


class Failures:
    """A plugin of pytest that sends the id of each test that fails, and runs slow tests last."""

    def __init__(self, failed: multiprocessing.SimpleQueue) -> None:
        self.failed = failed

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items):
        result = yield
        items.sort(key=lambda item: "slow" in item.keywords)
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.put(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


class Outcome(NamedTuple):
    code: int | None  # of pytest; None: it ran out of time
    failed: list[str]
    output: str


def run_pytest(folder: Path, arguments: list[str], seconds: float) -> Outcome:
    """Runs pytest in ``folder``, on its packages, for at most ``seconds`` of CPU time."""
    failed = forks.SimpleQueue()
    with tempfile.TemporaryFile("w+") as output:
        fork = forks.Process(target=_child, args=(folder, arguments, seconds, failed, output.fileno()))
        fork.start()
        fork.join(4 * seconds)  # others may use the processor too
        _end(fork)
        output.seek(0)
        found = Outcome(None if fork.exitcode < 0 else fork.exitcode, [], output.read())
    while not failed.empty():
        found.failed.append(failed.get())
    return found


def _end(fork: multiprocessing.Process) -> None:
    """Ends what the fork started, and the fork."""
    try:
        os.killpg(fork.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    fork.join()


def _child(
    folder: Path, arguments: list[str], seconds: float, failed: multiprocessing.SimpleQueue, output: int
):
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = sys.path[0] = str(folder)
    sys.argv, sys.dont_write_bytecode = ["pytest"], False
    sys.modules["__main__"] = types.ModuleType("__main__")
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    ignored = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main(["-q", "--tb=short", *ignored, *arguments], plugins=[Failures(failed)]))
