"""Training runs with stored activations and with reversible backprop, compared step by step."""

from benchmarks.models import reversible_soak
from tests.support.rows import rows_of


def test_soak_compares_runs(tmp_path, capsys):
    given = [
        "--steps",
        "30",
        "--steps-per-level",
        "2",
        "--hidden",
        "4",
        "--results",
        str(tmp_path),
        "--docs",
        str(tmp_path),
    ]
    rows = reversible_soak.main(given)
    assert len(rows) == 3 * 6 and rows_of(tmp_path / "reversible_soak.csv")[0]["way"] == "stored"
    assert max(map(abs, reversible_soak.differences(rows, "reversible"))) < 1e-3
    assert max(reversible_soak.column(rows, "reversible", "drift")[1]) < 1e-4
    assert (tmp_path / "pictures" / "reversible_soak.png").stat().st_size > 10_000
    assert "MiB" in capsys.readouterr().out
