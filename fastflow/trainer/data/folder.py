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
    Subfolders ``train``, ``test`` and ``val`` (or ``valid``, ``validation``) are the split; without ``test``,
    ``val`` is the test set. Without ``train`` and one of these a tenth of the files is the test set. It
    is chosen by a hash of each file's name, so that adding files moves no file from one set to the other.
    """

    horizontal_flip = True

    def __init__(self, path: Path | str, size: int) -> None:
        path = Path(path)
        self.name, self.image_shape = path.resolve().name, (3, size, size)
        train, test, validation = _split(path)
        self._path, self._files, self.length = path, [file for file, _ in train], len(train)
        self.classes, self._labels, self.test_labels, self.validation_labels = None, None, None, None
        if all(label is not None for _, label in train):
            names = sorted({label for _, label in train})
            number = {name: i for i, name in enumerate(names)}
            test, validation = (_of_classes(part, number, path) for part in (test, validation))
            self.classes = len(names)
            self._labels = torch.tensor([number[label] for _, label in train])
            self.test_labels = torch.tensor([number[label] for _, label in test])
            if validation:
                self.validation_labels = torch.tensor([number[label] for _, label in validation])
        self.test = self._decoded([file for file, _ in test])
        self.validation = self._decoded([file for file, _ in validation]) if validation else None

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor | None]:
        images = self._decoded([self._files[i] for i in indices])
        return images, None if self._labels is None else self._labels[indices]

    def hold_out(self, fraction: float, seed: int) -> None:
        """As the test set, by a hash of each file's name, here with the seed."""
        keys = _hashes(self._path, self._files, f"{seed}/")
        chosen = {i for i, key in enumerate(keys) if key < fraction * 2**64} or {int(np.argmin(keys))}
        kept = [i for i in range(self.length) if i not in chosen]
        if not kept:
            got = f"got {fraction} of {self.length} images"
            raise DataError(f"validation: {got}, expected some left to train on")
        order = sorted(chosen, key=keys.__getitem__)  # not by class: evaluations may take the first ones only
        self.validation = self._decoded([self._files[i] for i in order])
        self._files, self.length = [self._files[i] for i in kept], len(kept)
        if self._labels is not None:
            self.validation_labels, self._labels = self._labels[order], self._labels[kept]

    def _decoded(self, files: list[Path]) -> Tensor:
        return torch.from_numpy(np.stack([_decode(file, self.image_shape[1]) for file in files]))


_Files = list[tuple[Path, str | None]]


def _split(path: Path) -> tuple[_Files, _Files, _Files]:
    """Training, test and validation files, each with the name of its class (its first subfolder), or None."""
    validation = next((path / n for n in ("val", "valid", "validation") if (path / n).is_dir()), None)
    held_out = path / "test" if (path / "test").is_dir() else validation
    if held_out is not None and (path / "train").is_dir():
        own = [] if validation in (None, held_out) else _files_in(validation)
        return _files_in(path / "train"), _files_in(held_out), own
    files = _files_in(path)
    keys = _hashes(path, [f for f, _ in files])
    chosen = {i for i, key in enumerate(keys) if key % 10 == 0} or {int(np.argmin(keys))}
    train = [f for i, f in enumerate(files) if i not in chosen]
    if not train:
        raise DataError(f"{path}: got {len(files)} image, expected at least 2, one of them to test on")
    return train, [f for i, f in enumerate(files) if i in chosen], []


def _of_classes(part: _Files, number: dict[str | None, int], path: Path) -> _Files:
    """The files of a part whose class is trained on."""
    found = [(file, label) for file, label in part if label in number]
    if part and not found:
        folder = part[0][0].relative_to(path).parts[0]
        raise DataError(
            f"{path / folder}: got no image of {', '.join(map(str, number))}, the trained classes"
        )
    return found


def _hashes(path: Path, files: list[Path], prefix: str = "") -> list[int]:
    """64-bit hashes of the names of files in the folder ``path``."""
    names = [prefix + f.relative_to(path).as_posix() for f in files]
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in names]


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
