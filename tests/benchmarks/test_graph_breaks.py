"""The benchmark of graph breaks: its rows, of one flow."""

import pytest

from benchmarks.models import drop_in, graph_breaks
from tests.support.rows import assert_tables, rows_of

MARKERS = (
    "<!-- graph_breaks: written by benchmarks/models/graph_breaks.py -->\n<!-- end of graph_breaks -->\n"
)


def test_rows(tmp_path, monkeypatch):
    pytest.importorskip("zuko")
    (tmp_path / "drop_in.md").write_text(MARKERS)
    monkeypatch.setattr(drop_in, "CASES", [c for c in drop_in.CASES if c.name == "MAF"])
    rows = graph_breaks.main(["--results", str(tmp_path), "--docs", str(tmp_path)])
    assert rows_of(tmp_path / "graph_breaks.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    assert [r["provider"] for r in rows] == list(drop_in.PROVIDERS)
    assert all(r["graphs"] == r["graph_breaks"] + 1 for r in rows)
    assert_tables(tmp_path / "drop_in.md", "graph_breaks")
