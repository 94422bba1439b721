"""The benchmark of the cost of autoregressive layers against the number of features: its rows and its picture."""

import pytest

from benchmarks.models import autoregressive_cost
from benchmarks.tools import harness
from tests.support.rows import DEVICES, rows_of

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_picture(device, tmp_path, monkeypatch):
    monkeypatch.setattr(autoregressive_cost, "keep_memory", lambda: None)  # of this process
    monkeypatch.setattr(harness, "ROUNDS", 1)
    monkeypatch.setattr(autoregressive_cost, "MOST_PASSES", 2)
    options = ["--quick", "--device", device, "--results", str(tmp_path), "--pictures", str(tmp_path)]
    rows = autoregressive_cost.main(options)
    assert rows_of(tmp_path / "autoregressive_cost.csv") == [
        {k: str(v) for k, v in row.items()} for row in rows
    ]
    assert [(r["features"], r["provider"]) for r in rows] == [
        (2, "pass"),
        (2, "inverse"),
        (2, "passes"),
        (4, "pass"),
        (4, "inverse"),
    ]
    assert all(float(r["p50_ms"]) > 0 for r in rows)
    assert (tmp_path / "autoregressive_cost.png").stat().st_size > 5000
