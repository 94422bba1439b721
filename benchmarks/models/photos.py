"""Measures `make train`, a newcomer's first run: bits/dim, PNG's and WebP's, time, loss curve, samples.

    python -m benchmarks.models.photos

Rows go to results/photos.csv. README's text and its two pictures are replaced by those of this run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tools import harness, page
from fastflow.trainer.evaluate import report

PICTURES = {"curve.png": "photos_curve.png", "samples.png": "photos_samples.png"}


def train(out: Path, more: list[str]) -> tuple[dict, float]:
    """Runs `fastflow train` with its defaults; returns its result.json and the seconds that it took."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "fastflow", "train", "--out", str(out), *more], check=True, cwd=harness.ROOT
    )
    return json.loads((out / "result.json").read_text()), time.perf_counter() - began


def text(row: dict) -> str:
    """README's text for a row."""
    codecs = {
        name: float(row[f"{name.lower()}_bits_per_dim"])
        for name in ("PNG", "WebP")
        if row[f"{name.lower()}_bits_per_dim"]
    }
    numbers = {name: float(row[name]) for name in ("test_bits_per_dim", "test_bits_per_dim_1_sample")}
    counts = {name: int(row[name]) for name in ("test_images", "importance_samples")}
    printed = report({"model": row["model"], "codecs_bits_per_dim": codecs} | numbers | counts)
    about = f"{row['device']}, torch {row['torch']}, commit {row['commit']}"
    took = f"{row['step']} steps and {float(row['seconds']) / 60:.1f} minutes"
    return f"Output of `make train` after {took} ({about}):\n\n```\n{printed}\n```"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--readme", type=Path, default=harness.ROOT / "README.md")

    options = harness.arguments(__doc__, argv, add)
    pictures = options.readme.parent / "docs" / "pictures"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        more = [
            "--device",
            options.device,
            *(["--steps", "2", "--hidden", "4", "--eval-images", "4"] if options.quick else []),
        ]
        result, seconds = train(run, more)
        pictures.mkdir(parents=True, exist_ok=True)
        for name, shown in PICTURES.items():
            shutil.copy(run / name, pictures / shown)
    codecs = result.pop("codecs_bits_per_dim")
    row = result | {f"{name.lower()}_bits_per_dim": codecs.get(name, "") for name in ("PNG", "WebP")}
    row |= {"seconds": f"{seconds:.1f}"} | harness.metadata(options.device)
    harness.append(options.results / "photos.csv", [row])
    page.write(options.readme, {"photos": text(row)})
    return [row]


if __name__ == "__main__":
    main()
