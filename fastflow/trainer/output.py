"""The file that a command writes."""

from collections.abc import Iterable
from pathlib import Path

from fastflow.trainer.config import config_error


def output(out: str | None, name: str, suffixes: Iterable[str]) -> Path:
    """The file ``out``, or ``name`` in the folder ``out`` or here. Raises ConfigError for other suffixes."""
    path = Path(name if out is None else out)
    path = path / name if path.is_dir() else path
    if path.suffix.lower() not in suffixes:
        raise config_error("out", out, f"a folder, or a file {', '.join(suffixes)}")
    return path
