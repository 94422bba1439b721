"""The images of a folder: which files, their classes, and the split into training, validation and test images."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from fastflow.trainer.data.decode import printable
from fastflow.trainer.data.source import DataError

Files = list[tuple[Path, str | None]]

_SUFFIXES = set(".png .jpg .jpeg .jfif .webp .avif .bmp .gif .tif .tiff .ppm .pgm".split())
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}


class Listing:
    """Training, test and validation files of a folder, each with the name of its class, or None.

    Subfolders that contain images are classes. Subfolders ``train``, ``test`` and ``val`` (or ``training``,
    ``testing``, ``valid``, ``validation``; in any case of letters) are the split; without ``test``, ``val`` is
    the test set. Without both, a tenth of the training files is the test set, chosen by a hash of each file's
    name. Linked folders are followed. Hidden files and folders (``.name``), ``__MACOSX``, broken links and links
    to a folder around them are skipped; ``skipped`` counts them by reason.

    Raises DataError for a folder without images and for a split without ``train``, OSError for a folder that
    cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.skipped = path, Counter()
        parts = self._parts()
        if set(parts) & {"test", "validation"}:
            if "train" not in parts:
                raise DataError(
                    f"{printable(path)}: got {printable(next(iter(parts.values())))} without train, expected both"
                )
            held_out = "test" if "test" in parts else "validation"
            self.train, self.test = self._files_in(parts["train"]), self._files_in(parts[held_out])
            own = "validation" in parts and held_out == "test"
            self.validation = self._files_in(parts["validation"]) if own else []
            return
        files, self.validation = self._files_in(parts.get("train", path)), []
        keys = hashes(path, [f for f, _ in files])
        chosen = {i for i, key in enumerate(keys) if key % 10 == 0} or {int(np.argmin(keys))}
        self.train = [f for i, f in enumerate(files) if i not in chosen]
        self.test = [f for i, f in enumerate(files) if i in chosen]
        if not self.train:
            raise DataError(
                f"{printable(path)}: got {len(files)} image, expected at least 2, one of them to test on"
            )

    def _parts(self) -> dict[str, Path]:
        """The subfolders of the split."""
        found: dict[str, Path] = {}
        for folder in sorted(self.path.iterdir()):
            for part, names in _SPLITS.items():
                if folder.name.lower() in names and folder.is_dir():
                    if part in found:
                        got = f"{found[part].name} and {folder.name}"
                        raise DataError(f"{printable(self.path)}: got {got}, expected one folder of them")
                    found[part] = folder
        return found

    def _files_in(self, folder: Path) -> Files:
        files: list[Path] = []
        self._walk(folder, files, [])
        if not files:
            raise DataError(
                f"{printable(folder)}: got no image, expected files {', '.join(sorted(_SUFFIXES))}"
            )
        parts = [f.relative_to(folder).parts for f in files]
        found = zip(files, parts, strict=True)
        return sorted((f, p[0] if len(p) > 1 else None) for f, p in found)

    def _walk(self, folder: Path, files: list[Path], around: list[tuple[int, int]]) -> None:
        status = folder.stat()
        identity = status.st_dev, status.st_ino
        if identity in around:
            self.skipped["links in a circle"] += 1
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                path, hidden = folder / entry.name, entry.name.startswith(".") or entry.name == "__MACOSX"
                if hidden:
                    self.skipped["hidden"] += 1
                elif entry.is_symlink() and not _exists(path):
                    self.skipped["broken links"] += 1
                elif entry.is_dir():
                    self._walk(path, files, [*around, identity])
                elif path.suffix.lower() in _SUFFIXES and entry.is_file():
                    files.append(path)
                else:
                    self.skipped["not named as images"] += 1


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def hashes(path: Path, files: list[Path], prefix: str = "") -> list[int]:
    """64-bit hashes of the names of files in the folder ``path``."""
    names = [prefix + f.relative_to(path).as_posix() for f in files]
    return [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) for name in names]
