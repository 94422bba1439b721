"""A folder of images."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastflow.trainer.data.decode import (
    BACKGROUND,
    DamagedError,
    Header,
    check_background,
    decode,
    header,
    opened,
)
from fastflow.trainer.data.listing import Files, Listing, hashes
from fastflow.trainer.data.source import DataError
from fastflow.validation import printable


class Folder:
    """A folder of images, read by :func:`decode` when they are drawn; :class:`Listing` finds and splits them.

    Args:
        path: the folder.
        size: height and width of the images.
        channels: 3, or 1 to convert all images to gray. None: 1 if all are gray, otherwise 3. At most 100
            training files are looked at; if they are gray, a color image among the others is an error.
        skip_damaged: decode every file once, and leave out those that :func:`decode` cannot read.
        background: color below transparent images, a name or #rrggbb. None: white.
    """

    shape: tuple[int, ...]
    classes: int | None = None
    context_features: int | None = None
    horizontal_flip: bool = True
    test_labels: Tensor | None = None
    validation_labels: Tensor | None = None

    def __init__(
        self,
        path: Path | str,
        size: int,
        channels: int | None = None,
        skip_damaged: bool = False,
        background: str | None = None,
    ) -> None:
        if channels not in (None, 1, 3):
            raise DataError(f"channels: got {channels}, expected 1 or 3 for a folder")
        self._background = BACKGROUND if background is None else background
        check_background(self._background)
        path = Path(path)
        listing = Listing(path)
        parts = listing.train, listing.test, listing.validation
        self._remarks: list[str] = []
        if skip_damaged:
            parts = self._without_damaged(parts, path)
        train, test, validation = parts
        files = [file for file, _ in train]
        headers = _some_headers(files)
        all_gray = all(each.gray for each in headers)
        self._gray_only = channels is None and all_gray
        if channels == 1 and not all_gray:
            self._remarks.append("color converted to gray")
        elif all_gray:
            self._remarks.append(f"all gray: {'three equal channels' if channels == 3 else 'one channel'}")
        if any(each.transparent for each in headers):
            self._remarks.append(f"transparency on {self._background}")
        self._remarks += listing.remarks()
        self.name, self.shape = path.resolve().name, (1 if self._gray_only else channels or 3, size, size)
        self._path, self._files, self.length = path, files, len(train)
        self._all_files = [file for part in parts for file, _ in part]
        self._labels: Tensor | None = None
        self.class_names: list[str] | None = None
        self._classes_found = "no classes"
        labels = [label for _, label in train if label is not None]
        if len(labels) == len(train):
            names = sorted(set(labels))
            number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
            test, validation = (_of_classes(part, number, path) for part in (test, validation))
            self.classes, self.class_names = len(names), names
            listed = ", ".join(map(printable, names[:10])) + (", ..." if len(names) > 10 else "")
            self._classes_found = f"{len(names)} class{'es' if len(names) > 1 else ''} ({listed})"
            self._labels = torch.tensor([number[label] for label in labels])
            self.test_labels = torch.tensor([number[label] for _, label in test])
            if validation:
                self.validation_labels = torch.tensor([number[label] for _, label in validation])
        self.test = self._decoded([file for file, _ in test])
        self.validation = self._decoded([file for file, _ in validation]) if validation else None

    @property
    def notes(self) -> tuple[str, ...]:
        """One line of what was found: classes, images of each split, what was skipped and why."""
        sizes = {"to train on": self.length, "to test on": len(self.test)}
        sizes["for validation"] = 0 if self.validation is None else len(self.validation)
        images = ", ".join(f"{size:,} {use}" for use, size in sizes.items() if size)
        return ("; ".join([f"images: {images}", self._classes_found, *self._remarks]),)

    def number_test_labels_as(self, names: list[str]) -> None:
        """Number the classes of the test images by ``names``. Raises DataError for a class that is none of them."""
        if self.class_names is None or self.test_labels is None:
            raise DataError(
                f"{printable(self._path)}: got no classes, expected {', '.join(map(printable, names))}"
            )
        unknown = [name for name in self.class_names if name not in names]
        if unknown:
            got = f"got class {printable(unknown[0])}"
            raise DataError(f"{printable(self._path)}: {got}, expected {', '.join(map(printable, names))}")
        self.test_labels = torch.tensor([names.index(name) for name in self.class_names])[self.test_labels]

    def files(self) -> list[Path]:
        """The files of all images."""
        return self._all_files

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor | None]:
        images = self._decoded([self._files[i] for i in indices])
        return images, None if self._labels is None else self._labels[indices]

    def hold_out(self, fraction: float, seed: int) -> None:
        """As the test set, by a hash of each file's name, here with the seed."""
        keys = hashes(self._path, self._files, f"{seed}/")
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
        channels, size = self.shape[:2]
        options = size, channels, self._gray_only, self._background
        return torch.from_numpy(np.stack([decode(file, *options) for file in files]))

    def _without_damaged(self, parts: tuple[Files, ...], path: Path) -> tuple[Files, ...]:
        files = [file for part in parts for file, _ in part]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            damaged = {f for f, bad in zip(files, threads.map(_is_damaged, files), strict=True) if bad}
        if damaged:
            names = ", ".join(printable(f.relative_to(path)) for f in sorted(damaged)[:10])
            names += ", ..." if len(damaged) > 10 else ""
            self._remarks.append(f"skipped {len(damaged)} damaged ({names})")
        kept = tuple([each for each in part if each[0] not in damaged] for part in parts)
        if not (kept[0] and kept[1]):
            raise DataError(
                f"{printable(path)}: got {len(damaged)} damaged images, expected others to train and test on"
            )
        return kept


def _some_headers(files: list[Path]) -> list[Header]:
    """The headers of at most 100 files, spread evenly; a damaged file is an error when it is decoded."""
    count, found = min(100, len(files)), []
    for i in range(count):
        with suppress(DamagedError):
            found.append(header(files[i * len(files) // count]))
    return found


def _is_damaged(file: Path) -> bool:
    try:
        with opened(file) as image:
            image.load()
    except DamagedError:
        return True
    return False


def _of_classes(part: Files, number: dict[str | None, int], path: Path) -> Files:
    """The files of a part whose class is trained on."""
    found = [(file, label) for file, label in part if label in number]
    if part and not found:
        file, label = part[0]
        folder = file.relative_to(path).parts[0]
        if folder == label:  # a tenth of the images of all classes is the test set
            got = "got no test image of a trained class"
            raise DataError(f"{printable(path)}: {got}, expected more images in each class")
        raise DataError(
            f"{printable(path / folder)}: got no image of {', '.join(map(str, number))}, the trained classes"
        )
    return found
