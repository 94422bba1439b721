"""Gradients of reversible backprop after some training, compared with float64."""

from benchmarks.models import reversible_gradients
from tests.support.rows import assert_tables, rows_of


def test_reversible_gradients_after_20_steps(memory_page, tmp_path, capsys):
    """Float64 to 1e-12; float32 and bfloat16 networks within a bound of stored activations (Glow L=3 K=32).

    Ten batches: float32's errors, stored or not, differ by 50 times from one batch to another.
    """
    given = [
        "--after",
        "20",
        "--batch",
        "8",
        "--batches",
        "10",
        "--ways",
        "stored",
        "reversible",
        "--results",
        str(tmp_path),
        "--docs",
        str(tmp_path),
    ]
    rows = reversible_gradients.main(given)
    assert reversible_gradients.failures(rows) == [] and "WORSE" not in capsys.readouterr().out
    assert len(rows) == len(rows_of(tmp_path / "reversible_gradients.csv")) == 2 * 10 * 3 * 2
    assert_tables(memory_page, "gradients")
    for numbers in ("float64", "float32", "bfloat16 networks"):
        worse = [
            row | {"error": 3 * row["error"] + 1e-11} if row["backprop"] == "reversible" else row
            for row in rows
        ]
        assert any(numbers in failure for failure in reversible_gradients.failures(worse))
