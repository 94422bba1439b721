"""The validation set: what it consists of, and that it alone chooses best.pt and the end of a run."""

import json
import shutil

import numpy as np
import pytest
import torch

import fastflow
from fastflow import checkpoint
from fastflow.trainer import data
from fastflow.trainer import run as run_module
from fastflow.trainer.cli import main
from fastflow.trainer.config import Config, ConfigError, check_changes, stored_config, with_steps
from fastflow.trainer.evaluate import evaluate
from fastflow.trainer.progress import read_metrics
from fastflow.trainer.run import RunState

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

SMALL = "--levels 1 --steps-per-level 1 --hidden 4 --batch-size 8 --warmup 1 --samples 1 --final-samples 1".split()
SMALL += "--reversible no --eval-every 2 --lr 0.02 --schedule constant".split()


def numbered(n=40, classes=2, **parts):
    """A source whose image i is filled with i, of class ``i % classes``."""
    x = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 1, 4, 4))
    y = np.arange(n) % classes
    return data.Images("numbers", x, x[:2], y, y[:2], **parts)


def values(images):
    return images[:, 0, 0, 0].tolist()


def test_a_share_is_held_out_by_the_seed():
    source, again, other = numbered(), numbered(), numbered()
    for each, seed in ((source, 3), (again, 3), (other, 4)):
        data.set_validation(each, 0.25, seed)
    held_out = values(source.validation)
    assert len(held_out) == 10 and source.length == 30
    assert held_out == values(again.validation) != values(other.validation)
    assert held_out != sorted(held_out)  # the first ones are a sample of all classes
    assert source.validation_labels.tolist() == [i % 2 for i in held_out]
    x, labels = data.Batches(source, 30, seed=0)[0]
    assert sorted(values(x) + held_out) == list(range(40))
    assert labels.tolist() == [i % 2 for i in values(x)]
    assert values(source.test) == [0, 1]


def test_shares_that_cannot_be():
    with pytest.raises(data.DataError, match="validation: got 0.99 of 40 samples, expected some left"):
        data.set_validation(numbered(), 0.99, 0)
    own = numbered(validation=np.zeros((3, 1, 4, 4), np.uint8))
    with pytest.raises(data.DataError, match="numbers has a validation set of its own"):
        data.set_validation(own, 0.5, 0)
    data.set_validation(own, None, 0)
    assert len(own.validation) == 3 and own.length == 40
    data.set_validation(own, 0.0, 0)
    assert own.validation is None and own.length == 40
    photos = object.__new__(data.Photos)  # scikit-learn need not be there
    with pytest.raises(
        data.DataError, match="validation: got 0.1, expected 0 for photos, whose training crops"
    ):
        data.set_validation(photos, 0.1, 0)


def save_images(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / name)


def test_files_are_held_out_by_name(tmp_path):
    save_images(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(20)])

    def split():
        source = data.load(str(tmp_path), image_size=4)
        before = list(source._files)
        data.set_validation(source, 0.25, 0)
        held_out = [f for f in before if f not in source._files]
        assert len(held_out) == len(source.validation) == len(before) - source.length
        assert sorted(f.parent.name for f in held_out) == sorted(
            ("cat", "dog")[label] for label in source.validation_labels
        )
        return set(source._files), set(held_out)

    train, held_out = split()
    assert 3 <= len(held_out) <= 18
    save_images(tmp_path, [f"{c}/more{i}.png" for c in ("cat", "dog") for i in range(10)])
    more_train, more_held_out = split()
    assert train < more_train and held_out < more_held_out


def test_a_folder_that_has_a_split(tmp_path):
    save_images(tmp_path, [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in range(2)])
    source = data.load(str(tmp_path), image_size=4)
    assert len(source.test) == 4 and source.validation is None  # as ever: val is the test set
    save_images(tmp_path, [f"test/{c}/{i}.png" for c in "ab" for i in range(3)])
    source = data.load(str(tmp_path), image_size=4)
    assert (source.length, len(source.test), len(source.validation)) == (4, 6, 4)
    assert source.validation_labels.tolist() == [0, 0, 1, 1]
    shutil.move(tmp_path / "val", tmp_path / "validation")
    assert torch.equal(data.load(str(tmp_path), image_size=4).validation, source.validation)
    for c in "ab":
        shutil.move(tmp_path / "validation" / c, tmp_path / "validation" / f"other {c}")
    with pytest.raises(data.DataError, match="validation: got no image of a, b, the trained classes"):
        data.load(str(tmp_path), image_size=4)


def test_an_npz_that_has_a_split(tmp_path):
    path, x = tmp_path / "x.npz", np.arange(20 * 48, dtype=np.int64).reshape(20, 4, 4, 3).astype(np.uint8)
    y = np.arange(20) % 2
    np.savez(path, x=x, y=y, x_val=x[:3], y_val=y[:3])
    source = data.load(str(path))
    assert np.array_equal(source.validation.numpy(), x[:3].transpose(0, 3, 1, 2))
    assert source.validation_labels.tolist() == [0, 1, 0] and source.length == 18
    np.savez(path, x=x, y=y, x_val=x[:3])
    assert data.load(str(path)).classes is None
    for name, arrays in {
        r"x_val: got images \(3, 2, 4\)": {"x_val": x[:, :2]},
        "x_val: got float64, expected uint8": {"x_val": x / 255},
        "y_val: got class 5, expected at most 1": {"x_val": x[:3], "y_val": np.array([0, 5, 1])},
    }.items():
        np.savez(path, x=x, y=y, **arrays)
        with pytest.raises(data.DataError, match=name):
            data.load(str(path))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 90, (60, 4, 4, 3)).astype(np.uint8))
    return str(path)


def test_the_validation_set_chooses(arrays, tmp_path, monkeypatch, capsys):
    evaluated = []

    def counted(model, images, *args, **options):
        evaluated.append(len(images))
        return evaluate(model, images, *args, **options)

    monkeypatch.setattr(run_module, "evaluate", counted)
    argv = ["train", "--data", arrays, *SMALL, "--validation", "0.25", "--patience", "3"]
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    assert main([*argv, "--steps", "400", "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    rows = read_metrics(run / "metrics.csv")
    found = {r["step"]: r["validation_bits_per_dim"] for r in rows if r["step"] % 2 == 0}
    best = min(found, key=found.get)
    assert best + 6 == len(rows) < 400  # three evaluations later
    assert evaluated == [14] * len(found) + [6]  # of 54 images; the test set is looked at once
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == best and result["validation_bits_per_dim"] == pytest.approx(found[best])
    images = data.load(arrays).test
    for name in ("best.pt", "."):
        model = fastflow.load(run / name)
        assert evaluate(model, images).mean().item() == pytest.approx(result["test_bits_per_dim"], abs=1e-6)
    assert "40 images of noise, 14 for validation" in printed
    assert f"3 evaluations without a new best, {found[best]:.3f} bits/dim of step {best}" in printed
    assert f"best.pt of step {best}, chosen by the validation set: {found[best]:.3f} on 14 images" in printed
    assert main(["evaluate", str(run), "--samples", "1"]) == 0
    assert capsys.readouterr().out.strip() in printed

    # stopped in between and resumed, the run ends in the same way
    assert main([*argv, "--steps", str(best + 2), "--out", str(stopped)]) == 0
    assert main(["train", "--resume", str(stopped), "--steps", "400"]) == 0
    assert (stopped / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert (stopped / "result.json").read_bytes() == (run / "result.json").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--validation", "0.5"]) == 1
    assert "validation: got 0.5, expected 0.25 as in the run" in capsys.readouterr().err


def test_patience_counts_evaluations_in_a_row():
    state, stopped = RunState(0, 100), []
    for step, bits in enumerate((4.0, 5.0, 3.0, 3.5, 3.0, 3.2, 2.0), start=1):
        state.step = step
        state.improve(bits)
        stopped.append(state.stop_if_stale(3))
    assert stopped == [False] * 5 + [True, False] and (state.best, state.best_step) == (2.0, 7)
    assert state.target_steps == 6
    assert not RunState(5, 100, stale=9).stop_if_stale(0)


def test_epochs_are_steps():
    assert with_steps(Config(), 100).steps == 800
    assert with_steps(Config(epochs=3, batch_size=32), 100).steps == 10  # 300 images
    kept = {"config": {"steps": 10, "epochs": 3}}
    assert stored_config(kept)["steps"] is None and stored_config(kept)["validation"] == 0.0
    with pytest.raises(ConfigError, match="validation: got 0.1, expected 0.0 as in the run"):
        check_changes({"config": {"steps": 10}, "step": 0}, Config(validation=0.1))


def test_a_run_of_epochs_goes_on_with_either(arrays, tmp_path, capsys):
    run = str(tmp_path / "run")

    def planned():
        return checkpoint.read(tmp_path / "run" / "last.pt")["training"]["total"]

    assert main(["train", "--data", arrays, *SMALL, "--epochs", "1", "--out", run]) == 0
    assert planned() == 7  # 54 images in batches of 8
    assert main(["train", "--resume", run, "--steps", "8"]) == 0
    assert planned() == 8
    assert main(["train", "--resume", run, "--epochs", "2"]) == 0
    assert planned() == 14
    capsys.readouterr()
    assert main(["train", "--resume", run, "--epochs", "1"]) == 1
    assert "steps: got 7, expected at least 14, the current step of the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--steps 5 --epochs 2", "epochs: got 2, expected none with steps 5: give one of the two"),
        ("--epochs 0", "epochs: got 0, expected at least 1"),
        ("--validation 1", "validation: got 1.0, expected a share from 0 to below 1"),
        ("--patience 2", "patience: got 2, expected 0 without a validation set"),
        ("--patience -1", "patience: got -1, expected at least 0"),
    ],
)
def test_settings_that_cannot_be(argv, words, arrays, tmp_path, capsys):
    assert main(["train", "--data", arrays, *SMALL, "--out", str(tmp_path / "run"), *argv.split()]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_estimate_of_time_knows_the_validation_set():
    from fastflow.trainer.budget import steps_that_fit

    config = Config(batch_size=10, eval_every=100, eval_images=50, final_samples=4, samples=0)
    assert steps_that_fit(config, 1000.0, 1.0, 100, 20) == int((1000 - 28 - 1) / 1.01)
