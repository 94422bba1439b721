"""The images of a folder: which files, their classes, and the split into training, validation and test images."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastflow.trainer.data.finder import SUFFIXES, Finder, is_hidden
from fastflow.trainer.data.source import DataError
from fastflow.validation import printable

Files = list[tuple[Path, str | None]]

_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
}
_PART = {word: part for part, words in _SPLITS.items() for word in words}


class Listing:
    """Training, test and validation files of a folder, each with the name of its class, or None.

    Subfolders that contain images are classes, unless :func:`split` finds parts among them; without ``test``,
    ``validation`` is the test set. Without both, a tenth of the training files is the test set, chosen by a hash
    of each file's name. A file that links lead to twice is kept once, if possible in the test set.

    Raises DataError for a folder without images, for held-out images without ``train`` or among those of
    training, and for ``train`` next to other folders with images if no images are held out; OSError for a folder
    that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._finder = path, Finder()
        folders = sorted(entry.name for entry in self._visible() if entry.is_dir())
        parts = {part: path / name for part, name in split(path, folders).items()}
        held_out = next((part for part in ("test", "validation") if part in parts), None)
        if held_out is None:
            if parts:
                self._refuse_a_class_as_train(parts["train"], folders)
            self._set_a_tenth(parts.get("train", path))
            return
        if "train" not in parts:
            raise DataError(
                f"{printable(path)}: got {printable(parts[held_out])} without train, expected both"
            )
        own = "validation" in parts and held_out == "test"
        found = (
            self._files_in(parts[held_out]),
            self._files_in(parts["validation"]) if own else [],
            self._trained_in(parts["train"]),
        )
        self.test, self.validation, self.train = self._once(*found)
        if not self.train:
            got = "got no image that is not held out"
            raise DataError(f"{printable(parts['train'])}: {got}, expected others to train on")
        names = {part.name for part in parts.values()}
        others = [entry for entry in self._visible() if entry.name not in names]
        images = sum(entry.is_dir() or Path(entry.name).suffix.lower() in SUFFIXES for entry in others)
        self._finder.skip("not of the split", images)

    def remarks(self) -> list[str]:
        """How many files and folders were skipped, by reason."""
        return self._finder.remarks()

    def _visible(self) -> list[os.DirEntry]:
        with os.scandir(self.path) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]

    def _refuse_a_class_as_train(self, train: Path, folders: list[str]) -> None:
        others = (self.path / name for name in folders if name != train.name)
        other = next((each for each in others if any(Finder().files(each))), None)
        if other is not None:
            got = f"got images in {train.name} and {printable(other.name)}"
            expected = "expected held-out ones in test or val"
            hint = f"--data {printable(train)} takes the images of {train.name} only"
            raise DataError(f"{printable(self.path)}: {got}, {expected}; {hint}")

    def _set_a_tenth(self, folder: Path) -> None:
        (files,) = self._once(self._trained_in(folder))
        keys = hashes(self.path, [file for file, _ in files])
        chosen = {i for i, key in enumerate(keys) if key % 10 == 0} or {int(np.argmin(keys))}
        self.train = [file for i, file in enumerate(files) if i not in chosen]
        self.test, self.validation = [file for i, file in enumerate(files) if i in chosen], []
        if not self.train:
            raise DataError(
                f"{printable(self.path)}: got {len(files)} image, expected at least 2, one of them to test on"
            )

    def _files_in(self, folder: Path) -> Files:
        files = list(self._finder.files(folder))
        if not files:
            skipped = "".join(f"; {remark}" for remark in self.remarks())
            expected = f"expected files {', '.join(sorted(SUFFIXES))}"
            raise DataError(f"{printable(folder)}: got no image, {expected}{skipped}")
        parts = [f.relative_to(folder).parts for f in files]
        found = zip(files, parts, strict=True)
        return sorted((f, p[0] if len(p) > 1 else None) for f, p in found)

    def _trained_in(self, folder: Path) -> Files:
        """The files of a folder. Raises DataError if there is a split below it, as around one more folder."""
        files = self._files_in(folder)
        below = defaultdict(set)
        for each in {file.parent for file, _ in files}:
            while each != folder:
                below[each.parent].add(each.name)
                each = each.parent
        for parent, names in sorted(below.items()):
            parts = split(parent, names)
            hint = f"; --data {printable(parent)} takes this split" if "train" in parts else ""
            held_out = next((name for part, name in parts.items() if part != "train"), None)
            if held_out is not None:
                got = f"got held-out images in {printable(parent / held_out)}"
                raise DataError(f"{printable(self.path)}: {got}, expected none among those to train on{hint}")
        return files

    def _once(self, *parts: Files) -> tuple[Files, ...]:
        """The parts without files that were found before, in an earlier part or the same one."""
        if not self._finder.linked:
            return parts
        root, seen, kept = self.path.resolve(), set(), []
        for part in parts:
            targets = {file: file.resolve() for file, _ in part}
            links = {file for file, target in targets.items() if target != root / file.relative_to(self.path)}
            of_part = [each for each in part if each[0] not in links] + [
                each for each in part if each[0] in links
            ]
            kept.append([])
            for file, label in of_part:
                if targets[file] not in seen:
                    seen.add(targets[file])
                    kept[-1].append((file, label))
            kept[-1].sort()
        self._finder.skip("found twice by links", sum(map(len, parts)) - len(seen))
        return tuple(kept)


def split(parent: Path, names: Iterable[str]) -> dict[str, str]:
    """Names of subfolders by the parts ``train``, ``test`` and ``validation`` of a split.

    A part is a word such as ``Train`` or ``val`` (in any case of letters), or such a word with others around it,
    as in ``seg_train`` and ``val2017``, if there are folders to train on and to hold out with the same others.

    Raises DataError for two folders of one part.
    """
    groups = defaultdict(lambda: defaultdict(list))  # by the words around, and by part
    for name in sorted(names):
        words = re.findall("[a-z]+|[0-9]+", name.lower())
        known = [_PART[word] for word in words if word in _PART]
        if len(known) == 1:
            groups[tuple(word for word in words if word not in _PART)][known[0]].append(name)
    found = defaultdict(list)
    for around, group in groups.items():
        if not around or ("train" in group and len(group) > 1):
            for part, of_part in group.items():
                found[part] += of_part
    for of_part in found.values():
        if len(of_part) > 1:
            got = " and ".join(map(printable, of_part[:2]))
            raise DataError(f"{printable(parent)}: got {got}, expected one folder of them")
    return {part: of_part[0] for part, of_part in found.items()}


def hashes(path: Path, files: list[Path], prefix: str = "") -> list[int]:
    """64-bit hashes of the names of files in the folder ``path``."""
    names = [prefix + f.relative_to(path).as_posix() for f in files]
    return [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) for name in names]
