"""Training on two photographs: its row and its sentence in README.md."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.models import photos
from benchmarks.tools import harness
from fastflow.trainer import cli
from tests.support.rows import rows_of


def test_photos_writes_its_row_and_the_readme(tmp_path, monkeypatch):
    def run(command, **_):
        """In this process, which has imported torch."""
        assert command[:3] == [sys.executable, "-m", "fastflow"]
        assert cli.main(command[3:]) == 0

    monkeypatch.setattr(photos, "subprocess", SimpleNamespace(run=run))
    readme = Path(shutil.copy(harness.ROOT / "README.md", tmp_path))
    photos.main(["--quick", "--device", "cpu", "--results", str(tmp_path), "--readme", str(readme)])
    (row,) = rows_of(tmp_path / "photos.csv")
    shown = readme.read_text().split("<!-- photos: ")[1].split("<!-- end of photos")[0]
    for name in ("test_bits_per_dim", "test_bits_per_dim_1_sample", "png_bits_per_dim", "webp_bits_per_dim"):
        assert f"{float(row[name]):.3f}" in shown
    assert row["step"] == "2" and float(row["seconds"]) > 1
    assert {p.name for p in (tmp_path / "docs" / "pictures").iterdir()} == {
        "photos_curve.png",
        "photos_samples.png",
    }
