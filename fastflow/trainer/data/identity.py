"""The identity of data: whether a resumed run finds the files with which it started."""

import hashlib
from pathlib import Path

from fastflow.trainer.data.folder import Folder
from fastflow.trainer.data.source import Source


def identity(name: str, source: Source) -> dict[str, str]:
    """Digests of the names and sizes of the files of ``name``, and of their times; empty for built-in data."""
    path = Path(name)
    files = source.files() if isinstance(source, Folder) else [path] if path.is_file() else []
    if not files:
        return {}
    status = [(file.relative_to(path).as_posix(), file.stat()) for file in sorted(files)]
    return {
        "path": str(path.resolve()),
        "sizes": _digest([(name, each.st_size) for name, each in status]),
        "times": _digest([each.st_mtime_ns for _, each in status]),
    }


def change(kept: dict[str, str], found: dict[str, str]) -> str | None:
    """What differs from the ``kept`` identity, or None. Files at another place may have other times."""
    if not kept or kept["sizes"] != found.get("sizes"):
        return "names or sizes" if kept else None
    moved = kept["path"] != found["path"]
    return None if moved or kept["times"] == found["times"] else "times"


def _digest(values: list) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()
