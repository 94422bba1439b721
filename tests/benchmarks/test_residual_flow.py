"""benchmarks/models/residual_flow.py: rows, the table, and flows that differ."""

import pytest
import torch

from benchmarks.models import libraries, residual_flow
from benchmarks.tools import harness, sizes
from tests.support.rows import DEVICES, assert_tables, rows_of

MARKERS = "<!-- residual_flow: written by benchmarks/models/x.py -->\n<!-- end of residual_flow -->\n"


@pytest.mark.parametrize("device", DEVICES)
def test_rows(device, tmp_path, monkeypatch):
    (tmp_path / "residual.md").write_text(MARKERS)
    monkeypatch.setattr(sizes, "keep_memory", lambda: None)  # of this process
    monkeypatch.setattr(harness, "ROUNDS", 1)
    options = ["--quick", "--results", str(tmp_path), "--docs", str(tmp_path), "--device", device]
    options += ["--clock", "processor"] * (device == "cpu")
    rows = residual_flow.main(options)
    assert rows_of(tmp_path / "residual_flow.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    theirs = ["normflows"] * libraries.installed("normflows")
    ours = ["fastflow", residual_flow.CONVERGENCE, residual_flow.AUTOGRAD]
    assert [row["provider"] for row in rows] == len(residual_flow.QUICK) * [*ours, *theirs]
    assert all(float(row["error"]) <= residual_flow.TOLERANCE for row in rows)
    assert_tables(tmp_path / "residual.md", "residual_flow")


def test_another_flow_is_refused():
    size = residual_flow.QUICK[0]
    found = residual_flow.flows(size, torch.float64, "cpu")
    with torch.no_grad():
        found[residual_flow.AUTOGRAD].layers()[0].bias.add_(1e-6)
    with pytest.raises(
        ValueError, match=r"^by autograd: latents or log-dets are off by .* no row is written"
    ):
        residual_flow.check(found, residual_flow.inputs(size, torch.float64, "cpu"))
