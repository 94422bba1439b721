"""The folder of a run: a new one or one to continue, which one process at a time may use."""

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from fastflow.trainer.config import Config, ConfigError, config_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK = ".lock"  # a file, because NFS locks only what is opened for writing, which a folder cannot be
_DYING = 1.0  # seconds for which the data-loading processes of a killed run may hold its lock


def with_present_run(config: Config) -> Config:
    """``config`` with its ``out`` as the run to resume, if it asks for that and the run has a checkpoint."""
    if not config.resume_if_present or (config.out is None and config.resume is not None):
        return config
    if config.out is None:
        raise config_error("resume_if_present", True, "a folder as out, which is resumed if it holds a run")
    return replace(config, resume=config.out, out=None) if has_checkpoint(config.out) else config


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder within the block. Raises ConfigError if one is in it.

    The lock ends with the process. File systems without locks, and folders that cannot be written, are left as they
    are.
    """
    try:
        opened = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        until = time.monotonic() + _DYING
        while fcntl is not None:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    error = f"{folder}: got a run that another process trains, expected none"
                    raise ConfigError(error) from None
                time.sleep(0.05)
                continue
            except OSError:
                pass
            break
        yield
    finally:
        os.close(opened)


def new_folder(config: Config, locks: ExitStack) -> Path:
    """Create the folder of a new run, locked until ``locks`` is closed.

    What a run leaves that ended before its first checkpoint is removed. Raises ConfigError if ``out`` holds
    anything else.
    """
    if config.out is None:
        folder = _first_unused(Path(config.data).resolve().stem)
        locks.enter_context(locked(folder))
        return folder
    folder = Path(config.out)
    with suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and _has_no_checkpoint(folder):
        locks.enter_context(locked(folder))
        if _has_no_checkpoint(folder):  # also now: the process before may have written one
            for path in folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
            return folder
    if has_checkpoint(folder):
        raise ConfigError(
            f"out: {folder} exists; --resume {shlex.quote(str(folder))} continues that run, "
            "another --out starts a new one"
        )
    raise config_error("out", f"{folder}, which exists and is no run", "a new or an empty folder")


def has_checkpoint(folder: Path | str) -> bool:
    """Whether the run in a folder can continue."""
    return (Path(folder) / "last.pt").is_file()


def _first_unused(name: str) -> Path:
    n = 1
    while True:
        folder = Path("runs") / f"{name}-{n}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            n += 1


def _has_no_checkpoint(folder: Path) -> bool:
    """Whether a folder is empty, or has only files that a run writes before its first checkpoint."""
    names = (_LOCK, "metrics.csv", "metrics.csv.tmp", "last.pt.tmp")
    return all(
        path.is_file() and (path.name in names or path.name.startswith("events.out.tfevents."))
        for path in folder.iterdir()
    )
