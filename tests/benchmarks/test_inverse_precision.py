"""The precision of inverses: rows, tables and picture."""

import shutil

import pytest
import torch

from benchmarks.models import inverse_precision
from benchmarks.tools import harness
from tests.support.rows import DEVICES, assert_tables, rows_of


@pytest.mark.parametrize("device", DEVICES)
def test_inverse_precision_writes_rows_tables_and_picture(device, tmp_path):
    page = tmp_path / "precision.md"
    shutil.copy(harness.ROOT / "docs" / "precision.md", page)
    inverse_precision.main(
        ["--quick", "--device", device, "--results", str(tmp_path / "results"), "--docs", str(tmp_path)]
    )
    rows = rows_of(tmp_path / "results" / "inverse_precision.csv")
    assert {row["dtype"] for row in rows} == {"float32", "float64", "bfloat16", "float16"}
    assert len({row["way"] for row in rows}) == 5
    assert all(row[column] for row in rows for column in row if column not in ("triton", "commit"))
    assert (tmp_path / "pictures" / "inverse_precision.png").stat().st_size > 10_000
    assert_tables(page, "errors", "ratios", "dtypes", "times")


@pytest.mark.parametrize(
    "kind, setting",
    [(kind, settings[-1]) for kind, settings in inverse_precision.SETTINGS.items() if kind != "trained"],
)
def test_every_way_inverts(kind, setting):
    """In float64: what a table shows is rounding, not a mistake of the benchmark."""
    with torch.no_grad():
        perm, *rest = inverse_precision.parameters(kind, 2, 5, 3)
        rest = [v.double() for v in rest]
        L, U = inverse_precision.triangles(perm, *rest)
        x = torch.randn(3, 5, 7, dtype=torch.float64)
        y = (L @ U @ x).gather(1, perm.unsqueeze(2).expand_as(x))
        for way, inverse in inverse_precision.ways(perm, *rest).items():
            torch.testing.assert_close(inverse(y), x, rtol=1e-9, atol=1e-9, msg=way)
