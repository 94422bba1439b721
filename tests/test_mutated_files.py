"""Damaged files of every kind end in one line or load: no crash, no hang, no gigabyte of memory.

FASTFLOW_MUTATIONS=2000 python -m pytest tests/test_mutated_files.py       # minutes; by default 30 of each kind
"""

import contextlib
import io
import os
import random
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import fastflow
from fastflow import CheckpointError
from fastflow.models import VectorGlow
from fastflow.trainer import data
from fastflow.trainer.data import DataError
from tests.support.limits import limited

COUNT = int(os.environ.get("FASTFLOW_MUTATIONS", "30"))
SECONDS, GIBIBYTE = 10, 2**30
ROWS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)


def written(write) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def model_file(suffix: str) -> bytes:
    model = VectorGlow(features=2, steps=1, hidden=4)
    if suffix == ".pt":
        contents = {"format": 1, "fastflow": "0.1.0", "model": "VectorGlow", "config": dict(model.config)}
        return written(
            lambda f: torch.save(contents | {"state_dict": model.state_dict(), "training": None}, f)
        )
    contents = {"format": 1, "fastflow": "0.1.0", "model": "VectorGlow", "config": dict(model.config)}
    return fastflow.archive.to_safetensors(contents | {"state_dict": model.state_dict(), "training": None})


def csv_file(file) -> None:
    np.savetxt(file, ROWS, delimiter=",", header="a,b,c", comments="")


def parquet_file(file) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({name: ROWS[:, i] for i, name in enumerate("abc")}), file)


def image_file(kind: str, **options) -> bytes:
    return written(lambda f: Image.fromarray(PIXELS[0]).save(f, kind, **options))


def load_image(path) -> None:
    """The file among others in a folder, read as training reads them."""
    for i in range(4):
        Image.fromarray(PIXELS[i + 1]).save(path.with_name(f"whole{i}.png"))
    source = data.load(str(path.parent), image_size=8)
    source.draw(np.arange(source.length), np.zeros((source.length, 3)))
    assert source.test is not None


KINDS = {
    ".pt": (lambda: model_file(".pt"), fastflow.load),
    ".safetensors": (lambda: model_file(".safetensors"), fastflow.load),
    ".npz of images": (lambda: written(lambda f: np.savez(f, x=PIXELS, y=np.arange(12) % 2)), data.load),
    ".npz, compressed": (lambda: written(lambda f: np.savez_compressed(f, x=ROWS)), data.load),
    ".npy": (lambda: written(lambda f: np.save(f, ROWS)), data.load),
    ".csv": (lambda: written(csv_file), data.load),
    ".parquet": (lambda: written(parquet_file), data.load),
    ".png": (lambda: image_file("PNG"), load_image),
    ".jpg": (lambda: image_file("JPEG"), load_image),
    ".tif": (lambda: image_file("TIFF"), load_image),
    ".webp": (lambda: image_file("WEBP", lossless=True), load_image),
    ".bmp": (lambda: image_file("BMP"), load_image),
    ".ppm": (lambda: image_file("PPM"), load_image),
}


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """A copy with one to four changes of the kinds that disks, transfers and attackers make."""
    changed = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) or 1)
        size = rng.choice((1, 1, 2, 4, 8, 64))
        change = rng.randrange(6)
        if change == 0:
            del changed[at:]
        elif change == 1:
            changed[at : at + size] = rng.randbytes(size)
        elif change == 2:
            changed[at : at + size] = rng.choice((b"\x00", b"\xff", b"\x7f")) * size
        elif change == 3:
            changed[at:at] = rng.randbytes(size)
        elif change == 4:
            del changed[at : at + size]
        else:
            changed[at:at] = changed[at : at + 4 * size]
    return bytes(changed)


def repaired(changed: bytes) -> bytes:
    """The same with the checksums of a zip file made right, so that what is inside reaches its reader."""
    try:
        with zipfile.ZipFile(io.BytesIO(changed)) as archive:
            out, infos = bytearray(changed), archive.infolist()
    except Exception:
        return changed
    for info in infos:
        name = info.filename.encode("utf-8", "surrogateescape")
        start = (
            info.header_offset
            + 30
            + len(name)
            + int.from_bytes(changed[info.header_offset + 28 :][:2], "little")
        )
        stored = changed[start : start + info.compress_size]
        if info.compress_type == zipfile.ZIP_DEFLATED:
            with contextlib.suppress(zlib.error):
                stored = zlib.decompress(stored, -15)
        old, new = info.CRC.to_bytes(4, "little"), zlib.crc32(stored).to_bytes(4, "little")
        out = out.replace(old, new) if old != new and out.count(old) <= 3 else out
    return bytes(out)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_refused_in_a_line_or_load(kind, tmp_path):
    make, load = KINDS[kind]
    whole, rng = make(), random.Random(kind)
    path = tmp_path / f"file{kind.split()[0].rstrip(',')}"
    path.write_bytes(whole)
    load(path) if load is not data.load else load(str(path))
    refused = 0
    for i in range(COUNT):
        changed = mutated(whole, rng)
        path.write_bytes(repaired(changed) if i % 2 and whole.startswith(b"PK") else changed)
        with limited(SECONDS, GIBIBYTE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(path) if load is not data.load else load(str(path))
            except (CheckpointError, DataError) as error:
                refused += 1
                message = str(error)
                assert "\n" not in message and path.name in message, message
            except Exception as error:
                keep = os.environ.get("FASTFLOW_MUTATIONS_KEEP")
                if keep:
                    open(f"{keep}/{i}{path.suffix}", "wb").write(path.read_bytes())
                raise AssertionError(f"mutation {i} of {kind}: {type(error).__name__}: {error}") from error
    assert refused > COUNT // 4
