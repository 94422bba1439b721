"""Arrays of .npz files as people have them: each row of the table of docs/training.md."""

import re
import zipfile

import numpy as np
import pytest

from fastflow.trainer import data
from fastflow.trainer.data import source
from fastflow.trainer.data.source import DataError
from tests.support.tables import Table

ARRAYS = Table("docs/training.md", "array")


@ARRAYS.shows("floats", "objects", "axes", "labels")
def test_npz_files_as_people_have_them(tmp_path):
    path = tmp_path / "x.npz"
    x = np.arange(10 * 8 * 8 * 3, dtype=np.int64).reshape(10, 8, 8, 3) % 256

    def refused(words, **arrays):
        np.savez(path, **arrays)
        with pytest.raises(DataError) as error:
            data.load(str(path))
        assert str(error.value).startswith(f"{path}: ") and words in str(error.value), error.value
        assert "\n" not in str(error.value)

    convert = "expected uint8; the values are from"
    refused(
        f"x: got float32, {convert} 0 to 1: (255 * x).round().astype('uint8') converts them",
        x=(x / 255).astype("f4"),
    )
    refused(f"{convert} -1 to 1: (127.5 * (x + 1)).round().astype('uint8')", x=x / 127.5 - 1)
    refused(f"x: got int16, {convert} 0 to 255: x.round().astype('uint8')", x=x.astype(np.int16))
    refused(f"x: got int16, {convert} -100 to 155", x=(x - 100).astype(np.int16))
    refused(f"x: got bool, {convert} 0 to 1: (255 * x)", x=x > 100)
    refused("x: got <U1, expected uint8", x=np.full((3, 4, 4), "a"))
    refused(
        "it holds arrays of objects, expected numbers; np.stack", x=np.array([x[0], x[1, :3]], dtype=object)
    )
    x = x.astype(np.uint8)
    refused(
        "x: got shape (8, 8, 3, 10), expected [N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3; "
        "np.moveaxis(x, -1, 0) moves the images to the first axis",
        x=np.moveaxis(x, 0, -1),
    )
    refused("x: got shape (), expected", x=np.uint8(3), y=np.arange(3))
    refused("y: got int64 (9,), expected integers from 0 of shape (10,), one per image", x=x, y=np.arange(9))
    refused("y: got int64 (10, 1), expected", x=x, y=np.arange(10)[:, None])
    refused("got arrays images, labels, expected x (images)", images=x, labels=np.arange(10))
    refused("x: got 0 images, expected at least 1", x=x[:0], y=np.arange(0))
    refused("got no arrays, expected x (images)")
    np.savez(path, x=x)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="x.npz: cannot be read as .npz"):
        data.load(str(path))


@ARRAYS.shows("uint8 ", "the only array")
def test_layouts_of_images(tmp_path):
    path = tmp_path / "X.NPZ"
    x = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 8)).astype(np.uint8)
    gray = x[:, :1]
    layouts = {
        "[N, C, H, W]": (x, x),
        "[N, H, W, C]": (x.transpose(0, 2, 3, 1), x),
        "[N, H, W]": (gray[:, 0], gray),
    }
    layouts["[N, H, W, 1]"] = (gray.transpose(0, 2, 3, 1), gray)
    for stored, expected in layouts.values():
        for array in (stored, np.asfortranarray(stored)):
            with path.open("wb") as file:
                np.savez(file, some_name=array)
            source = data.load(str(path))
            assert np.array_equal(source.test.numpy(), expected[9:]) and source.test.is_contiguous()
            assert source.length == 9 and source.shape == expected.shape[1:]


def test_every_row_of_the_table_is_shown():
    assert not ARRAYS.left


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((100, 64, 64, 3), np.uint8))  # 1.2 MB in some kB
    monkeypatch.setattr(source, "free_bytes", lambda device: 1e6)
    with pytest.raises(DataError, match=re.escape(f"{path}: got arrays of 0.00123 GB, expected at most")):
        data.load(str(path))


def test_members_that_are_no_arrays_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.txt", b"pixels")
    with pytest.raises(DataError, match="x.txt: got no array, expected a file of numpy.savez"):
        data.load(str(tmp_path / "a.npz"))
