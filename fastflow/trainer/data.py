"""Images to train on, as uint8 ``[N, C, H, W]``: two photographs, CIFAR-10, MNIST, a folder, a .npz file.

A source has ``name``, ``image_shape``, ``length`` (training images in an epoch), ``classes`` (None without labels),
``flip`` (whether mirroring is usual for it), ``test`` (uint8 tensor), ``test_labels`` (int64 tensor or None) and
``draw(indices, uniform)``, which gives training images and labels; what is random in an image comes from its three
numbers in [0, 1).  :class:`Batches` makes batches of it, each a pure function of (seed, step), whatever part of it is
asked for: a resumed run needs no loader state, no global generator is touched, and ranks draw what one process would.
"""

import hashlib
import importlib.util
import os
import signal
import socket
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastflow.seeds import Stream, derive

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class DataError(ValueError):
    """Data that cannot be used; the message is one line with what was expected and where."""


def load(name, data_dir="data", image_size=None):
    """The source that ``name`` names: ``photos``, ``cifar10``, ``mnist``, a folder of images or a .npz file.

    ``data_dir`` is where torchvision keeps its data sets; ``image_size`` a side in pixels (None: the usual one).
    Raises DataError, a ValueError of one line.
    """
    if name == "photos":
        return Photos(_only(name, image_size, 32))
    if name == "cifar10":
        _only(name, image_size, 32)
        return _cifar10(data_dir)
    if name == "mnist":
        return _mnist(data_dir, _only(name, image_size, 32, 28))
    path = Path(name)
    if path.suffix == ".npz":
        return _npz(path, image_size)
    if path.is_dir():
        return Folder(path, image_size or 32)
    raise DataError(f"data {name!r}: expected photos, cifar10, mnist, a folder of images or a .npz file")


def _only(name, size, *allowed):
    if size is not None and size not in allowed:
        raise DataError(f"image size {size}: {name} has {' or '.join(map(str, allowed))}")
    return size or allowed[0]


class Photos:
    """32x32 colour crops of the two photographs that scikit-learn ships, china.jpg and flower.jpg, 427x640 each.

    Training crops come from anywhere in columns 0 to 511; the test set is the 104 tiles of the 32x32 grid over
    columns 512 to 639 (rows 0 to 415, the first photograph's first).
    """

    name, classes, test_labels, flip = "photos", None, None, True

    def __init__(self, size=32):
        from PIL import Image

        # Found without importing scikit-learn, which takes longer than to read the photographs.
        spec = importlib.util.find_spec("sklearn")
        if spec is None:
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        folder = Path(spec.submodule_search_locations[0]) / "datasets" / "images"
        photos = []
        for name in ("china.jpg", "flower.jpg"):
            if not (folder / name).is_file():
                raise DataError(f"photos: scikit-learn's {name} is not in {folder}")
            photos.append(np.asarray(Image.open(folder / name).convert("RGB")))
        photos = np.stack(photos).transpose(0, 3, 1, 2)  # [2, 3, 427, 640]
        tiles = photos[:, :, : 427 // size * size, 512:].reshape(2, 3, 427 // size, size, 128 // size, size)
        tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3, size, size)
        self.test = torch.from_numpy(tiles.copy())
        self.image_shape = (3, size, size)
        self.length = (
            2 * (427 // size) * (512 // size)
        )  # an epoch: as many crops as tiles would cover the columns
        self._windows = np.lib.stride_tricks.sliding_window_view(photos[..., :512], (size, size), axis=(2, 3))

    def draw(self, indices, uniform):
        photos, _, rows, columns = self._windows.shape[:4]
        photo, row, column = (uniform * (photos, rows, columns)).astype(np.int64).T
        return torch.from_numpy(self._windows[photo, :, row, column]), None


class Images:
    """Images in memory, of the machine or of a GPU: uint8 arrays ``[N, C, H, W]``, with or without labels."""

    def __init__(self, name, train, test, labels=None, test_labels=None, flip=False):
        self.name, self.flip, self.length = name, flip, len(train)
        self.image_shape = tuple(train.shape[1:])
        self.classes = None if labels is None else int(labels.max()) + 1
        self.test = torch.from_numpy(np.ascontiguousarray(test))
        self.test_labels = None if test_labels is None else torch.from_numpy(test_labels.astype(np.int64))
        self._train = torch.from_numpy(np.ascontiguousarray(train))
        self._labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))

    def to(self, device):
        """Moves the training images to a device, where batches are then made."""
        self._train = self._train.to(device)
        self._labels = None if self._labels is None else self._labels.to(device)
        return self

    @property
    def nbytes(self):
        return self._train.nbytes

    def draw(self, indices, uniform):
        indices = torch.from_numpy(indices).to(self._train.device)
        return self._train[indices], None if self._labels is None else self._labels[indices]


class Folder:
    """A folder of images, resized (shorter side) and cropped in the middle to ``size``, decoded as they are drawn.

    Subfolders that hold images are classes, in alphabetical order; a flat folder has none.  ``train`` and ``test`` (or
    ``val``, ``valid``) subfolders are the split; without them a tenth is held out by the hash of the file's name, so
    that adding files moves none across.
    """

    flip = True

    def __init__(self, path, size):
        path = Path(path)
        self.name, self.image_shape = path.resolve().name, (3, size, size)
        held_out = next((path / n for n in ("test", "val", "valid") if (path / n).is_dir()), None)
        if held_out is not None and (path / "train").is_dir():
            train, test = _images_in(path / "train"), _images_in(held_out)
            roots = (path / "train", held_out)
        else:
            files = _images_in(path)
            keys = [
                int.from_bytes(hashlib.sha256(f.relative_to(path).as_posix().encode()).digest()[:8])
                for f in files
            ]
            chosen = {i for i, key in enumerate(keys) if key % 10 == 0} or {int(np.argmin(keys))}
            train = [f for i, f in enumerate(files) if i not in chosen]
            test = [f for i, f in enumerate(files) if i in chosen]
            roots = (path, path)
            if not train:
                raise DataError(
                    f"{path}: has {len(files)} image, expected at least 2, one of them to test on"
                )
        names = [f.relative_to(roots[0]).parts for f in train]
        self.classes, self._labels, self.test_labels = None, None, None
        if all(len(parts) > 1 for parts in names):
            classes = sorted({parts[0] for parts in names})
            number = {name: i for i, name in enumerate(classes)}
            test = [f for f in test if f.relative_to(roots[1]).parts[0] in number]
            self.classes = len(classes)
            self._labels = torch.tensor([number[parts[0]] for parts in names])
            self.test_labels = torch.tensor([number[f.relative_to(roots[1]).parts[0]] for f in test])
        self._files, self.length = train, len(train)
        self.test = torch.from_numpy(np.stack([_decode(f, size) for f in test]))

    def draw(self, indices, uniform):
        images = np.stack([_decode(self._files[i], self.image_shape[1]) for i in indices])
        return torch.from_numpy(images), None if self._labels is None else self._labels[indices]


def _images_in(path):
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    if not files:
        raise DataError(f"{path}: holds no image ({', '.join(sorted(_SUFFIXES))})")
    return files


def _decode(file, size):
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's own errors are OSErrors, but for damaged PNG chunks
        raise DataError(f"{file}: cannot be read as an image") from error
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def _cifar10(data_dir):
    train, test = _torchvision("CIFAR10", data_dir, "cifar-10-batches-py/data_batch_1 to _5 and test_batch")
    images = [d.data.transpose(0, 3, 1, 2) for d in (train, test)]
    return Images("cifar10", *images, np.array(train.targets), np.array(test.targets), flip=True)


def _mnist(data_dir, size):
    train, test = _torchvision(
        "MNIST", data_dir, "MNIST/raw/train-images-idx3-ubyte.gz and the other three files"
    )
    edge = (size - 28) // 2
    images = [
        np.pad(d.data.numpy()[:, None], ((0, 0), (0, 0), (edge, edge), (edge, edge))) for d in (train, test)
    ]
    return Images("mnist", *images, train.targets.numpy(), test.targets.numpy())


def _torchvision(name, data_dir, expected):
    import torchvision

    kind = getattr(torchvision.datasets, name)
    try:
        return kind(data_dir, train=True), kind(data_dir, train=False)
    except RuntimeError:  # not there, or damaged
        pass
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and a network without a way out would hang here
    try:
        return kind(data_dir, train=True, download=True), kind(data_dir, train=False, download=True)
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name.lower()}: not found and not downloaded ({reason}); expected {Path(data_dir) / expected}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _npz(path, image_size):
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # zipfile's, zlib's, numpy's
        raise DataError(
            f"{path}: cannot be read as .npz ({str(error).strip().splitlines()[0][:120]})"
        ) from error
    if len(arrays) == 1:
        arrays = {"x": next(iter(arrays.values()))}
    x, y = (arrays.get(key, arrays.get(f"{key}_train")) for key in "xy")
    if x is None:
        raise DataError(
            f"{path}: has arrays {', '.join(arrays)}; expected x (images), and y, x_test, y_test at will"
        )
    x, y = _as_images(path, "x", x), _as_labels(path, "y", y, len(x))
    if "x_test" in arrays:
        x_test = _as_images(path, "x_test", arrays["x_test"])
        y_test = _as_labels(path, "y_test", arrays.get("y_test"), len(x_test))
        if x_test.shape[1:] != x.shape[1:]:
            raise DataError(f"{path}: x_test holds {x_test.shape[1:]} (C, H, W), x holds {x.shape[1:]}")
    elif len(x) < 2:
        raise DataError(f"{path}: x holds {len(x)} image, expected at least 2, one of them to test on")
    else:
        held_out = np.arange(len(x)) % 10 == min(9, len(x) - 1)
        x, x_test = x[~held_out], x[held_out]
        y, y_test = (None, None) if y is None else (y[~held_out], y[held_out])
    if image_size is not None and x.shape[2:] != (image_size, image_size):
        raise DataError(f"image size {image_size}: {path} has {x.shape[2]}x{x.shape[3]}")
    if y is not None and y_test is not None and y_test.max() > y.max():
        raise DataError(f"{path}: y_test has the class {y_test.max()}, y none above {y.max()}")
    return Images(path.stem, x, x_test, None if y_test is None else y, y_test)


def _as_images(path, key, x):
    if x.dtype != np.uint8:
        raise DataError(f"{path}: {key} is {x.dtype}, expected uint8")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DataError(
            f"{path}: {key} is {x.shape}, expected [N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3"
        )
    if len(x) == 0:
        raise DataError(f"{path}: {key} is empty")
    return x


def _as_labels(path, key, y, n):
    if y is None:
        return None
    if y.shape != (n,) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise DataError(f"{path}: {key} is {y.dtype} {y.shape}, expected integers from 0 of shape {(n,)}")
    return y


class Batches(Dataset):
    """Training batches of a source: item ``step`` is ``(x, labels)``, a pure function of (seed, step).

    x: uint8 ``[size, C, H, W]``, values in ``[0, 2^n_bits)``; labels: int64 ``[size]``, or None.  Images are taken in
    the order of a permutation drawn anew each epoch; a batch may end one epoch and begin the next.  ``part``: only
    the samples from its first to before its second number, the same ones as in the whole batch.
    """

    def __init__(self, source, size, seed, n_bits=8, flip=None, part=None):
        self.source, self.size, self.seed, self.n_bits = source, size, seed, n_bits
        self.flip = source.flip if flip is None else flip
        self.part = slice(*(part or (0, size)))
        self._epoch, self._order = None, None

    def __getitem__(self, step):
        uniform = np.random.default_rng(derive(self.seed, Stream.BATCH, step)).random((self.size, 4))[
            self.part
        ]
        x, labels = self.source.draw(self._indices(step)[self.part], uniform[:, :3])
        if self.flip:
            mirrored = torch.from_numpy(uniform[:, 3] < 0.5).to(x.device)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return (x >> (8 - self.n_bits)).contiguous(), labels

    def _indices(self, step):
        epochs, places = np.divmod(np.arange(step * self.size, (step + 1) * self.size), self.source.length)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            if epoch != self._epoch:
                rng = np.random.default_rng(derive(self.seed, Stream.PERMUTATION, epoch))
                self._epoch, self._order = epoch, rng.permutation(self.source.length)
            here = epochs == epoch
            indices[here] = self._order[places[here]]
        return indices

    def stream(self, start, stop, workers=None):
        """Iterate over the batches of steps ``start`` to ``stop - 1``, drawn ahead by worker processes into pinned memory.

        ``workers=None``: none for images in memory, up to four for a folder.
        """
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if isinstance(self.source, Folder) else 0
        if not workers:
            return map(self.__getitem__, range(start, stop))
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=range(start, stop),
                num_workers=workers,
                worker_init_fn=_leave_signals,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # or the loader draws from the global one
            )
        )


def _leave_signals(_):
    """Ctrl-C reaches the workers too; only the trainer is to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
