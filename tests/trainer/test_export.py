"""`fastflow export`: the model of a run as one file that loads everywhere, and a card that says what it is."""

import json

import pytest
import torch

import fastflow
from fastflow.models import VectorGlow
from fastflow.trainer.cli import main

pytest.importorskip("tyro")


@pytest.fixture
def run(tmp_path):
    """A run folder of a tiny flow of rows, as training leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = VectorGlow(features=2, steps=1, hidden=4, context_features=1)
    training = {
        "config": {"data": "moons.csv", "batch_size": 32, "lr": 1e-3, "seed": 4},
        "step": 20,
        "seconds": 90.0,
        "commit": "1234567",
        "chosen": "last.pt",
    }
    fastflow.save(folder / "last.pt", model, training)
    result = {"model": "VectorGlow", "test_rows": 30, "test_nats": 1.25}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "other.pt"])
def test_export_and_card(run, tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *(["--out", name] if name == "other.pt" else [])]) == 0
    exported, trained = fastflow.load(name), fastflow.load(run)
    assert fastflow.checkpoint.opened(name)[1] is None
    x, context = torch.randn(5, 2), torch.randn(5, 1)
    assert torch.equal(exported.log_prob(x, context), trained.log_prob(x, context))
    card = (tmp_path / name).with_suffix(".md").read_text()
    for word in ("VectorGlow, trained on moons.csv", "| context_features | 1 |", "| minutes | 1.5 |", "1.25"):
        assert word in card
    assert "commit 1234567" in card and f'fastflow.load("{name}")' in card and "| lr | 0.001 |" in card
    assert capsys.readouterr().out.splitlines()[0] == f"{name}: VectorGlow"


def test_a_model_without_a_run_has_a_card_too(tmp_path):
    fastflow.save(tmp_path / "a.pt", VectorGlow(features=2, steps=1, hidden=4))
    assert main(["export", str(tmp_path / "a.pt"), "--out", str(tmp_path / "b.pt")]) == 0
    card = (tmp_path / "b.md").read_text()
    assert card.startswith("# VectorGlow\n") and "## Training" not in card and "## Result" not in card


@pytest.mark.parametrize("out", ["model.onnx", "run/last.pt", "run/best.pt"])
def test_what_is_no_file_to_write(run, tmp_path, out, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = (run / "last.pt").read_bytes()
    assert main(["export", "run", "--out", out]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: out: got {out}, expected ") and error.count("\n") == 1
    assert (run / "last.pt").read_bytes() == before and not (run / "best.pt").exists()


def test_a_damaged_result_is_named(run, tmp_path, capsys):
    (run / "result.json").write_text('{"model": ')
    assert main(["export", str(run), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {run}/result.json: damaged, no JSON\n"
