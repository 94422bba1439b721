"""The precision of splines: rows and table."""

import shutil

import pytest

from benchmarks.models import spline_precision
from benchmarks.tools import harness
from tests.support.rows import DEVICES, assert_tables, rows_of


@pytest.mark.parametrize("device", DEVICES)
def test_spline_precision_writes_rows_and_a_table(device, tmp_path):
    page = tmp_path / "precision.md"
    shutil.copy(harness.ROOT / "docs" / "precision.md", page)
    spline_precision.main(
        ["--quick", "--device", device, "--results", str(tmp_path / "results"), "--docs", str(tmp_path)]
    )
    rows = [row for row in rows_of(tmp_path / "results" / "spline_precision.csv") if row["way"] == "fastflow"]
    assert [row["scale"] for row in rows] == 2 * ["1", "3", "6", "10"]
    assert all(row["nan"] == row["refused"] == "0" for row in rows)
    assert all(float(row["median"]) < 1e-2 for row in rows)
    assert_tables(page, "splines")
