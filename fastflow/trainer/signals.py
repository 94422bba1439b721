"""Signals that stop a run, which is then saved."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = [
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]
# Slurm signals every process of a job, torchrun passes its signal on, and a terminal that is closed sends SIGHUP twice.
REPEATED = 2.0  # seconds


class Interrupted(Exception):
    """A signal stopped the run, which was saved; the message gives the command that continues it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """A list to which signals that stop a run are appended.

    Those within two seconds of the first one are the same request; later ones act as outside the block. After
    Interrupted this also holds outside: the process is about to end, and its sender may repeat itself. A signal that is
    ignored outside stays ignored, such as SIGHUP under nohup.
    """
    received, former, first = [], {}, 0.0

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first > REPEATED:
            signal.signal(signum, former[signum])
            signal.raise_signal(signum)
            return
        first = first if received else time.monotonic()
        received.append(signum)

    def give_back() -> None:
        for signum, kept in former.items():
            signal.signal(signum, kept)

    try:
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                former[signum] = signal.signal(signum, handler)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield received
    except Interrupted:
        raise
    except BaseException:
        give_back()
        raise
    give_back()
