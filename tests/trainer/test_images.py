"""Images of a folder as people have them: each row of the table of files in docs/training.md, with files made here."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest

from fastflow.trainer import data
from fastflow.trainer.data import decode as decoding
from fastflow.trainer.data.decode import DamagedError, decode, header
from fastflow.trainer.data.source import DataError
from tests.support.pictures import save_images
from tests.support.tables import Table

Image = pytest.importorskip("PIL.Image")
features = pytest.importorskip("PIL.features")
FILES = Table("docs/training.md", "file | what happens")

SIDE = 8
GRAY = np.arange(64, dtype=np.uint8).reshape(SIDE, SIDE) * 4
COLOR = np.stack([GRAY, GRAY.T, 255 - GRAY])
ALPHA = np.where(np.arange(SIDE) < 4, 0, 255).astype(np.uint8) * np.ones((SIDE, 1), np.uint8)


def rgb(array):
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def read(path, channels=3, **options):
    return decode(path, SIDE, channels, **options).astype(int)


def same(path, expected, channels=3, within=0):
    assert np.abs(read(path, channels) - expected.astype(int)).max() <= within, path


def tiff(path, samples, bits, kind=1, white_is_zero=False):
    """A TIFF of one strip, with one sample per pixel; ``kind``: 1 unsigned, 2 signed, 3 floating point."""
    body = samples.tobytes()
    entries = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: 1 - white_is_zero, 273: 8, 277: 1, 278: SIDE}
    entries |= {279: len(body), 339: kind}
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    path.write_bytes(head + body + struct.pack("<H", len(entries)) + fields + bytes(4))


def packed_12_bits(samples):
    """Two samples in three bytes, as TIFF stores them."""
    first, second = samples.reshape(SIDE, -1, 2).astype(np.uint16).transpose(2, 0, 1)
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, -1).astype(np.uint8).reshape(SIDE, -1)


def png(path, rows, bits, kind, key=None):
    """A PNG of packed rows; ``kind``: 0 gray, 2 color, 4 gray with alpha; ``key``: the transparent value."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, kind, 0, 0, 0))
    head += b"" if key is None else chunk(b"tRNS", struct.pack(">H", key))
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def packed(values, bits):
    """Rows of values of fewer than 8 bits."""
    return [int("".join(f"{v:0{bits}b}" for v in row), 2).to_bytes(bits, "big") for row in values]


@FILES.shows("`.png`, ")
@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "ppm"])
def test_lossless_formats(suffix, tmp_path):
    rgb(COLOR).save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    same(tmp_path / f"x.{suffix}", COLOR)
    (tmp_path / f"x.{suffix}").rename(tmp_path / "X.JPEG")
    same(tmp_path / "X.JPEG", COLOR)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "jfif", "avif"])
def test_lossy_formats(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    smooth = np.broadcast_to(np.arange(SIDE)[:, None] * 20, (3, SIDE, SIDE)).astype(np.uint8)
    save_images(tmp_path, ["b.png"])
    rgb(smooth).save(tmp_path / f"a.{suffix}", quality=95)
    same(tmp_path / f"a.{suffix}", smooth, within=12)
    source = data.load(str(tmp_path), image_size=SIDE, channels=3)
    assert source.length + len(source.test) == 2


@FILES.shows("gray of 1 to 16 bits")
def test_gray_of_any_number_of_bits(tmp_path):
    fine = GRAY.astype(np.uint16) * 257 + 100  # the low byte decides nothing
    expected = np.round(fine / 257)
    Image.fromarray(fine).save(tmp_path / "16.png")
    Image.fromarray(fine).save(tmp_path / "16.tif")
    Image.fromarray(fine).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    tiff(tmp_path / "white.tif", 65535 - fine, 16, white_is_zero=True)
    (tmp_path / "16.pgm").write_bytes(b"P5 8 8 65535\n" + fine.astype(">u2").tobytes())
    for name in ("16.png", "16.tif", "lzw.tif", "white.tif", "16.pgm"):
        same(tmp_path / name, expected[None], channels=1)
        same(tmp_path / name, np.stack([expected] * 3))
    tiff(tmp_path / "8.tif", 255 - GRAY, 8, white_is_zero=True)
    same(tmp_path / "8.tif", GRAY[None], channels=1)
    twelve = GRAY.astype(np.uint16) * 16 + 3
    tiff(tmp_path / "12.tif", packed_12_bits(twelve), 12)
    same(tmp_path / "12.tif", np.round(twelve / 4095 * 255)[None], channels=1)
    for most in (1, 7, 100, 1023, 4095):
        samples = np.round(GRAY / 255 * most).astype(">u2" if most > 255 else "u1")
        (tmp_path / "x.pgm").write_bytes(b"P5 8 8 %d\n" % most + samples.tobytes())
        same(tmp_path / "x.pgm", np.round(samples / most * 255)[None], channels=1)
    for bits in (1, 2, 4, 8):
        values = np.arange(64).reshape(SIDE, SIDE) % 2**bits
        png(tmp_path / "x.png", packed(values, bits), bits, 0)
        same(tmp_path / "x.png", (values * 255 // (2**bits - 1))[None], channels=1)


@FILES.shows("color of 16 bits")
def test_color_of_16_bits(tmp_path):
    fine = COLOR.transpose(1, 2, 0).astype(">u2") * 257
    png(tmp_path / "x.png", [row.tobytes() for row in fine.astype(">u2")], 16, 2)
    (tmp_path / "x.ppm").write_bytes(b"P6 8 8 65535\n" + fine.astype(">u2").tobytes())
    for name in ("x.png", "x.ppm"):
        same(tmp_path / name, COLOR)


@FILES.shows("floating point, signed or 32-bit samples, LAB")
def test_samples_without_a_range_are_refused_by_name(tmp_path):
    samples = {"f.tif": (GRAY.astype(np.float32) / 255, 32, 3), "i.tif": (GRAY.astype(np.int32), 32, 2)}
    samples |= {"s.tif": (GRAY.astype(np.int16), 16, 2), "b.tif": (GRAY.astype(np.int8), 8, 2)}
    samples |= {"u.tif": (GRAY.astype(np.uint32), 32, 1)}
    for name, arguments in samples.items():
        tiff(tmp_path / name, *arguments)
        got = "floating point" if name == "f.tif" else "signed or 32-bit"
        with pytest.raises(
            DataError, match=f"{name}: got {got} samples, which have no range, expected 8 or 16"
        ):
            read(tmp_path / name)
    Image.new("LAB", (SIDE, SIDE)).save(tmp_path / "lab.tif")
    with pytest.raises(DataError, match="lab.tif: got LAB colors, expected gray, RGB or CMYK"):
        read(tmp_path / "lab.tif")


@FILES.shows("EXIF orientation 1 to 8")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "lzw.tif", "webp", "avif"])
def test_photos_stand_upright(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    upright = np.add.outer(2 * np.arange(16), np.arange(24)).astype(np.uint8) * 4
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T}
    stored |= {
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }  # as cameras store it
    options = {"tif": {}, "lzw.tif": {"compression": "tiff_lzw"}}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[274] = orientation
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        picture.save(tmp_path / f"x.{suffix}", exif=exif, **options.get(suffix, {"quality": 100}))
        found = decode(tmp_path / f"x.{suffix}", 16, 1)[0].astype(int)
        assert np.abs(found - upright[:, 4:20]).max() <= (4 if suffix in ("jpg", "avif", "webp") else 0)


@FILES.shows("damaged EXIF data")
def test_damaged_exif_data(tmp_path):
    exif = Image.Exif()
    exif[274], exif[271] = 6, "a maker of cameras"
    for length in (8, 16, 24, 40, len(exif.tobytes()) - 3):
        Image.fromarray(GRAY).save(tmp_path / f"{length}.png", exif=exif.tobytes()[:length])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read(tmp_path / f"{length}.png", 1)[0]
        assert not caught and any((found == stored).all() for stored in (GRAY, np.rot90(GRAY, -1)))


@FILES.shows("transparency")
def test_transparency_is_on_the_background(tmp_path):
    expected = np.where(ALPHA == 255, COLOR, 255)
    Image.fromarray(np.dstack([*COLOR, ALPHA])).save(tmp_path / "rgba.png")
    same(tmp_path / "rgba.png", expected)
    for color, values in (("black", (0, 0, 0)), ("#102030", (16, 32, 48))):
        below = np.where(ALPHA == 255, COLOR, np.array(values)[:, None, None])
        assert (read(tmp_path / "rgba.png", background=color) == below).all()
    Image.fromarray(np.dstack([*COLOR, ALPHA // 255 * 127])).save(tmp_path / "half.png")
    half = np.where(ALPHA == 255, COLOR * (127 / 255), 0)
    assert np.abs(read(tmp_path / "half.png", background="black") - half).max() <= 1
    Image.fromarray(np.dstack([GRAY, ALPHA])).save(tmp_path / "la.png")
    same(tmp_path / "la.png", np.where(ALPHA == 255, GRAY, 255)[None], channels=1)
    pairs = np.stack([GRAY, ALPHA], -1).astype(">u2") * 257
    png(tmp_path / "la16.png", [row.tobytes() for row in pairs.astype(">u2")], 16, 4)
    same(tmp_path / "la16.png", np.where(ALPHA == 255, GRAY, 255)[None], channels=1)
    for name in ("palette.png", "palette.gif"):
        palette = Image.fromarray(np.where(ALPHA == 255, 1, 0).astype(np.uint8)).convert("P")
        palette.putpalette([9, 8, 7, 30, 40, 50])
        palette.save(tmp_path / name, transparency=0)
        same(tmp_path / name, np.where(ALPHA == 255, np.array([30, 40, 50])[:, None, None], 255))
    rgb(COLOR).save(tmp_path / "key.png", transparency=tuple(int(v) for v in COLOR[:, 0, 5]))
    found = read(tmp_path / "key.png")
    assert (found[:, 0, 5] == 255).all() and (found[:, 5, 0] == COLOR[:, 5, 0]).all()
    samples = GRAY.astype(np.uint16) * 257
    Image.fromarray(samples).save(tmp_path / "key16.png", transparency=int(samples[2, 2]))
    found = read(tmp_path / "key16.png", 1, background="#303030")[0]
    assert found[2, 2] == 48 and found[2, 3] == GRAY[2, 3]
    for bits in (1, 2, 4, 8):
        values = np.arange(64).reshape(SIDE, SIDE) % 2**bits
        png(tmp_path / "key.png", packed(values, bits), bits, 0, key=1)
        opaque = values * 255 // (2**bits - 1)
        found = read(tmp_path / "key.png", 1, background="#070707")
        assert (found == np.where(values == 1, 7, opaque)).all()


def test_the_background_is_a_color(tmp_path):
    save_images(tmp_path, ["a.png", "b.png"])
    for color in ("grass", "#12345", "#10203040"):
        with pytest.raises(DataError, match=f"background: got '{color}', expected an opaque color such as"):
            data.load(str(tmp_path), background=color)
    Image.new("RGBA", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4)).save(tmp_path / "b.png")
    source = data.load(str(tmp_path), image_size=4, background="navy")
    assert source.notes[0].endswith("; transparency on navy")
    x, _ = data.Batches(source, 1, seed=0)[0]
    for images in (x, source.test):
        assert (images[0, :, 0, 0] == images.new_tensor([0, 0, 128])).all()


@FILES.shows("CMYK", "several frames", "1x1", "more than 64 times")
def test_cmyk_animations_black_and_white_and_odd_sizes(tmp_path):
    rgb(COLOR).convert("CMYK").save(tmp_path / "cmyk.tif")
    same(tmp_path / "cmyk.tif", COLOR, within=1)
    frames = [Image.fromarray(np.full((SIDE, SIDE), v, np.uint8)) for v in (10, 200)]
    for name in ("x.gif", "x.webp", "x.png", "x.tif"):
        options = {"lossless": True} if name == "x.webp" else {}
        frames[0].convert("RGB").save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        with Image.open(tmp_path / name) as picture:
            assert picture.n_frames == 2
        assert (abs(read(tmp_path / name) - 10) <= 1).all()
    Image.fromarray(GRAY > 100).save(tmp_path / "1bit.png")
    same(tmp_path / "1bit.png", np.where(GRAY > 100, 255, 0)[None], channels=1)
    Image.new("RGB", (1, 1), (3, 4, 5)).save(tmp_path / "one.png")
    assert (read(tmp_path / "one.png") == np.array([3, 4, 5])[:, None, None]).all()
    long = Image.new("RGB", (2 * 10**6, 1), (9, 9, 9))
    long.paste((200, 100, 50), (10**6 - 40, 0, 10**6 + 40, 1))
    long.save(tmp_path / "long.png")  # resized to 8x16,000,000, it would take 400 MB
    assert (read(tmp_path / "long.png") == np.array([200, 100, 50])[:, None, None]).all()


def damaged_files(folder):
    """One file of each kind that holds no image."""
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


@FILES.shows("truncated", "large images")
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
    assert source.notes[0].endswith(f"; skipped 6 damaged ({', '.join(sorted(names))})")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "I;16", "CMYK"])
def test_large_images_are_converted_in_strips_of_the_same_pixels(tmp_path, monkeypatch, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.fromarray(np.stack([*COLOR, ALPHA], -1), "RGBA")
    if mode == "I;16":
        image = Image.fromarray(GRAY.astype(np.uint16) * 257)
    image = image.convert(mode)
    image.save(path, **({"transparency": 3} if mode == "P" else {}))
    whole = [read(path, channels) for channels in (1, 3)]
    monkeypatch.setattr(decoding, "_STRIP", 3 * SIDE)  # the last strip is narrower
    assert all(np.array_equal(read(path, channels), whole[channels // 2]) for channels in (1, 3))


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns above it and refuses twice as many
    rgb(COLOR).save(tmp_path / "x.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(tmp_path / "x.png", COLOR)
    assert not caught


@FILES.shows("gray images only", "gray images among", "a color image in a folder")
def test_gray_folders_have_one_channel(tmp_path):
    for i in range(12):
        Image.fromarray(GRAY + i).save(tmp_path / f"{i}.png")
    source = data.load(str(tmp_path), image_size=SIDE)
    assert source.shape == (1, SIDE, SIDE) and source.test.shape[1] == 1
    assert "all gray: one channel" in source.notes[0]
    source = data.load(str(tmp_path), image_size=SIDE, channels=3)
    assert source.shape == (3, SIDE, SIDE) and source.notes[0].endswith("; all gray: three equal channels")
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
    assert x.shape[1:] == (1, SIDE, SIDE)
    rgb(COLOR).save(tmp_path / files[0])
    source = data.load(str(tmp_path), image_size=SIDE, channels=1)
    assert source.notes[0].endswith("; color converted to gray")
    source = data.load(str(tmp_path), image_size=SIDE)
    x, _ = data.Batches(source, source.length, seed=0)[0]
    assert source.shape == (3, SIDE, SIDE) and (x[:, 0] == x[:, 1]).all((1, 2)).sum() == source.length - 2


@FILES.shows("gray pixels that are stored as RGB")
def test_what_counts_as_gray(tmp_path):
    picture = Image.fromarray(GRAY)
    gray = {"l.png": picture, "1.png": picture.convert("1"), "la.png": picture.convert("LA")}
    gray |= {"p.png": picture.convert("P"), "p.gif": picture.convert("RGB").quantize(16)}
    gray |= {
        "p.bmp": picture.convert("P"),
        "p.tif": picture.convert("P"),
        "16.png": Image.fromarray(GRAY * np.uint16(257)),
    }
    color = {
        "rgb.png": picture.convert("RGB"),
        "p3.png": rgb(COLOR).quantize(16),
        "p3.tif": rgb(COLOR).quantize(16),
    }
    for name, each in (gray | color).items():
        each.save(tmp_path / name)
        assert header(tmp_path / name).gray == (name in gray), name
        assert header(tmp_path / name).transparent == (name == "la.png")
    same(tmp_path / "p.png", GRAY[None], channels=1)
    same(tmp_path / "rgb.png", GRAY[None], channels=1)
    pairs = np.stack([GRAY, ALPHA], -1).astype(">u2") * 257
    png(tmp_path / "la16.png", [row.tobytes() for row in pairs.astype(">u2")], 16, 4)
    assert header(tmp_path / "la16.png") == (True, True)


@FILES.shows("names with spaces")
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
    source = data.load(str(tmp_path), image_size=4)
    assert source.length + len(source.test) == 12
    (tmp_path / "new\nline.png").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"new\\nline.png: cannot be read as an image"):
        read(tmp_path / "new\nline.png")


def test_every_row_of_the_table_is_shown():
    assert not FILES.left
