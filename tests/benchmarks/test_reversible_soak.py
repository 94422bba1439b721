"""Training runs with stored activations and with reversible backprop, compared step by step."""

import torch

from benchmarks.models import reversible_soak
from tests.support.rows import rows_of


def test_soak_compares_runs(tmp_path, capsys, monkeypatch):
    """One of the three ways runs in a process of its own; each such process imports torch again."""
    in_a_process = reversible_soak.run_in_a_process

    def run(way, options):
        if way == "reversible":
            return in_a_process(way, options)
        threads = torch.get_num_threads()
        try:
            return reversible_soak.run(way, options)
        finally:
            torch.set_num_threads(threads)

    monkeypatch.setattr(reversible_soak, "run_in_a_process", run)
    size = ["--steps", "10", "--steps-per-level", "2", "--hidden", "4"]
    rows = reversible_soak.main([*size, "--results", str(tmp_path), "--docs", str(tmp_path)])
    assert [row["way"] for row in rows] == [way for way in reversible_soak.WAYS for _ in range(2)]
    assert rows_of(tmp_path / "reversible_soak.csv")[0]["way"] == "stored"
    assert max(map(abs, reversible_soak.differences(rows, "reversible"))) < 1e-3
    assert max(reversible_soak.column(rows, "reversible", "drift")[1]) < 1e-4
    assert (tmp_path / "pictures" / "reversible_soak.png").stat().st_size > 10_000
    assert "MiB" in capsys.readouterr().out
