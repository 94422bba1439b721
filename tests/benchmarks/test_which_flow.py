"""Flows on toy densities: samples and log-densities that agree, rows, tables and picture of the benchmark."""

import math

import pytest
import torch

from benchmarks.models import which_flow
from benchmarks.models.toy_densities import TOYS
from benchmarks.tools import harness
from tests.support.rows import assert_tables, rows_of

pytest.importorskip("matplotlib")
pytest.importorskip("torchdiffeq")
MARKERS = "<!-- {0}: written by benchmarks/models/which_flow.py -->\n<!-- end of {0} -->\n"


@pytest.mark.parametrize("name", TOYS)
def test_samples_have_the_density(name):
    """It integrates to 1, and its share of each of 16 parts of the plane is that of the samples."""
    toy, size, n = TOYS[name], 120, 20_000
    (left, right), (low, high) = toy.limits
    at = [a + (b - a) * (torch.arange(size, dtype=torch.float64) + 0.5) / size for a, b in toy.limits]
    x, y = torch.meshgrid(*at, indexing="ij")
    density = toy.log_density(torch.stack([x, y], 2).view(-1, 2)).exp().view(size, size)
    mass = density * (right - left) * (high - low) / size**2
    assert abs(mass.sum() - 1) < 2e-3
    drawn = toy.draw(n, torch.Generator().manual_seed(0))
    part = ((drawn - torch.tensor([left, low])) / torch.tensor([right - left, high - low]) * 4).long()
    assert ((part >= 0) & (part < 4)).all()
    found = torch.bincount(4 * part[:, 0] + part[:, 1], minlength=16) / n
    expected = mass.view(4, size // 4, 4, size // 4).sum((1, 3)).flatten()
    assert ((found - expected).abs() <= 4.5 * (expected / n).sqrt() + 1e-3).all()
    entropy = -torch.where(mass > 0, mass * density.clamp_min(1e-300).log(), 0).sum()
    log_density = toy.log_density(drawn)
    error = log_density.std() / math.sqrt(n)
    assert abs(log_density.mean() + entropy) < 4.5 * error + 5e-3


def run(tmp_path, *more):
    for name in ("results", "docs", "pictures", "grids"):
        (tmp_path / name).mkdir(exist_ok=True)
    page = tmp_path / "docs" / "which_flow.md"
    page.write_text("".join(map(MARKERS.format, ("which_flow", "which_flow_costs"))))
    folders = [
        w for name in ("results", "docs", "pictures", "grids") for w in (f"--{name}", str(tmp_path / name))
    ]
    return which_flow.main(["--quick", *folders, *more]), page


def test_rows_tables_and_picture(tmp_path):
    rows, page = run(tmp_path, "--data", "pinwheel")
    file = tmp_path / "results" / "which_flow.csv"
    assert rows_of(file) == [{k: str(v) for k, v in row.items()} for row in rows]
    assert [row["family"] for row in rows] == list(which_flow.FAMILIES)
    for row in rows:
        assert row["device"].endswith(" 1 threads") and (row["steps"] == 0) == (row["family"] == "Gaussian")
        assert math.isfinite(float(row["test_nats"])) and 0 < float(row["error"]) < 1
    assert_tables(page, "which_flow", "which_flow_costs")
    assert (tmp_path / "pictures" / "which_flow.png").stat().st_size > 5000
    assert run(tmp_path, "--data", "pinwheel")[0] == []  # every cell is measured
    again, _ = run(tmp_path, "--data", "pinwheel", "--families", "linear", "--again")
    assert [row["family"] for row in again] == ["linear"] and len(rows_of(file)) == len(rows) + 1


def test_the_table_counts_from_the_density_and_from_the_last_row_of_a_cell(tmp_path):
    about = {"seed": 0, "seconds": 10.0, "device": "a processor", "torch": "2", "commit": "c", "date": "d"}
    cells = [("rings", "MAF", -3.0, 0.5), ("rings", "MAF", -2.75, 0.25), ("pinwheel", "MAF", -2.0, 0.75)]
    rows = [{"data": d, "family": f, "test_nats": v, "error": 0.01, "kl_nats": k} for d, f, v, k in cells]
    harness.append(tmp_path / "which_flow.csv", [row | about for row in rows])
    harness.append(tmp_path / "which_flow.csv", [rows[0] | about | {"seed": 1}])
    options = type("Options", (), {"seed": 0, "seconds": 10.0})
    lines = which_flow.likelihoods(which_flow.latest(tmp_path / "which_flow.csv", options)).splitlines()
    assert lines[0] == "|  | rings | pinwheel | mean distance from the density |"
    assert lines[2] == "| the density itself | -2.500 | -1.250 | 0 |"
    assert lines[3] == "| MAF | -2.750 ± 0.010 | -2.000 ± 0.010 | 0.500 |"


def test_training_ends_when_its_time_is_spent(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(which_flow.time, "process_time", lambda: float(next(times)))
    model, x = which_flow.FAMILIES["linear"].build(), torch.randn(50, 2)
    assert which_flow.train(model, x, 7.0, 1e-2, 0) == 6  # begin at 0, steps at 1 to 6
