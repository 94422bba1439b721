"""CIFAR-10 and MNIST, through torchvision."""

import socket
from pathlib import Path

import numpy as np

from fastflow.trainer.data.images import Images
from fastflow.trainer.data.source import DataError

_LARGEST = 2**30  # bytes of a file; those of the two data sets have at most 47 MB


def load_cifar10(data_dir: str) -> Images:
    """CIFAR-10, which is downloaded to ``data_dir`` if it is not there. Raises DataError if that fails."""
    for file in (Path(data_dir) / "cifar-10-batches-py").glob("*_batch*"):
        _refuse_large(file)
    train, test = _load("CIFAR10", data_dir, "cifar-10-batches-py/data_batch_1 to _5 and test_batch")
    x, x_test = (d.data.transpose(0, 3, 1, 2) for d in (train, test))
    labels, test_labels = np.array(train.targets), np.array(test.targets)
    return Images("cifar10", x, x_test, labels, test_labels, horizontal_flip=True)


def load_mnist(data_dir: str, size: int) -> Images:
    """MNIST, zero-padded from 28x28 to ``size``, downloaded as by :func:`load_cifar10`.

    Raises DataError with the name of a damaged file.
    """
    _check_mnist(Path(data_dir) / "MNIST/raw")
    train, test = _load("MNIST", data_dir, "MNIST/raw/train-images-idx3-ubyte.gz and the other three files")
    edge = (size - 28) // 2
    x, x_test = (
        np.pad(d.data.numpy()[:, None], ((0, 0), (0, 0), (edge, edge), (edge, edge))) for d in (train, test)
    )
    return Images("mnist", x, x_test, train.targets.numpy(), test.targets.numpy())


def _check_mnist(folder: Path) -> None:
    """Raise DataError for a file that is there but cannot be used; torchvision looks at names only."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    for part in ("train", "t10k"):
        images, labels = (folder / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
        shapes = []
        for file, read in ((images, read_image_file), (labels, read_label_file)):
            if file.exists():
                _refuse_large(file)
                try:
                    shapes.append((file, tuple(read(str(file)).shape)))
                except Exception as error:  # of many kinds, from the reading of bytes
                    hint = "without it, it is downloaded again"
                    raise DataError(f"{file}: cannot be read as a file of MNIST; {hint}") from error
        if len(shapes) == 2:
            (file, shape), (other, labelled) = shapes
            if shape[1:] != (28, 28):
                raise DataError(f"{file}: got images {shape[1:]}, expected (28, 28)")
            if shape[:1] != labelled:
                raise DataError(f"{other}: got {labelled[0]} labels, expected {shape[0]}, one for each image")


def _refuse_large(file: Path) -> None:
    if file.stat().st_size > _LARGEST:
        raise DataError(f"{file}: got {file.stat().st_size:,} bytes, expected at most {_LARGEST:,}")


def _load(name: str, data_dir: str, expected: str) -> tuple:
    import torchvision

    kind = getattr(torchvision.datasets, name)
    try:
        return kind(data_dir, train=True), kind(data_dir, train=False)
    except Exception:  # absent or damaged: of many kinds, from the reading of bytes
        pass
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets no timeout, so a blocked network would hang here
    try:
        return kind(data_dir, train=True, download=True), kind(data_dir, train=False, download=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name.lower()}: not found, or damaged, and not downloaded ({reason}); expected {Path(data_dir) / expected}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
