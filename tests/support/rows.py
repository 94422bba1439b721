"""Rows and pages that benchmarks write, as their tests read them."""

import csv
from pathlib import Path

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_tables(page: Path, *names: str) -> None:
    for name in names:
        assert (
            "\n| --- | --- |" in page.read_text().split(f"<!-- {name}: ")[1].split(f"<!-- end of {name}")[0]
        )
