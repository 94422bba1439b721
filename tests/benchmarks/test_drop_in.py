"""The benchmark of accelerated flows: no row unless both compute the same; its table is that of the rows."""

import copy

import pytest
import torch

from benchmarks.models import drop_in, libraries
from benchmarks.tools import harness
from tests.support.rows import DEVICES, assert_tables, rows_of

MARKERS = "<!-- drop_in: written by benchmarks/models/drop_in.py -->\n<!-- end of drop_in -->\n"
pytestmark = pytest.mark.skipif(
    not all(map(libraries.installed, ("nflows", "glasflow", "zuko"))), reason="needs tests/libraries.txt"
)


@pytest.mark.parametrize("device", DEVICES)
def test_rows(device, tmp_path, monkeypatch):
    monkeypatch.setattr(drop_in, "keep_memory", lambda: None)  # of this process
    monkeypatch.setattr(harness, "ROUNDS", 1)
    (tmp_path / "drop_in.md").write_text(MARKERS)
    options = ["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)]
    rows = drop_in.main(options)
    assert rows_of(tmp_path / "drop_in.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    expected = [
        (c.name, mode, provider)
        for c in drop_in.CASES
        for mode in drop_in.MODES
        for provider in drop_in.PROVIDERS
    ]
    assert [(r["flow"], r["mode"], r["provider"]) for r in rows] == expected
    for row in rows:
        if row["provider"] == "after" and row["library"] in ("nflows", "glasflow"):
            assert row["synchronizing"] == 0
    assert_tables(tmp_path / "drop_in.md", "drop_in")


@pytest.mark.parametrize("case", drop_in.CASES, ids=lambda c: c.name)
def test_a_flow_that_differs_has_no_row(case):
    flow = drop_in.build(case, quick=True)
    given = drop_in.inputs(case, True, "cpu")
    assert drop_in.check(case, flow, drop_in.accelerated(case, flow), *given) <= drop_in.TOLERANCE
    other = copy.deepcopy(flow)
    with torch.no_grad():
        next(p for p in other.parameters() if p.ndim > 1 and p.requires_grad).mul_(1.001)
    with pytest.raises(ValueError, match=f"^{case.name}: off by .*; no row is written"):
        drop_in.check(case, flow, other, *given)


def test_operators_that_wait_for_a_value_are_counted():
    x = torch.randn(5)
    with drop_in.Operators() as operators:
        x[x > 0].sum().item()
        torch.nonzero(x)
        x[torch.tensor([0, 1])] * 2
    assert operators.synchronizing == 3
    assert operators.calls > 5
