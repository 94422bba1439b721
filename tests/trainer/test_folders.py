"""Folders as people have them: each row of the table of folders in docs/training.md."""

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest

from fastflow import checkpoint
from fastflow.trainer import data
from fastflow.trainer.cli import main
from fastflow.trainer.commands import Evaluate, _source
from fastflow.trainer.data.source import DataError
from tests.support.pictures import save_images
from tests.support.tables import Table

pytest.importorskip("PIL.Image")
FOLDERS = Table("docs/training.md", "folder | what happens")


def loaded(folder):
    source = data.load(str(folder), image_size=4)
    return source, {f.relative_to(folder).as_posix() for f in source._files}


def refused(folder, words):
    with pytest.raises(DataError, match=words) as error:
        loaded(folder)
    assert "\n" not in str(error.value)


@FOLDERS.shows("images in subfolders", "hidden files", "`Thumbs.db`")
def test_classes_and_what_is_skipped(tmp_path):
    names = [f"{c}/{i}.png" for c in ("dog", "cat") for i in range(9)]
    hidden = [".ipynb_checkpoints/a.png", "__MACOSX/cat/0.png", "cat/._0.png", ".a.png", "cat/@eaDir/0.png"]
    save_images(tmp_path, [*names, *hidden, "dog/$RECYCLE.BIN/0.png"])
    for name in ("cat/Thumbs.db", "cat/.DS_Store", "notes.txt", "0.heic", "1.HEIC"):
        (tmp_path / name).write_text("")
    source, train = loaded(tmp_path)
    assert train < set(names) and source.length + len(source.test) == 18 and source.classes == 2
    numbers = {
        file.parent.name: label for file, label in zip(source._files, source._labels.tolist(), strict=True)
    }
    assert numbers == {"cat": 0, "dog": 1}
    found = f"images: {source.length} to train on, {len(source.test)} to test on; 2 classes (cat, dog)"
    assert source.notes == (f"{found}; skipped 7 hidden; skipped 4 not named as images (.heic, .db, .txt)",)


@FOLDERS.shows("images, or images and subfolders")
def test_images_without_classes(tmp_path):
    save_images(tmp_path, [*(f"{i}.png" for i in range(8)), "a/0.png", "b/0.png"])
    source, _ = loaded(tmp_path)
    assert source.classes is None and "no classes" in source.notes[0]
    assert source.length + len(source.test) == 10


@FOLDERS.shows("linked files", "broken links")
def test_links(tmp_path):
    save_images(tmp_path / "elsewhere", [f"{i}.png" for i in range(9)])
    save_images(tmp_path / "data", [f"dog/{i}.png" for i in range(9)])
    (tmp_path / "data/cat").symlink_to("../elsewhere")
    (tmp_path / "data/dog/again").symlink_to("..")
    (tmp_path / "data/dog/gone.png").symlink_to("nowhere.png")
    (tmp_path / "data/dog/itself.png").symlink_to("itself.png")
    source, _ = loaded(tmp_path / "data")
    assert source.classes == 2 and source.length + len(source.test) == 18
    assert "skipped 2 broken links" in source.notes[0] and "skipped 1 links in a circle" in source.notes[0]
    (tmp_path / "data/cat/0").symlink_to("../data/dog")  # its files have their names in data/dog
    source, train = loaded(tmp_path / "data")
    assert source.length + len(source.test) == 18 and not any(name.startswith("cat/0/") for name in train)
    assert "skipped 9 found twice by links" in source.notes[0]


def test_held_out_images_do_not_train_by_a_link(tmp_path):
    save_images(tmp_path, [*(f"train/{i}.png" for i in range(5)), "test/t.png"])
    (tmp_path / "test/1.png").symlink_to("../train/1.png")
    (tmp_path / "train/t.png").symlink_to("../test/t.png")
    source, train = loaded(tmp_path)
    assert train == {f"train/{i}.png" for i in (0, 2, 3, 4)} and len(source.test) == 2
    (tmp_path / "val").symlink_to("train")
    refused(tmp_path, "train: got no image that is not held out")


@FOLDERS.shows("`train/` and `test/`", "`val/`, `valid/`", "`train2017/`")
@pytest.mark.parametrize(
    "names",
    [
        "Train Test",
        "training val",
        "train VALIDATION",
        "train testing",
        "train eval",
        "Train dev",
        "train2017 val2017",
        "seg_train seg_test",
        "Training_Set Test_Set",
        "my-data-train my-data-valid",
    ],
)
def test_splits_are_no_classes(names, tmp_path):
    train, held_out = names.split()
    save_images(
        tmp_path, [f"{part}/{c}/{i}.png" for part in (train, held_out) for c in "ab" for i in range(3)]
    )
    source, files = loaded(tmp_path)
    assert source.length == 6 and len(source.test) == 6 and source.classes == 2
    assert all(name.startswith(f"{train}/") for name in files) and source.validation is None


@FOLDERS.shows("other folders and images next to a split")
def test_a_split_of_three_and_what_is_next_to_it(tmp_path):
    save_images(
        tmp_path, [f"{part}/{i}.png" for part in ("train", "Valid", "test", "more") for i in range(3)]
    )
    save_images(tmp_path, ["a.png", ".hidden/0.png"])
    (tmp_path / "labels.csv").write_text("")
    source, files = loaded(tmp_path)
    assert files == {f"train/{i}.png" for i in range(3)}
    found = "images: 3 to train on, 3 to test on, 3 for validation; no classes"
    assert source.notes == (f"{found}; skipped 2 not of the split",)


@FOLDERS.shows("`train/` only", "`train/` among other folders")
def test_train_without_a_test_set(tmp_path):
    save_images(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(6)])
    (tmp_path / "labels").mkdir()
    source, _ = loaded(tmp_path)
    assert source.classes == 2 and source.length + len(source.test) == 12
    save_images(tmp_path, ["bus/0.png"])
    refused(
        tmp_path, "got images in train and bus, expected held-out ones in test or val; --data .*/train takes"
    )


@FOLDERS.shows("`test/` or `val/` without `train/`", "a split further down", "a part without images")
@pytest.mark.parametrize(
    "names, words",
    [
        ("val/0.png cat/0.png cat/1.png", "got .*val without train, expected both"),
        ("train/0.png Train/0.png test/0.png", "got Train and train, expected one folder of them"),
        ("train/0.png val/0.png dev/0.png", "got dev and val, expected one folder of them"),
        ("train/a/0.png train/b/0.png test/0.png", "test: got no image of a, b, the trained classes"),
        ("train/notes/.hidden.png test/0.png", "train: got no image, expected .*; skipped 1 hidden$"),
        (
            "photos/train/0.png photos/test/0.png",
            "got held-out images in .*test, .*--data .*/photos takes this",
        ),
        (
            "coco/train17/0.png coco/val17/0.png",
            "got held-out images in .*val17, .*--data .*/coco takes this",
        ),
        ("cat/train/0.png cat/val/0.png dog/0.png", "got held-out images in .*cat/val, expected none"),
        (
            "train/a/0.png train/test/0.png test/a/0.png",
            "got held-out images in .*train/test, expected none .* on$",
        ),
        ("a/0.png", "got 1 image, expected at least 2, one of them to test on"),
        ("0/0.png 1/0.png 2/0.png 3/0.png", "got no test image of a trained class"),
    ],
)
def test_splits_that_cannot_be(names, words, tmp_path):
    save_images(tmp_path, names.split())
    refused(tmp_path, words)


@FOLDERS.shows("a folder that cannot be read")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    save_images(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4)])
    scandir, stat = os.scandir, Path.stat

    def refuse(function, name):  # permissions do not stop root, as whom the tests may run
        def called(path, **options):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, **options)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse(scandir, "dog"))
        with pytest.raises(PermissionError, match="dog"):
            loaded(tmp_path)
    (tmp_path / "dog/x.png").symlink_to("0.png")
    monkeypatch.setattr(Path, "stat", refuse(stat, "x.png"))  # as of a link into such a folder
    with pytest.raises(PermissionError, match="x.png"):
        loaded(tmp_path)


SMALL = (
    "--levels 1 --steps-per-level 1 --hidden 2 --batch-size 2 --steps 1 --workers 0 --image-size 4".split()
)
SMALL += "--final-samples 1 --samples 1 --reversible no --class-conditional".split()


def run(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(list(argv))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of three classes, and a class-conditional run on it, which says what it found."""
    folder = tmp_path_factory.mktemp("trained")
    save_images(folder / "pets", [f"{c}/{i}.png" for c in ("cat", "dog", "fox") for i in range(20)])
    code, said, error = run("train", "--data", str(folder / "pets"), "--out", str(folder / "run"), *SMALL)
    assert code == 0 and said.splitlines()[1] == loaded(folder / "pets")[0].notes[0], error
    return folder


def test_commands_say_what_was_found(trained):
    found = loaded(trained / "pets")[0].notes[0]
    for command in ("evaluate", "interpolate"):
        options = (
            ("--samples", "1") if command == "evaluate" else ("--pairs", "1", "--out", str(trained / "x.png"))
        )
        code, said, error = run(command, str(trained / "run" / "best.pt"), *options)  # which knows its data
        assert code == 0 and said.splitlines()[0] == found, error


@FOLDERS.shows("a folder named `photos`")
def test_a_folder_named_as_built_in_data(trained, monkeypatch):
    monkeypatch.chdir(trained)
    save_images(trained, [f"photos/{i}.png" for i in range(3)])
    note = "data: photos is built in; the folder of this name is ./photos"
    assert data.load("photos").notes == (note,) and data.load("photos").shape == (3, 32, 32)
    folder = data.load("./photos", image_size=4)
    assert folder.length + len(folder.test) == 3
    monkeypatch.chdir(trained / "run")
    assert data.load("photos").notes == ()


def test_labels_are_those_of_the_trained_classes(trained):
    model, training = checkpoint.opened(trained / "run")
    save_images(trained / "few", [f"{part}/{c}/0.png" for part in ("train", "test") for c in ("fox", "dog")])
    source = _source(Evaluate("run", data=str(trained / "few")), model, training, Path("run"))
    assert source.test_labels.tolist() == [1, 2]  # not 0 and 1, as a run on this folder would number them
    save_images(trained / "other", [f"{c}/{i}.png" for c in ("emu", "dog") for i in range(9)])
    with pytest.raises(DataError, match="other: got class emu, expected cat, dog, fox"):
        _source(Evaluate("run", data=str(trained / "other")), model, training, Path("run"))


def test_a_resumed_run_keeps_its_classes(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "pets", tmp_path / "pets")
    (tmp_path / "pets/fox").rename(tmp_path / "pets/ant")  # labels by the order of names would change
    argv = ["train", "--resume", str(tmp_path / "run"), "--data", str(tmp_path / "pets"), "--steps", "2"]
    code, _, error = run(*argv, "--data-changed")
    assert (
        code == 1 and "data: got classes ant, cat, dog, expected classes cat, dog, fox as in the run" in error
    )


def test_every_row_of_the_table_is_shown():
    assert not FOLDERS.left
