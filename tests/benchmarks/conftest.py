"""Copies of the pages that benchmarks write to."""

import shutil
from pathlib import Path

import pytest

from benchmarks.tools import harness


@pytest.fixture
def memory_page(tmp_path):
    return Path(shutil.copy(harness.ROOT / "docs" / "memory.md", tmp_path))


@pytest.fixture
def training_page(tmp_path):
    return Path(shutil.copy(harness.ROOT / "docs" / "training.md", tmp_path))
