"""Limits of time and memory of a block, as loaders of files from strangers must keep them."""

import contextlib
import re
import resource
import signal
from pathlib import Path


class TooLong(BaseException):
    """A block took too long. No Exception, which a loader would take for a damaged file."""


@contextlib.contextmanager
def limited(seconds: int, size: int):
    """Raises TooLong after some seconds, and fails if the process grows by more than ``size`` bytes."""

    def stop(*_):
        raise TooLong(f"more than {seconds} s")

    before = _most_resident(new=True)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    grown = _most_resident() - before
    assert grown < size, f"{grown / 2**20:.0f} MiB, expected less than {size / 2**20:.0f}"


def _most_resident(new: bool = False) -> int:
    """Peak resident bytes of this process, on Linux from now on if ``new``."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if new:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
