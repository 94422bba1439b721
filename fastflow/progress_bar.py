"""A progress bar of a call that may take long."""

import importlib.util
import sys
import threading
import time
from typing import Any

DELAY = 2.0  # seconds for which a bar is not shown: short calls stay quiet
_EVERY = 0.5  # seconds between two texts within a step


class ProgressBar:
    """A bar of tqdm, if that is installed, after two seconds, on a terminal or in a notebook.

    Args:
        total: number of steps; None: unknown.
        unit: noun of a step.
        shown: False: no bar.
    """

    def __init__(self, total: int | None, unit: str, shown: bool = True) -> None:
        self._total, self._unit, self._done = total, unit, 0
        self._bar: Any | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._shown = shown and _is_watched() and importlib.util.find_spec("tqdm") is not None
        self._appears, self._next = time.monotonic() + DELAY, 0.0

    def __enter__(self) -> "ProgressBar":
        if self._shown and sys.stderr.isatty():  # a first step may take minutes
            self._timer = threading.Timer(DELAY, self._made)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._shown = False
            if self._bar is not None:
                self._bar.close()

    def step(self, text: str = "") -> None:
        """Count a step; ``text`` is shown after the bar."""
        self._done += 1
        bar = self._made()
        if bar is not None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(self._done - bar.n)

    def note(self, text: str) -> None:
        """Show a text within a step, at most twice a second."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY
        bar = self._made()
        if bar is not None:
            bar.set_postfix_str(text)

    def _made(self) -> Any | None:
        with self._lock:
            if self._bar is None and self._shown and time.monotonic() >= self._appears:
                from tqdm.auto import tqdm

                self._bar = tqdm(total=self._total, unit=self._unit, initial=self._done)
            return self._bar


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
