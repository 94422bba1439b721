"""How an op is registered with torch, and which of its bodies runs."""

import os
from collections.abc import Callable

import torch

BACKENDS = ("auto", "reference")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_backend = _checked(os.environ.get("FASTFLOW_BACKEND", "auto"), "FASTFLOW_BACKEND")


class backend:
    """Chooses the body of every op within a block: ``"reference"`` (plain PyTorch) or ``"auto"`` (the fastest one there is).

    The environment variable ``FASTFLOW_BACKEND`` sets it for a process. It holds for all threads. Raises ValueError for another name.

    Example:
        >>> with fastflow.backend("reference"):
        ...     y, log_det = flow(x)
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")

    def __enter__(self) -> None:
        global _backend
        self.previous, _backend = _backend, self.name

    def __exit__(self, *exc: object) -> None:
        global _backend
        _backend = self.previous


def with_compiled(reference: Callable, compiled: Callable, applies: Callable[..., bool]) -> Callable:
    """The body that calls ``compiled`` where it applies to the arguments and the backend allows it, else ``reference``."""

    def body(*args):
        return compiled(*args) if _backend == "auto" and applies(*args) else reference(*args)

    return body


def register(name: str, signature: str, body: Callable, fake: Callable, function: type[torch.autograd.Function] | None = None) -> None:
    """Defines ``torch.ops.fastflow.NAME``: ``body`` for every device, ``fake`` for tracing, ``function`` under the Autograd key.

    Under the Autograd key the op itself is differentiable: opcheck holds for inputs that require grad, torch.compile sees one node.
    A kernel for one device is a further ``torch.library.impl("fastflow::NAME", "CUDA", body)`` in the op's own file.
    """
    qualified = f"fastflow::{name}"
    torch.library.define(qualified, signature)
    torch.library.impl(qualified, "CompositeExplicitAutograd", body)
    torch.library.register_fake(qualified, fake)
    if function is not None:
        torch.library.impl(qualified, "Autograd", function.apply)
