"""The image files below a folder, and what is skipped."""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastflow.validation import printable

SUFFIXES = set(".png .jpg .jpeg .jfif .webp .avif .bmp .gif .tif .tiff .ppm .pgm".split())
_HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # of archives, network storage and Windows


class Finder:
    """Finds image files by their suffixes, and counts by reason what it skips.

    Links are followed; ``linked``: whether there was one, so that a file may be found twice.
    """

    def __init__(self) -> None:
        self.linked, self._skipped, self._suffixes = False, Counter(), Counter()

    def files(self, folder: Path) -> Iterator[Path]:
        """The image files in a folder and below it. Raises OSError for a folder that cannot be read."""
        self.linked = self.linked or folder.is_symlink()
        yield from self._walk(folder, [])

    def remarks(self) -> list[str]:
        """How many files and folders were skipped, by reason."""
        found = [f"skipped {count} {reason}" for reason, count in sorted(self._skipped.items())]
        if self._suffixes:
            most = sorted(self._suffixes, key=lambda suffix: (-self._suffixes[suffix], suffix))
            names = [printable(suffix) or "no suffix" for suffix in most[:5]] + ["..."] * (len(most) > 5)
            found.append(f"skipped {self._suffixes.total()} not named as images ({', '.join(names)})")
        return found

    def skip(self, reason: str, count: int = 1) -> None:
        """Count what is skipped."""
        if count:
            self._skipped[reason] += count

    def _walk(self, folder: Path, around: list[tuple[int, int]]) -> Iterator[Path]:
        status = folder.stat()
        identity = status.st_dev, status.st_ino
        if identity in around:
            self.skip("links in a circle")
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if is_hidden(entry.name):
                    self.skip("hidden")
                elif entry.is_symlink() and not _exists(path):
                    self.skip("broken links")
                elif entry.is_dir():
                    self.linked = self.linked or entry.is_symlink()
                    yield from self._walk(path, [*around, identity])
                elif path.suffix.lower() in SUFFIXES and entry.is_file():
                    self.linked = self.linked or entry.is_symlink()
                    yield path
                else:
                    self._suffixes[path.suffix.lower()] += 1


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images."""
    return name.startswith(".") or name in _HIDDEN


def _exists(path: Path) -> bool:
    """Whether a link leads to something. Raises OSError if that cannot be read."""
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True
