"""The folder of a run: a new one or one to continue, which one process at a time may use."""

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from fastflow.trainer.config import Config, ConfigError, config_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def with_present_run(config: Config) -> Config:
    """``config`` with its ``out`` as the run to resume, if it asks for that and the run has a checkpoint."""
    if not config.resume_if_present or (config.out is None and config.resume is not None):
        return config
    if config.out is None:
        raise config_error("resume_if_present", True, "a folder as out, which is resumed if it holds a run")
    present = (Path(config.out) / "last.pt").is_file()
    return replace(config, resume=config.out, out=None) if present else config


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder within the block. Raises ConfigError if one is in it.

    The lock ends with the process. File systems without locks are left as they are.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{folder}: got a run that another process trains, expected none") from None
            except OSError:
                pass
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
    if folder.is_dir():
        locks.enter_context(locked(folder))
        contents = list(folder.iterdir())
        if all(map(_before_first_checkpoint, contents)):
            for path in contents:
                path.unlink()
            return folder
    raise ConfigError(
        f"out: {folder} exists; --resume {shlex.quote(str(folder))} continues that run, "
        "another --out starts a new one"
    )


def _first_unused(name: str) -> Path:
    n = 1
    while True:
        folder = Path("runs") / f"{name}-{n}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            n += 1


def _before_first_checkpoint(path: Path) -> bool:
    """Whether a run writes this file before its first checkpoint."""
    events = path.name.startswith("events.out.tfevents.")
    return path.is_file() and (events or path.name in ("metrics.csv", "metrics.csv.tmp", "last.pt.tmp"))
