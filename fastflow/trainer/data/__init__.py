"""Images to train on: two photographs, CIFAR-10, MNIST, a folder, a .npz file.

A :class:`Source` holds the images, :class:`Batches` draws batches from it. A batch is a pure function of
(seed, step), so a resumed run needs no loader state, no global generator is used, and ranks draw the same
images as one process.
"""

from pathlib import Path

from fastflow.trainer.data.batches import Batches
from fastflow.trainer.data.folder import Folder
from fastflow.trainer.data.images import Images
from fastflow.trainer.data.npz import load_npz
from fastflow.trainer.data.photos import Photos
from fastflow.trainer.data.source import DataError, Source, set_validation
from fastflow.trainer.data.torchvision_sets import load_cifar10, load_mnist
from fastflow.trainer.data.workers import WorkerError

__all__ = [
    "Batches",
    "DataError",
    "Folder",
    "Images",
    "Photos",
    "Source",
    "WorkerError",
    "load",
    "set_validation",
]


def load(
    name: str,
    data_dir: str = "data",
    image_size: int | None = None,
    channels: int | None = None,
    skip_damaged: bool = False,
) -> Source:
    """Load ``photos``, ``cifar10``, ``mnist``, a folder of images or a .npz file.

    ``data_dir``: folder of torchvision's data sets. ``image_size``: image side in pixels; None: the usual
    one. ``channels``, ``skip_damaged``: of a folder, see :class:`Folder`. Raises DataError, a ValueError of one line.
    """
    if name == "photos":
        return Photos(_size(name, image_size, 32))
    if name == "cifar10":
        _size(name, image_size, 32)
        return load_cifar10(data_dir)
    if name == "mnist":
        return load_mnist(data_dir, _size(name, image_size, 32, 28))
    path = Path(name)
    if path.suffix == ".npz":
        return load_npz(path, image_size)
    if path.is_dir():
        return Folder(path, image_size or 32, channels, skip_damaged)
    raise DataError(f"data: got {name!r}, expected photos, cifar10, mnist, a folder of images or a .npz file")


def _size(name: str, size: int | None, *allowed: int) -> int:
    if size is not None and size not in allowed:
        raise DataError(f"image_size: got {size}, expected {' or '.join(map(str, allowed))} for {name}")
    return size or allowed[0]
