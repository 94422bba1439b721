"""The identity of data: whether a resumed run finds the files with which it started."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastflow.trainer.data.folder import Folder
from fastflow.trainer.data.source import Source

_READ, _FILES = 4096, 64  # bytes at each end of a file; files: reading all of a large folder takes minutes


def identity(name: str, source: Source, whole: bool = False) -> dict[str, str]:
    """Digests of the names and sizes of the files of ``name``, of their times, and of the ends of 64 of them.

    ``whole``: also of all that the files hold. Empty for built-in data.
    """
    path = Path(name)
    files = source.files() if isinstance(source, Folder) else [path] if path.is_file() else []
    if not files:
        return {}
    files = sorted(files)
    status = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    found = {
        "path": str(path.resolve()),
        "sizes": _digest([(name, each.st_size) for name, each in status]),
        "times": _digest([each.st_mtime_ns for _, each in status]),
        "contents": _digest([_ends(file) for file in _some(files)]),
    }
    if whole:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found["whole"] = _digest(list(threads.map(_whole, files)))
    return found


def change(kept: dict[str, str], found: dict[str, str]) -> str | None:
    """What differs from the ``kept`` identity, or None.

    Files at another place, and those whose contents were all compared, may have other times.
    """
    if not kept or kept["sizes"] != found.get("sizes"):
        return "names or sizes" if kept else None
    if kept.get("contents", found["contents"]) != found["contents"]:  # older runs have none
        return "contents"
    if "whole" in kept and "whole" in found:
        return None if kept["whole"] == found["whole"] else "contents"
    moved = kept["path"] != found["path"]
    return None if moved or kept["times"] == found["times"] else "times"


def _some(files: list[Path]) -> list[Path]:
    """At most 64 of the files, evenly."""
    count = min(len(files), _FILES)
    return [files[i * len(files) // count] for i in range(count)]


def _ends(path: Path) -> tuple[bytes, bytes]:
    try:
        with path.open("rb") as file:
            first = file.read(_READ)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _READ))
            return first, file.read(_READ)
    except OSError:  # an error if the file is used, and it may be skipped as damaged
        return b"", b""


def _whole(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return b""


def _digest(values: list) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()
