"""Images and folders as people have them: each row of the tables of docs/training.md, with files made here."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

from fastflow.trainer import data
from fastflow.trainer.data.decode import DamagedError, decode
from fastflow.trainer.data.source import DataError

Image = pytest.importorskip("PIL.Image")
features = pytest.importorskip("PIL.features")

SIDE = 8
GRAY = np.arange(64, dtype=np.uint8).reshape(SIDE, SIDE) * 4
COLOR = np.stack([GRAY, GRAY.T, 255 - GRAY])


def rgb(array):
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def read(path, channels=3):
    return decode(path, SIDE, channels).astype(int)


def same(path, expected, channels=3, within=0):
    assert np.abs(read(path, channels) - expected.astype(int)).max() <= within


def tiff(path, samples, bits, kind=1):
    """A TIFF of one strip; ``kind``: 1 unsigned, 2 signed, 3 floating point."""
    body = samples.tobytes()
    entries = {256: samples.shape[1], 257: SIDE, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: SIDE}
    entries |= {279: len(body), 339: kind}
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    path.write_bytes(head + body + struct.pack("<H", len(entries)) + fields + bytes(4))


def packed_12_bits(samples):
    """Two samples in three bytes, as TIFF stores them."""
    first, second = samples.reshape(SIDE, -1, 2).astype(np.uint16).transpose(2, 0, 1)
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, -1).astype(np.uint8).reshape(SIDE, -1)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "ppm"])
def test_lossless_formats(suffix, tmp_path):
    rgb(COLOR).save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    same(tmp_path / f"x.{suffix}", COLOR)


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "avif"])
def test_lossy_formats(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    smooth = np.broadcast_to(np.arange(SIDE)[:, None] * 20, (3, SIDE, SIDE)).astype(np.uint8)
    save_images(tmp_path, ["b.png"])
    rgb(smooth).save(tmp_path / f"a.{suffix}", quality=95)
    same(tmp_path / f"a.{suffix}", smooth, within=12)
    source = data.load(str(tmp_path), image_size=SIDE, channels=3)
    assert source.length + len(source.test) == 2


def test_gray_of_8_12_and_16_bits(tmp_path):
    fine = GRAY.astype(np.uint16) * 257 + 100  # the low byte decides nothing
    expected = np.round(fine / 257)
    Image.fromarray(GRAY).save(tmp_path / "8.png")
    Image.fromarray(fine).save(tmp_path / "16.png")
    Image.fromarray(fine).save(tmp_path / "16.tif")
    (tmp_path / "16.pgm").write_bytes(b"P5 8 8 65535\n" + fine.astype(">u2").tobytes())
    same(tmp_path / "8.png", GRAY[None], channels=1)
    for name in ("16.png", "16.tif", "16.pgm"):
        same(tmp_path / name, expected[None], channels=1)
        same(tmp_path / name, np.stack([expected] * 3))
    twelve = GRAY.astype(np.uint16) * 16 + 3
    (tmp_path / "12.pgm").write_bytes(b"P5 8 8 4095\n" + twelve.astype(">u2").tobytes())
    tiff(tmp_path / "12.tif", packed_12_bits(twelve), 12)
    (tmp_path / "12.tif").write_bytes(
        (tmp_path / "12.tif")
        .read_bytes()
        .replace(struct.pack("<HHII", 256, 4, 1, 12), struct.pack("<HHII", 256, 4, 1, 8))
    )
    for name in ("12.pgm", "12.tif"):
        same(tmp_path / name, np.round(twelve / 4095 * 255)[None], channels=1)


def test_samples_without_a_range_are_refused_by_name(tmp_path):
    tiff(tmp_path / "f.tif", GRAY.astype(np.float32) / 255, 32, 3)
    tiff(tmp_path / "i.tif", GRAY.astype(np.int32), 32, 2)
    tiff(tmp_path / "s.tif", GRAY.astype(np.int16), 16, 2)
    with pytest.raises(
        DataError, match="f.tif: got floating point samples, which have no range, expected 8 or 16"
    ):
        read(tmp_path / "f.tif")
    for name in ("i.tif", "s.tif"):
        with pytest.raises(DataError, match=f"{name}: got signed or 32-bit samples"):
            read(tmp_path / name)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(orientation, tmp_path):
    turned = {1: GRAY, 2: GRAY[:, ::-1], 3: GRAY[::-1, ::-1], 4: GRAY[::-1], 5: GRAY.T}
    turned |= {6: np.rot90(GRAY), 7: GRAY[::-1, ::-1].T, 8: np.rot90(GRAY, -1)}  # as the camera stored them
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(turned[orientation])).save(tmp_path / "x.png", exif=exif)
    same(tmp_path / "x.png", GRAY[None], channels=1)


def test_transparency_is_on_white(tmp_path):
    alpha = np.where(np.arange(SIDE) < 4, 0, 255).astype(np.uint8) * np.ones((SIDE, 1), np.uint8)
    pixels = np.dstack([*COLOR, alpha])
    expected = np.where(alpha == 255, COLOR, 255)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    same(tmp_path / "rgba.png", expected)
    Image.fromarray(np.dstack([GRAY, alpha])).save(tmp_path / "la.png")
    same(tmp_path / "la.png", np.where(alpha == 255, GRAY, 255)[None], channels=1)
    for name in ("palette.png", "palette.gif"):
        palette = Image.fromarray(np.where(alpha == 255, 1, 0).astype(np.uint8)).convert("P")
        palette.putpalette([9, 8, 7, 30, 40, 50])
        palette.save(tmp_path / name, transparency=0)
        same(tmp_path / name, np.where(alpha == 255, np.array([30, 40, 50])[:, None, None], 255))
    rgb(COLOR).save(tmp_path / "key.png", transparency=tuple(int(v) for v in COLOR[:, 0, 5]))
    assert (read(tmp_path / "key.png")[:, 0, 5] == 255).all() and (
        read(tmp_path / "key.png")[:, 5, 0] == COLOR[:, 5, 0]
    ).all()
    samples = GRAY.astype(np.uint16) * 257
    Image.fromarray(samples).save(tmp_path / "key16.png", transparency=int(samples[2, 2]))
    assert (
        read(tmp_path / "key16.png", 1)[0, 2, 2] == 255
        and read(tmp_path / "key16.png", 1)[0, 2, 3] == GRAY[2, 3]
    )


def test_cmyk_animations_black_and_white_and_one_pixel(tmp_path):
    rgb(COLOR).convert("CMYK").save(tmp_path / "cmyk.tif")
    same(tmp_path / "cmyk.tif", COLOR, within=1)
    frames = [Image.fromarray(np.full((SIDE, SIDE), v, np.uint8)) for v in (10, 200)]
    for name in ("x.gif", "x.webp", "x.png"):
        frames[0].convert("RGB").save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (abs(read(tmp_path / name) - 10) <= 1).all()
    Image.fromarray(GRAY > 100).save(tmp_path / "1bit.png")
    same(tmp_path / "1bit.png", np.where(GRAY > 100, 255, 0)[None], channels=1)
    Image.new("RGB", (1, 1), (3, 4, 5)).save(tmp_path / "one.png")
    assert (read(tmp_path / "one.png") == np.array([3, 4, 5])[:, None, None]).all()


def damaged_files(folder):
    """One file of each kind that holds no image; the names by a part of the message."""
    rgb(COLOR).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image\n")
    (folder / "header.ppm").write_bytes(b"P6 8 eight 255\n")
    (folder / "bits.png").write_bytes(whole[:18] + bytes(6) + whole[24:])
    size = struct.pack(">II", 14000, 14000) + b"\x01\x00\x00\x00\x00"
    crc = zlib.crc32(b"IHDR" + size)
    (folder / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + size + struct.pack(">I", crc) + whole[33:]
    )
    return ["cut.png", "empty.png", "text.png", "header.ppm", "bits.png", "huge.png"]


def test_damaged_files_are_one_line_with_their_name_or_skipped(tmp_path):
    save_images(tmp_path, [f"{i}.png" for i in range(8)])
    names = damaged_files(tmp_path)
    for name in names:
        words = (
            "more than 178,956,970 pixels, the limit of Pillow"
            if name == "huge.png"
            else "cannot be read as an image"
        )
        with pytest.raises(DamagedError, match=words) as error:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DamagedError):
        source = data.load(str(tmp_path), image_size=SIDE)
        data.Batches(source, source.length, seed=0)[0]
    source = data.load(str(tmp_path), image_size=SIDE, skip_damaged=True)
    data.Batches(source, source.length, seed=0)[0]
    assert source.length + len(source.test) == 8
    assert source.found.endswith(f"; skipped 6 damaged ({', '.join(sorted(names))})")


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns above it and refuses twice as many
    rgb(COLOR).save(tmp_path / "x.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(tmp_path / "x.png", COLOR)
    assert not caught


def test_gray_folders_have_one_channel(tmp_path):
    for i in range(12):
        Image.fromarray(GRAY + i).save(tmp_path / f"{i}.png")
    source = data.load(str(tmp_path), image_size=SIDE)
    assert source.shape == (1, SIDE, SIDE) and source.test.shape[1] == 1
    assert "all gray: one channel" in source.found
    assert data.load(str(tmp_path), image_size=SIDE, channels=3).shape == (3, SIDE, SIDE)
    for i in range(20, 200):
        Image.fromarray(GRAY).save(tmp_path / f"{i}.png")
    files = [f.name for f in data.load(str(tmp_path), image_size=SIDE)._files]
    rgb(COLOR).save(tmp_path / files[2])  # not among those that are looked at
    source = data.load(str(tmp_path), image_size=SIDE)
    with pytest.raises(
        DataError, match=f"{files[2]}: got a color image, expected gray ones as before; give --channels"
    ):
        data.Batches(source, source.length, seed=0)[0]
    source = data.load(str(tmp_path), image_size=SIDE, channels=1)
    x, _ = data.Batches(source, source.length, seed=0)[0]
    assert x.shape[1:] == (1, SIDE, SIDE) and "gray" not in source.found
    rgb(COLOR).save(tmp_path / files[0])
    assert data.load(str(tmp_path), image_size=SIDE).shape == (3, SIDE, SIDE)


def save_images(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)


def loaded(folder):
    source = data.load(str(folder), image_size=4)
    return source, {f.relative_to(folder).as_posix() for f in source._files}


def test_hidden_files_and_folders_are_no_images(tmp_path):
    names = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(9)]
    save_images(tmp_path, [*names, ".ipynb_checkpoints/a.png", "__MACOSX/cat/0.png", "cat/._0.png", ".a.png"])
    for name in ("cat/Thumbs.db", "cat/.DS_Store", "notes.txt"):
        (tmp_path / name).write_text("")
    source, train = loaded(tmp_path)
    assert train < set(names) and source.length + len(source.test) == 18 and source.classes == 2
    assert source.found.startswith(
        f"images: {source.length} to train on, {len(source.test)} to test on; 2 classes (cat, dog); "
    )
    assert "; skipped 5 hidden" in source.found and "; skipped 2 not named as images" in source.found


def test_links(tmp_path):
    save_images(tmp_path / "elsewhere", [f"{i}.png" for i in range(9)])
    save_images(tmp_path / "data", [f"dog/{i}.png" for i in range(9)])
    (tmp_path / "data/cat").symlink_to("../elsewhere")
    (tmp_path / "data/dog/again").symlink_to("..")
    (tmp_path / "data/dog/gone.png").symlink_to("nowhere.png")
    (tmp_path / "data/dog/itself.png").symlink_to("itself.png")
    source, _ = loaded(tmp_path / "data")
    assert source.classes == 2 and source.length + len(source.test) == 18
    assert "skipped 2 broken links" in source.found and "skipped 1 links in a circle" in source.found


def test_names_of_any_kind(tmp_path):
    names = [
        "with space.png",
        "new\nline.png",
        "naïve.PNG",
        "日本.jpeg",
        os.fsdecode(b"not utf-8 \xff.png"),
        "a.b.png",
    ]
    save_images(tmp_path, [*names, *(f"{i}.png" for i in range(6))])
    source, _ = loaded(tmp_path)
    assert source.length + len(source.test) == 12
    (tmp_path / "new\nline.png").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"new\\nline.png: cannot be read as an image"):
        read(tmp_path / "new\nline.png")


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("training", "val"), ("train", "VALIDATION"), ("train", "testing")]
)
def test_splits_are_no_classes(names, tmp_path):
    train, held_out = names
    save_images(tmp_path, [f"{part}/{c}/{i}.png" for part in names for c in "ab" for i in range(3)])
    source, files = loaded(tmp_path)
    assert source.length == 6 and len(source.test) == 6 and source.classes == 2
    assert all(name.startswith(f"{train}/") for name in files) and source.validation is None


def test_train_without_a_test_set(tmp_path):
    save_images(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(6)])
    source, _ = loaded(tmp_path)
    assert source.classes == 2 and source.length + len(source.test) == 12


@pytest.mark.parametrize(
    "names, words",
    [
        (["val/0.png", "cat/0.png", "cat/1.png"], "got .*val without train, expected both"),
        (["train/0.png", "Train/0.png", "test/0.png"], "got Train and train, expected one folder of them"),
        (["train/a/0.png", "train/b/0.png", "test/0.png"], "test: got no image of a, b, the trained classes"),
        (["train/notes/.hidden.png", "test/0.png"], "train: got no image, expected files .avif, .bmp"),
    ],
)
def test_splits_that_cannot_be(names, words, tmp_path):
    save_images(tmp_path, names)
    with pytest.raises(DataError, match=words) as error:
        loaded(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    save_images(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4)])
    scandir = os.scandir

    def refuse(path):  # permissions do not stop root, as whom the tests may run
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="dog"):
        loaded(tmp_path)


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
    np.savez(path, x=np.asfortranarray(x))
    source = data.load(str(path))
    assert np.array_equal(source.test.numpy(), x[9:].transpose(0, 3, 1, 2)) and source.test.is_contiguous()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="x.npz: cannot be read as .npz"):
        data.load(str(path))


def test_one_image_classes_and_mixed_folders(tmp_path):
    save_images(tmp_path / "one", [f"{i}/0.png" for i in range(5)])
    with pytest.raises(DataError, match="got no image of .*, the trained classes"):
        loaded(tmp_path / "one")
    save_images(tmp_path / "mixed", [*(f"{i}.png" for i in range(8)), "a/0.png", "b/0.png"])
    source, _ = loaded(tmp_path / "mixed")
    assert source.classes is None and "no classes" in source.found
