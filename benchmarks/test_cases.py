"""The cases of ops and modules under pytest-benchmark, which keeps runs and compares them: did a change make something slower?

    python -m pytest benchmarks --benchmark-autosave
    python -m pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%   # after the change
    python -m pytest benchmarks -k "conv1x1 and channels_last and fastflow"

Every file of this folder with ``cases`` is here; each case in each mode is a group, each provider a test of it, and all are found equal
first. Launches, GB/s and the copy's are in ``extra_info`` of what is saved. The rows in results/, which compare providers with each other,
come from the files themselves: there providers take turns, and a GPU's times are those of CUDA events. Here a GPU is waited for.
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
    """``harness.prepare`` of a case in a mode, once for the tests of its providers, which follow each other."""
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
