"""The benchmark of the bytes that reversible flows of other libraries keep."""

import pytest

from benchmarks.models import drop_in_memory, libraries
from tests.support.rows import DEVICES, assert_tables, rows_of

MARKERS = "<!-- drop_in_memory: written by benchmarks/models/drop_in_memory.py -->\n<!-- end of drop_in_memory -->\n"


@pytest.mark.skipif(
    not all(map(libraries.installed, ("nflows", "glasflow", "FrEIA"))), reason="needs tests/libraries.txt"
)
@pytest.mark.parametrize("device", DEVICES)
def test_rows(device, tmp_path):
    (tmp_path / "drop_in.md").write_text(MARKERS)
    options = ["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)]
    rows = drop_in_memory.main(options)
    assert rows_of(tmp_path / "drop_in_memory.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    found = [(r["flow"], r["provider"]) for r in rows]
    assert found == [(n, p) for n in drop_in_memory.NAMES for p in ("before", "accelerated", "reversible")]
    assert all(row["kept_bytes"] > 0 for row in rows)
    assert_tables(tmp_path / "drop_in.md", "drop_in_memory")
