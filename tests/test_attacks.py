"""Files made to harm their reader: each loader of FastFlow refuses each in a line, or loads what is harmless in it.

No code in a file runs, nothing is written, and no file takes more than seconds or a quarter of a gibibyte. The loaders
are all that read files of a user; tests/test_mutated_files.py gives them files that are damaged at random.
"""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch

import fastflow
from fastflow import CheckpointError
from fastflow.models import VectorGlow, load_published
from fastflow.trainer import data
from fastflow.trainer.data import DataError
from fastflow.trainer.data.decode import decode, header
from tests.support.limits import limited

tyro = pytest.importorskip("tyro")

from fastflow.trainer.config import ConfigError  # noqa: E402
from fastflow.trainer.export import Export, export  # noqa: E402
from fastflow.trainer.plot import Plot, plot  # noqa: E402

TEN_GB = 10**10
ROWS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
MARKER = "code_ran"


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def written(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def checkpoint(**changes):
    model = VectorGlow(features=2, steps=1, hidden=4)
    contents = {"format": 1, "fastflow": "0.1.0", "model": "VectorGlow", "config": dict(model.config)}
    return contents | {"state_dict": model.state_dict(), "training": None} | changes


def views():
    """Weights of 9 GB, all views of one number."""
    with torch.device("meta"):
        model = VectorGlow(features=2, steps=1, hidden=33_000)
    state = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in model.state_dict().items()}
    return checkpoint(config=dict(model.config), state_dict=state)


def zipped(name, stored, size, method=zipfile.ZIP_DEFLATED):
    """A zip file with one member whose entry tells another size and method than those with which it was written."""

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            info = zipfile.ZipInfo(name)
            archive.writestr(info, stored)
            info.compress_type, info.file_size = method, size

    return written(write)


def npy(shape, content=bytes(100)):
    about = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(about)) + about + content


def deflated_zeros(size, first=b""):
    """A deflate stream of ``first`` and ``size`` zeros, a thousandth of their size."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = compress.compress(first) + compress.flush(zlib.Z_FULL_FLUSH)
    block = compress.compress(bytes(2**24)) + compress.flush(zlib.Z_FULL_FLUSH)
    return start + block * (size // 2**24) + compress.flush()


def with_member(contents, name):
    """A file of torch.save with one more member."""
    file = io.BytesIO(contents)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, b"x")
    return file.getvalue()


def safetensors(about, content=b"", length=None):
    about = json.dumps(about).encode()
    return struct.pack("<Q", len(about) if length is None else length) + about + content


def png(width, height, *chunks):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in ((b"IHDR", size), *chunks, (b"IEND", b"")))


def saved(contents):
    return written(lambda f: torch.save(contents, f))


def attacks(folder):
    """Name and bytes of each harmful file; ``folder`` is where their code leaves its mark."""
    code, zeros = Code(folder / MARKER), deflated_zeros(TEN_GB, npy((TEN_GB // 4, 1), b""))
    objects = np.empty((5, 2), dtype=object)
    objects[:] = code
    tensor = {"a": {"dtype": "F32", "shape": [TEN_GB // 4], "data_offsets": [0, TEN_GB]}}
    nested = {"__metadata__": {"fastflow": "[" * 10**5}}
    text = b"a\0\0\x78\xda" + deflated_zeros(TEN_GB)
    row = {"format": "1\nfastflow: all is well"}
    return {
        "pickle with code": pickle.dumps(code),
        "checkpoint with code": saved(checkpoint(training=code)),
        "old checkpoint with code": written(
            lambda f: torch.save(checkpoint(training=code), f, _use_new_zipfile_serialization=False)
        ),
        ".npy with code": written(lambda f: np.save(f, objects)),
        ".npz with code": written(lambda f: np.savez(f, x=objects)),
        "zip bomb": zipped("x.npy", zeros, TEN_GB + len(npy((1, 1), b""))),
        "zip entry of 10 GB": zipped("x.npy", ROWS.tobytes(), TEN_GB, zipfile.ZIP_STORED),
        ".npz with an array of 10 GB": zipped("x.npy", npy((TEN_GB // 4, 1)), 200, zipfile.ZIP_STORED),
        ".npz outside": written(lambda f: np.savez(f, **{f"../../{MARKER}": ROWS})),
        "checkpoint outside": with_member(saved(checkpoint()), f"archive/../../{MARKER}"),
        "checkpoint of views": saved(views()),
        "checkpoint with a list": saved(checkpoint(training=["chosen"])),
        "checkpoint with lines": saved(checkpoint(**row)),
        ".npz with lines": written(lambda f: np.savez(f, **{"x": ROWS[0, 0], "a\nb": ROWS})),
        ".npy of 10 GB": npy((TEN_GB // 4, 1)),
        ".npy with a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100),
        ".safetensors with a header of 10 GB": safetensors(tensor, length=TEN_GB),
        ".safetensors with a tensor of 10 GB": safetensors(tensor, bytes(100)),
        ".safetensors with nested JSON": safetensors(nested),
        "nested JSON": b"[" * 10**5,
        "long line": b"a," * 2**25,
        "names with lines": b'"a\nb",c\n' + b"1,x\n" * 9,
        ".png of 100,000 x 100,000": png(10**5, 10**5, (b"IDAT", zlib.compress(bytes(9)))),
        ".png with a text that is a bomb": png(4, 4, (b"zTXt", text), (b"IDAT", zlib.compress(bytes(52)))),
        ".parquet with a footer of 4 GB": b"PAR1" + bytes(100) + b"\xff\xff\xff\xffPAR1",
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The harmful files, one of them 10 GB of zeros that take no space on the disk."""
    folder = tmp_path_factory.mktemp("attacks")
    for i, (name, contents) in enumerate(attacks(folder).items()):
        (folder / str(i)).write_bytes(contents)
        (folder / str(i)).rename(folder / name.replace("/", " "))
    with open(folder / "10 GB of zeros", "wb") as file:
        file.truncate(TEN_GB)
    return folder


def as_table(path):
    for load in (data.load, lambda name: data.read_rows(name, None, None)):
        load(str(path))


def as_image(path):
    header(path)
    decode(path, 8, 3)


def as_cifar10(path):
    torchvision = pytest.importorskip("torchvision")

    def no_network(self):
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
        data.load("cifar10", data_dir=str(path.parents[1]))


def as_mnist(path):
    pytest.importorskip("torchvision")
    data.load("mnist", data_dir=str(path.parents[2]))


def into_a_model(path):
    fastflow.load(path, into=VectorGlow(features=2, steps=1, hidden=4))


def as_result(path):
    fastflow.save(path.with_name("last.pt"), VectorGlow(features=2, steps=1, hidden=4))
    try:
        export(Export(checkpoint=str(path.parent), out=str(path.with_name("exported.pt"))))
    finally:
        for name in ("last.pt", "exported.pt", "exported.md"):
            path.with_name(name).unlink(missing_ok=True)


LOADERS = {
    "model.pt": fastflow.load,
    "model.safetensors": fastflow.load,
    "weights.pt": into_a_model,
    "run/last.pt": lambda path: fastflow.load(path.parent),
    "published.ckpt": load_published,
    "rows.npz": as_table,
    "rows.npy": as_table,
    "rows.csv": as_table,
    "rows.parquet": as_table,
    "image.png": as_image,
    "cifar-10-batches-py/data_batch_1": as_cifar10,
    "MNIST/raw/train-images-idx3-ubyte": as_mnist,
    "run/metrics.csv": lambda path: plot(Plot((str(path.parent),), str(path.with_name("runs.png")))),
    "run/result.json": as_result,
}
HARMLESS = {
    (".npz outside", "rows.npz"),
    ("checkpoint outside", "model.pt"),
    ("checkpoint outside", "weights.pt"),
    ("checkpoint outside", "run/last.pt"),
}


def test_the_code_in_the_files_runs_if_it_is_let(files):
    unsafe = {
        "pickle with code": lambda path: pickle.loads(path.read_bytes()),
        "checkpoint with code": lambda path: torch.load(path, weights_only=False),
        "old checkpoint with code": lambda path: torch.load(path, weights_only=False),
        ".npy with code": lambda path: np.load(path, allow_pickle=True),
        ".npz with code": lambda path: np.load(path, allow_pickle=True)["x"],
    }
    for name, load in unsafe.items():
        load(files / name)
        assert (files / MARKER).exists(), name
        (files / MARKER).unlink()


@pytest.mark.parametrize("loader", LOADERS)
def test_harmful_files_are_refused_in_a_line(loader, files, tmp_path):
    if loader == "rows.parquet":
        pytest.importorskip("pyarrow", reason=".parquet files need pyarrow")
    path = tmp_path / "a" / "b" / loader
    path.parent.mkdir(parents=True)
    folders = [files.parent, tmp_path]
    before = [sorted(folder.rglob("*")) for folder in folders]
    loaded = set()
    for attack in sorted(files.iterdir()):
        os.link(attack, path)
        with limited(10, 2**28):
            try:
                LOADERS[loader](path)
                loaded.add((attack.name, loader))
            except (CheckpointError, ConfigError, DataError) as error:
                message = str(error)
                assert message.isprintable() and str(tmp_path) in message and len(message) < 600, message
            except Exception as error:
                raise AssertionError(f"{attack.name}: {type(error).__name__}: {error}"[:300]) from error
        path.unlink()
    assert loaded == {pair for pair in HARMLESS if pair[1] == loader}
    assert [sorted(folder.rglob("*")) for folder in folders] == before
