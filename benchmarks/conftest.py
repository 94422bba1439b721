"""The options of ``pytest benchmarks``, which are those of every benchmark."""

import pytest

from benchmarks.tools import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    harness.add_arguments(parser.getgroup("FastFlow's benchmarks").addoption)
