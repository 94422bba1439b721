"""Ctrl-C while the command line imports torch, which takes seconds."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def ends_the_command() -> Iterator[None]:
    """Let Ctrl-C end ``fastflow`` and ``python -m fastflow`` with one line and exit code 130 within the block.

    A KeyboardInterrupt would be raised somewhere in torch's modules: a traceback, or an error that their code
    catches. Other programs that import FastFlow are left as they are, and so is an ignored signal.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # others may set no handler
    unchanged = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not (_is_the_command() and in_main_thread and unchanged):
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_the_command() -> bool:
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # the package of a module is imported before its path is known
        return sys.orig_argv[-len(sys.argv) :][:1] in (["fastflow"], ["-mfastflow"])
    path = Path(program)
    return path.stem == "fastflow" or path.parts[-2:] == ("fastflow", "__main__.py")


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(128 + signum)
