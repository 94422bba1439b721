"""The command line: ``fastflow``, or ``python -m fastflow``."""

import contextlib
import ctypes
import gc
import io
import os
import re
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from fastflow._interrupt import ends_the_command

_EXTRA = {"tyro", "tqdm", "PIL", "sklearn", "matplotlib", "torchvision", "numpy", "safetensors"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; errors that a user can correct are one line on stderr."""
    if argv is not None:
        return _run(argv)
    keep_memory()  # the process runs this command only
    threading.excepthook = _but_disk_errors
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be of no encoding
    code = _run(sys.argv[1:])
    if code:
        _leave(code)
    gc.freeze()  # Python's last garbage collections would pass over torch's modules for a second
    return code


def _leave(code: int) -> NoReturn:
    """End the process at once: other ranks learn of it by its sockets, which Python's exit closes last."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _run(argv: Sequence[str]) -> int:
    if list(argv) == ["info"]:
        return _info()
    try:
        with ends_the_command():
            from fastflow.checkpoint import CheckpointError
            from fastflow.trainer.captured import CaptureError
            from fastflow.trainer.commands import run_command
            from fastflow.trainer.config import ConfigError
            from fastflow.trainer.data import DataError, WorkerError
            from fastflow.trainer.nonfinite import NonFiniteError
            from fastflow.trainer.ranks import DeviceError, LostRankError
            from fastflow.trainer.signals import Interrupted
            from fastflow.validation import SingularError, printable
    except ModuleNotFoundError as error:
        return _missing(error)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    errors_of_a_user = (CheckpointError, ConfigError, DataError, DeviceError)
    errors_of_a_run = (CaptureError, LostRankError, NonFiniteError, SingularError, WorkerError)
    try:
        run_command(list(argv))
        sys.stdout.flush()
        return 0
    except ModuleNotFoundError as error:
        return _missing(error)
    except (*errors_of_a_user, *errors_of_a_run) as error:
        return _fail(printable(str(error).strip()))
    except OSError as error:
        if error.strerror is None:
            raise
        if error.filename is None:  # of print: all other writers name their file
            return _not_printed(error)
        return _fail(f"{printable(error.filename)}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        found = re.search(r"allocate ([\d.]+ \w+)", str(error))
        at = f" for {found[1]} more" if found else ""
        return _fail(f"out of memory{at}: smaller batches, models or numbers of samples need less")
    except Interrupted as error:
        if not int(os.environ.get("RANK", 0)):
            with contextlib.suppress(OSError):  # a closed terminal
                print(error, flush=True)
        return 128 + error.signum
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _info() -> int:
    """The command ``info``, without the packages of the others, since it says what is missing."""
    import fastflow

    try:
        print(fastflow.info(), flush=True)
    except OSError as error:
        return _not_printed(error)
    return 0


def _not_printed(error: OSError) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at Python's exit
    return _fail(f"standard output: {error.strerror}")


def _is_out_of_memory(error: Exception) -> bool:
    # of numpy, of a GPU, of torch and of FastFlow's C++ on a CPU
    texts = (
        "out of memory",
        "can't allocate memory",
        "aoti_torch_empty_strided",
        "Storage size calculation overflowed",
    )
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def keep_memory() -> None:
    """Make glibc keep the memory that tensors free, for later tensors.

    By default glibc returns large blocks to the system at once. The system then zeroes pages again, thousands
    of times per training step: 15 to 24% of the step's time on 2 cores of an AMD EPYC (docs/training.md).
    Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    mallopt(trim_threshold, most)
    mallopt(mmap_threshold, most)


def _but_disk_errors(args: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, unless it is TensorBoard's for a disk, which the trainer then meets too."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _fail(line: str, code: int = 1) -> int:
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"rank {os.environ['RANK']}: " if several and "RANK" in os.environ else ""
    with contextlib.suppress(OSError):  # a closed terminal
        print(f"error: {rank}{line}", file=sys.stderr)
    return code


def _missing(error: ModuleNotFoundError) -> int:
    if error.name is None or error.name.split(".")[0] not in _EXTRA:
        raise error
    return _fail(f"{error.name} is not installed: pip install fastflow-torch[train]")
