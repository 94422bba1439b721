"""`fastflow plot`: the losses of several runs in one picture, and one line for what is no run."""

import numpy as np
import pytest
from PIL import Image

from fastflow.trainer.cli import main

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
HEADER = "step,epoch,lr,train_nats,grad_norm,validation_nats\n"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, losses in {"a": (3.0, 2.0, 1.5), "b": (3.0, float("nan"), 1.0)}.items():
        (tmp_path / name).mkdir()
        rows = [f"{i + 1},0,0.1,{loss},1.0,{loss if i else ''}" for i, loss in enumerate(losses)]
        (tmp_path / name / "metrics.csv").write_text(HEADER + "\n".join(rows) + "\n")
    return tmp_path


def test_each_run_has_a_line_of_its_color(runs, capsys):
    assert main(["plot", "a", "b"]) == 0
    assert capsys.readouterr().out == "runs.png: 2 runs\n"
    pixels = {tuple(p) for p in np.array(Image.open("runs.png").convert("RGB")).reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14)} <= pixels  # matplotlib's first two colors
    assert main(["plot", "a", "--out", "one.webp"]) == 0
    assert (44, 160, 44) not in pixels and Image.open("one.webp").format == "WEBP"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["a", "none"], "none: got no metrics.csv, expected a run folder"),
        (["empty"], "empty/metrics.csv: got no step, expected one or more"),
        (["damaged"], "damaged/metrics.csv: damaged, no table of numbers"),
        (["a", "images"], "runs: got a in nats, images in bits_per_dim, expected losses of one unit"),
        ([], "runs: got none, expected one or more run folders"),
        (["a", "--out", "a.txt"], "out: got a.txt, expected a folder, or a file .png"),
    ],
)
def test_what_is_no_run(runs, capsys, argv, said):
    for name, text in {
        "empty": HEADER,
        "damaged": HEADER + "1,0,x,y,z,\n",
        "images": HEADER.replace("nats", "bits_per_dim") + "1,0,0.1,3.0,1.0,\n",
    }.items():
        (runs / name).mkdir()
        (runs / name / "metrics.csv").write_text(text)
    assert main(["plot", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert not (runs / "runs.png").exists()
