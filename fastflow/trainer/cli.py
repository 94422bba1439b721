"""The command line: ``fastflow``, or ``python -m fastflow``."""

import ctypes
import os
import sys
from collections.abc import Sequence

_EXTRA = {"tyro", "tqdm", "PIL", "sklearn", "matplotlib", "torchvision", "numpy"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; errors that a user can correct are one line on stderr."""
    if argv is None:  # the process runs this command only
        keep_memory()
        argv = sys.argv[1:]
    try:
        from fastflow.checkpoint import CheckpointError
        from fastflow.trainer.captured import CaptureError
        from fastflow.trainer.commands import run_command
        from fastflow.trainer.config import ConfigError
        from fastflow.trainer.data import DataError
        from fastflow.trainer.nonfinite import NonFiniteError
        from fastflow.trainer.ranks import DeviceError, LostRankError
        from fastflow.trainer.train import Interrupted
        from fastflow.validation import SingularError
    except ModuleNotFoundError as error:
        return _missing(error)
    errors_of_a_user = (CheckpointError, ConfigError, DataError, DeviceError)
    errors_of_a_run = (CaptureError, LostRankError, NonFiniteError, SingularError)
    try:
        run_command(list(argv))
        return 0
    except ModuleNotFoundError as error:
        return _missing(error)
    except (*errors_of_a_user, *errors_of_a_run) as error:
        line = (
            str(error).strip().splitlines()[-1]
        )  # a worker process sends its traceback; the error is its last line
        return _fail(line.removeprefix(f"{DataError.__module__}.DataError: "))
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except Interrupted as error:
        if not int(os.environ.get("RANK", 0)):
            print(error)
        return 128 + error.signum
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


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


def _fail(line: str, code: int = 1) -> int:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"error: {rank}{line}", file=sys.stderr)
    return code


def _missing(error: ModuleNotFoundError) -> int:
    if error.name is None or error.name.split(".")[0] not in _EXTRA:
        raise error
    return _fail(f"{error.name} is not installed: pip install fastflow[train]")
