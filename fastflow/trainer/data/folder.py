"""A folder of images."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastflow.trainer.data.source import DataError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Folder:
    """A folder of images: the shorter side is resized to ``size`` and the center is cropped.

    Files are decoded when they are drawn.
    Subfolders that contain images are classes, in alphabetical order; a flat folder has no classes.
    Subfolders ``train`` and ``test`` (or ``val``, ``valid``) are the split. Without them a tenth of the files
    is the test set. It is chosen by a hash of each file's name, so that adding files moves no file from one
    set to the other.
    """

    horizontal_flip = True

    def __init__(self, path: Path | str, size: int) -> None:
        path = Path(path)
        self.name, self.image_shape = path.resolve().name, (3, size, size)
        train, test = _split(path)
        self._files, self.length = [file for file, _ in train], len(train)
        self.classes, self._labels, self.test_labels = None, None, None
        if all(label is not None for _, label in train):
            names = sorted({label for _, label in train})
            number = {name: i for i, name in enumerate(names)}
            test = [(file, label) for file, label in test if label in number]
            self.classes = len(names)
            self._labels = torch.tensor([number[label] for _, label in train])
            self.test_labels = torch.tensor([number[label] for _, label in test])
        self.test = torch.from_numpy(np.stack([_decode(file, size) for file, _ in test]))

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor | None]:
        images = np.stack([_decode(self._files[i], self.image_shape[1]) for i in indices])
        return torch.from_numpy(images), None if self._labels is None else self._labels[indices]


def _split(path: Path) -> tuple[list[tuple[Path, str | None]], list[tuple[Path, str | None]]]:
    """Training and test files, each with the name of its class (its first subfolder), or None."""
    held_out = next((path / n for n in ("test", "val", "valid") if (path / n).is_dir()), None)
    if held_out is not None and (path / "train").is_dir():
        return _files_in(path / "train"), _files_in(held_out)
    files = _files_in(path)
    hashes = [hashlib.sha256(f.relative_to(path).as_posix().encode()).digest()[:8] for f, _ in files]
    keys = [int.from_bytes(h) for h in hashes]
    chosen = {i for i, key in enumerate(keys) if key % 10 == 0} or {int(np.argmin(keys))}
    train = [f for i, f in enumerate(files) if i not in chosen]
    if not train:
        raise DataError(f"{path}: got {len(files)} image, expected at least 2, one of them to test on")
    return train, [f for i, f in enumerate(files) if i in chosen]


def _files_in(path: Path) -> list[tuple[Path, str | None]]:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    if not files:
        raise DataError(f"{path}: got no image, expected files {', '.join(sorted(_SUFFIXES))}")
    parts = [f.relative_to(path).parts for f in files]
    return [(f, p[0] if len(p) > 1 else None) for f, p in zip(files, parts, strict=True)]


def _decode(file: Path, size: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for damaged PNG chunks
        raise DataError(f"{file}: cannot be read as an image") from error
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)
