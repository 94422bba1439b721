"""A run folder that FastFlow 0.1.0 wrote continues as 0.1.0 continued it.

``tests/data/run_0.1.0.tar.xz`` holds the data, the folder of a run that a signal stopped at step 5 of 8, and the
metrics.csv and result.json with which 0.1.0 ended it. The run was class-conditional, in float64, with two accumulated
parts, averaged weights, random flips and an activation checkpoint (options since renamed).
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow import checkpoint
from fastflow.trainer.cli import main
from fastflow.trainer.commands import _with_present_names
from fastflow.trainer.progress import read_metrics

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def old(tmp_path, monkeypatch):
    with tarfile.open(DATA / "run_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_close(found, expected):
    """Equal but for the rounding of float64, which differs between machines."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, float):
            assert value == pytest.approx(expected[name], rel=1e-10, abs=0), name
        else:
            assert value == expected[name], name


def test_an_old_run_continues(old):
    training = checkpoint.read(old / "run/last.pt")["training"]
    assert training["config"]["flip"] is True and training["config"]["activations_every"] == 1
    assert (training["step"], training["total"]) == (5, 8)
    assert main(["train", "--resume", "run"]) == 0
    found, expected = read_metrics(old / "run/metrics.csv"), read_metrics(old / "expected_metrics.csv")
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    found, expected = (
        json.loads((old / name).read_text()) for name in ("run/result.json", "expected_result.json")
    )
    for result in (found, expected):
        del result["codecs_bits_per_dim"]  # of the installed Pillow
    assert_close(found, expected)
    config = checkpoint.read(old / "run/last.pt")["training"]["config"]
    assert config["horizontal_flip"] is True and config["activation_checkpoint_every"] == 1


def test_renamed_options_of_an_old_run_are_kept(old, capsys):
    assert main(["train", "--resume", "run", "--horizontal-flip", "False"]) == 1
    assert "horizontal_flip: got False, expected True as in the run" in capsys.readouterr().err


def test_old_names_of_options_work_for_one_release(old, capsys):
    argv = ["train", "--data", "images.npz", "--out", "new", "--flip", "False", "--activations-every=2"]
    argv += ["--no-reversible"]
    argv += "--levels 1 --steps-per-level 1 --hidden 2 --steps 1 --batch-size 2 --samples 1 --final-samples 1".split()
    assert main(argv) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "--flip is deprecated and will be removed, use --horizontal-flip",
        "--activations-every is deprecated and will be removed, use --activation-checkpoint-every",
        "--no-reversible is deprecated and will be removed, use --reversible no",
    ]
    config = checkpoint.read(old / "new/last.pt")["training"]["config"]
    assert config["horizontal_flip"] is False and config["activation_checkpoint_every"] == 2
    assert config["reversible"] == "no"
    assert _with_present_names(["train", "--reversible", "--steps", "1"])[:3] == [
        "train",
        "--reversible",
        "yes",
    ]
    assert capsys.readouterr().err == "--reversible is deprecated and will be removed, use --reversible yes\n"
    for flags in (["--cuda-graph"], ["--cuda-graph", "--steps", "1"], ["--no-cuda-graph"]):
        value = str("--no-cuda-graph" not in flags)
        assert _with_present_names(["train", *flags]) == ["train", "--cuda-graph", value, *flags[1:]]
    assert capsys.readouterr().err == ""
    assert _with_present_names(["train", "--reversible", "no"]) == ["train", "--reversible", "no"]


def test_a_run_keeps_the_default_that_its_model_had(tmp_path, monkeypatch):
    """The scale of MAF was soft_clamp by default; the file has every option of the model, also those left open."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32))
    argv = "train --data rows.npy --out run --model maf --steps-per-level 1 --hidden 4 --batch-size 8 --samples 9".split()
    assert main([*argv, "--steps", "1"]) == 0
    contents = checkpoint.read("run/last.pt")
    assert contents["training"]["config"]["scale"] is None and contents["config"]["scale"] == "soft_clip"
    contents["config"]["scale"] = "soft_clamp"
    torch.save(contents, "run/last.pt")
    assert main(["train", "--resume", "run", "--steps", "2"]) == 0
    contents = checkpoint.read("run/last.pt")
    assert contents["training"]["step"] == 2 and contents["config"]["scale"] == "soft_clamp"
