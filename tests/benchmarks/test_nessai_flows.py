"""The benchmark of nessai's flow models: its rows, where nessai is installed."""

import pytest

from benchmarks.models import nessai_flows
from tests.support.rows import assert_tables, rows_of

MARKERS = (
    "<!-- nessai_flows: written by benchmarks/models/nessai_flows.py -->\n<!-- end of nessai_flows -->\n"
)


def rows_with(monkeypatch, tmp_path):
    (tmp_path / "nessai.md").write_text(MARKERS)
    monkeypatch.setattr(nessai_flows, "FLOWS", ("NSF",))
    return nessai_flows.main(["--quick", "--results", str(tmp_path), "--docs", str(tmp_path)])


def test_rows(tmp_path, monkeypatch):
    pytest.importorskip("nessai.flowmodel", exc_type=ImportError)
    rows = rows_with(monkeypatch, tmp_path)
    assert rows_of(tmp_path / "nessai_flows.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    assert [(r["mode"], r["provider"]) for r in rows] == [
        (mode, provider) for mode in nessai_flows.MODES for provider in nessai_flows.PROVIDERS
    ]
    assert_tables(tmp_path / "nessai.md", "nessai_flows")


def test_a_flow_that_differs_has_no_row(tmp_path, monkeypatch):
    pytest.importorskip("nessai.flowmodel", exc_type=ImportError)
    model = nessai_flows.model

    def other(name, provider, folder):
        made = model(name, provider, folder)
        if provider == "accelerated":
            for p in made.model.parameters():
                p.data.add_(0.1)
        return made

    monkeypatch.setattr(nessai_flows, "model", other)
    with pytest.raises(ValueError, match="NSF: off by"):
        rows_with(monkeypatch, tmp_path)
    assert not (tmp_path / "nessai_flows.csv").exists()
