"""The benchmark of posteriors by sbi: its simulators, its C2ST, and its rows where sbi is installed."""

import pytest
import torch

from benchmarks.models import libraries, sbi_posteriors
from tests.support.rows import assert_tables, rows_of

MARKERS = "<!-- sbi_posteriors: written by benchmarks/models/sbi_posteriors.py -->\n<!-- end of sbi_posteriors -->\n"


def test_two_moons_are_arcs_around_the_moved_parameters():
    torch.manual_seed(0)
    theta = torch.tensor([[0.3, -0.7]]).expand(20_000, 2)
    x = sbi_posteriors.two_moons(theta)
    center = torch.tensor([-abs(0.3 - 0.7), -0.7 - 0.3]) / 2**0.5 + torch.tensor([0.25, 0.0])
    radius = (x - center).norm(dim=1)
    assert abs(radius.mean() - 0.1) < 1e-3 and abs(radius.std() - 0.01) < 1e-3
    assert (x[:, 0] > center[0] - 0.01).all()  # half a circle


def test_slcp_is_four_correlated_points():
    torch.manual_seed(0)
    theta = torch.tensor([[0.5, -1.0, 0.8, -1.2, 0.4]]).expand(50_000, 5)
    points = sbi_posteriors.slcp(theta).view(-1, 2)
    rho = torch.tensor(0.4).tanh()
    a, b = 0.8**2, 1.2**2
    expected = torch.tensor([[a * a, rho * a * b], [rho * a * b, b * b]])
    torch.testing.assert_close(points.mean(0), theta[0, :2], rtol=0.02, atol=0.02)
    torch.testing.assert_close(points.T.cov(), expected, rtol=0.03, atol=0.01)


def test_c2st_is_a_half_for_equal_distributions_and_one_for_others():
    torch.manual_seed(0)
    a, b = torch.randn(400, 2), torch.randn(400, 2)
    assert 0.4 < sbi_posteriors.c2st(a, b, 0) < 0.6
    assert sbi_posteriors.c2st(a, b + 6, 0) > 0.99


@pytest.mark.skipif(
    not all(map(libraries.installed, ("sbi", "sbibm", "nflows"))), reason="needs sbi and sbibm"
)
def test_rows(tmp_path):
    (tmp_path / "sbi.md").write_text(MARKERS)
    rows = sbi_posteriors.main(["--quick", "--results", str(tmp_path), "--docs", str(tmp_path)])
    assert rows_of(tmp_path / "sbi_posteriors.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    assert [r["provider"] for r in rows] == 2 * list(sbi_posteriors.PROVIDERS)
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        assert abs(float(before["validation_log_prob"]) - float(after["validation_log_prob"])) < 0.01
    assert_tables(tmp_path / "sbi.md", "sbi_posteriors")
