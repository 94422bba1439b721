"""Runs the cases of ops and layers under pytest-benchmark, which stores runs and compares them.

    python -m pytest benchmarks --benchmark-autosave
    python -m pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%   # after the change
    python -m pytest benchmarks -k "conv1x1 and channels_last and fastflow"

Every benchmark with ``cases`` takes part. Each case in each mode is a group, each provider a test of it;
all providers are compared first. Launches, GB/s and the copy's GB/s are in ``extra_info`` of the saved
runs.

The rows in results/ come from the benchmarks themselves, where providers take turns and a GPU's times are
those of CUDA events. Here a call ends when the GPU is idle.
"""

import functools

import pytest
import torch

from benchmarks.tools import harness


@pytest.fixture(scope="session")
def copy_gb_s(pytestconfig) -> float:
    return harness.copy_bandwidth(pytestconfig.option.device, pytestconfig.option.seconds)


@pytest.fixture(scope="session")
def prepare(pytestconfig):
    """``harness.prepare`` of a case in a mode; once for the tests of its providers, which are adjacent."""
    return functools.lru_cache(maxsize=1)(lambda case, mode: harness.prepare(case, mode, pytestconfig.option))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options, given = metafunc.config.option, []
    harness.settle(options)
    for name, module in harness.with_cases().items():
        for case in module.cases(options):
            for mode in harness.modes(case):
                for provider in harness.with_compiled(case, options).providers:
                    about = (name, case.name, case.shape, str(case.dtype)[6:], case.layout, mode)
                    given.append(
                        pytest.param(case, mode, provider, "-".join(about), id="-".join((*about, provider)))
                    )
    metafunc.parametrize(("case", "mode", "provider", "group"), given)


def test_case(case, mode, provider, group, benchmark, prepare, copy_gb_s, pytestconfig):
    found = prepare(case, mode)
    benchmark.group = group

    def call():
        found.calls[provider]()
        if pytestconfig.option.device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
    if benchmark.stats:  # not with --benchmark-disable
        benchmark.extra_info |= harness.row_of(
            case, mode, provider, found, 1e6 * benchmark.stats.stats.median, copy_gb_s
        )
        benchmark.extra_info |= harness.metadata(pytestconfig.option.device)
