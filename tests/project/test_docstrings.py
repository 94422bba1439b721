"""The examples in docstrings run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import fastflow

MODULES = [m.name for m in pkgutil.walk_packages(fastflow.__path__, "fastflow.") if "triton" not in m.name]


# a command line, and the compiled extensions, which torch loads
NOT_IMPORTED = ("fastflow.__main__", "fastflow._C", "fastflow._cuda")


def examples(name: str) -> list[doctest.DocTest]:
    if name in NOT_IMPORTED:
        return []
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), globs={})
    return [test for test in found if test.examples]


EXAMPLES = [test for name in MODULES for test in examples(name)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example(example):
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_models_have_examples():
    assert {"fastflow.models.glow.Glow", "fastflow.nn.sequential.Sequential"} <= {
        test.name for test in EXAMPLES
    }
