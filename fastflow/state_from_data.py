"""One rule for all layers: whether a batch may set their state, i.e. initialize them or move their statistics."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Forced(threading.local):
    """Answer of the innermost :func:`state_from_data` block of this thread, None outside."""

    def __init__(self) -> None:
        # an instance attribute of each thread: torch.compile's guards see one that a block would add
        self.allowed: bool | None = None


_forced = _Forced()  # torch.compile traces a threading.local, and no ContextVar (torch 2.14)


def takes_state_from_data(training: bool) -> bool:
    """Whether a layer in this mode (True: training) may set state from the batch that it is called with.

    It may in training mode, if gradients are enabled or a block of :func:`state_from_data` allows it.
    """
    if not training:
        return False
    return torch.is_grad_enabled() if _forced.allowed is None else _forced.allowed


@contextmanager
def state_from_data(allowed: bool) -> Iterator[None]:
    """Allow or forbid state from data within the block, whether gradients are enabled or not.

    Passes in the generating direction forbid it, so that samples do not initialize a model. ``initialize``
    allows it.
    """
    if torch.compiler.is_exporting():  # a graph has no side effects, and no layer to initialize
        yield
        return
    before, _forced.allowed = _forced.allowed, allowed
    try:
        yield
    finally:
        _forced.allowed = before
