"""Data to train on: two photographs, CIFAR-10, MNIST, a folder, a .npz file, a table.

A :class:`Source` holds the samples, :class:`Batches` draws batches from it. A batch is a pure function of
(seed, step), so a resumed run needs no loader state, no global generator is used, and ranks draw the same
samples as one process.
"""

from pathlib import Path

import numpy as np
import torch

from fastflow.trainer.data.batches import Batches, drop_bits
from fastflow.trainer.data.folder import Folder
from fastflow.trainer.data.identity import change, identity
from fastflow.trainer.data.images import Images
from fastflow.trainer.data.memory import InMemory
from fastflow.trainer.data.npz import images_of, read_npz
from fastflow.trainer.data.photos import Photos
from fastflow.trainer.data.source import DataError, Source, set_validation
from fastflow.trainer.data.table import (
    SUFFIXES,
    Columns,
    Names,
    Table,
    is_table,
    load_table,
    read_table,
    rows_as_tensors,
    write_table,
)
from fastflow.trainer.data.torchvision_sets import load_cifar10, load_mnist
from fastflow.trainer.data.workers import WorkerError

__all__ = [
    "Batches",
    "Columns",
    "DataError",
    "Folder",
    "Images",
    "InMemory",
    "Photos",
    "Source",
    "Table",
    "WorkerError",
    "change",
    "drop_bits",
    "identity",
    "load",
    "read_rows",
    "rows_as_tensors",
    "set_validation",
    "write_table",
]

_EXPECTED = "photos, cifar10, mnist, a folder of images, a .npz file or a table (.csv, .npy, .parquet)"


def load(
    name: str,
    data_dir: str = "data",
    image_size: int | None = None,
    channels: int | None = None,
    skip_damaged: bool = False,
    background: str | None = None,
    columns: Names = None,
    context: Names = None,
    dtype: torch.dtype = torch.float32,
) -> Source:
    """Load ``photos``, ``cifar10``, ``mnist``, a folder of images, a .npz file or a table.

    ``data_dir``: folder of torchvision's data sets. ``image_size``: image side in pixels; None: the usual
    one. ``channels``, ``skip_damaged``, ``background``: of a folder, see :class:`Folder`. ``columns``,
    ``context``, ``dtype``: of a table. Raises DataError, a ValueError of one line.
    """
    path = Path(name)
    arrays = read_npz(path) if path.suffix.lower() == ".npz" else None
    if path.suffix.lower() in SUFFIXES or (arrays and is_table(arrays)):
        images_only = {"image_size": image_size, "channels": channels}
        for option, given in images_only.items():
            if given is not None:
                raise DataError(f"{option}: got {given}, expected none for a table")
        return load_table(path, columns, context, dtype, arrays)
    for option, given in (("columns", columns), ("context", context)):
        if given is not None:
            raise DataError(f"{option}: got {given}, expected none for {name}, which is no table")
    if name in ("photos", "cifar10", "mnist"):
        source = _built_in(name, data_dir, image_size)
        if path.is_dir():
            source.notes = (f"data: {name} is built in; the folder of this name is ./{name}",)
        return source
    if arrays is not None:
        return images_of(path, arrays, image_size)
    if name and path.is_dir():
        return Folder(path, image_size or 32, channels, skip_damaged, background)
    raise DataError(f"data: got {name!r}, expected {_EXPECTED}")


def _built_in(name: str, data_dir: str, image_size: int | None) -> Photos | Images:
    if name == "photos":
        return Photos(_size(name, image_size, 32))
    if name == "cifar10":
        _size(name, image_size, 32)
        return load_cifar10(data_dir)
    return load_mnist(data_dir, _size(name, image_size, 32, 28))


def read_rows(name: str, columns: Names, context: Names, option: str = "data") -> tuple[Columns, np.ndarray]:
    """The chosen columns of a table and its rows with them, float64; of a .npz file x_test if there is one.

    ``option``: that gave ``name``, for messages.
    """
    path = Path(name)
    arrays = read_npz(path) if path.suffix.lower() == ".npz" else None
    if path.suffix.lower() not in SUFFIXES and not (arrays and is_table(arrays)):
        raise DataError(f"{option}: got {name!r}, expected a table (.csv, .npy, .npz, .parquet)")
    names, parts = read_table(path, columns, context, arrays)
    return names, parts.get("x_test", parts["x"])


def _size(name: str, size: int | None, *allowed: int) -> int:
    if size is not None and size not in allowed:
        raise DataError(f"image_size: got {size}, expected {' or '.join(map(str, allowed))} for {name}")
    return size or allowed[0]
