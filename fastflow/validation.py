"""Checks of arguments: shapes, dtypes, devices, and that matrices on the CPU are not singular."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SingularError(ValueError):
    """A triangular matrix has 0, inf or NaN on its diagonal; the message names op, matrix and index."""


def argument_error(argument: str, got: object, expected: str) -> ValueError:
    """The error for an argument, with the message ``argument: got ..., expected ...``."""
    return ValueError(f"{argument}: got {got}, expected {expected}")


def shape_of(t: Tensor) -> str:
    """The shape of t, for messages."""
    return f"shape {list(t.shape)}"


def one_of(argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise argument_error(argument, repr(value), f"one of {', '.join(map(repr, choices))}")


def positive_int(argument: str, value: int | None, optional: bool = False) -> None:
    """Raise ValueError unless ``value`` is a positive integer, or None if ``optional``."""
    if not (value is None and optional) and not (_is_int(value) and value >= 1):
        raise argument_error(argument, repr(value), f"a positive integer{' or None' if optional else ''}")


def positive_ints(**values: int) -> None:
    """Raise ValueError for the first of the named ``values`` that is no positive integer."""
    for argument, value in values.items():
        positive_int(argument, value)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def even_int(argument: str, value: int, why: str) -> None:
    """Raise ValueError unless ``value`` is a positive even integer; ``why`` explains it in the message."""
    if not (_is_int(value) and value >= 1) or value % 2:
        raise argument_error(argument, repr(value), f"an even number{why}")


def number(argument: str, value: float, expected: str, accepts: Callable[[float], bool]) -> None:
    """Raise ValueError unless ``value`` is a real number that ``accepts`` is true for, as ``expected`` states."""
    if isinstance(value, bool) or not isinstance(value, Real) or not accepts(value):
        raise argument_error(argument, repr(value), expected)


def boolean(argument: str, value: bool) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise argument_error(argument, repr(value), "True or False")


def sample_shape(
    argument: str, value: Sequence[int], expected: str = "one or more positive integers"
) -> None:
    """Raise ValueError unless ``value`` is the shape of a sample: a sequence of positive integers."""
    if not isinstance(value, Sequence) or not value or not all(_is_int(n) and n >= 1 for n in value):
        raise argument_error(argument, repr(value), expected)


def floating_point(argument: str, t: Tensor, min_dim: int = 2) -> None:
    """Raise ValueError unless t is floating point with at least ``min_dim`` dimensions."""
    if t.dtype not in FLOATING:
        raise argument_error(
            argument, f"dtype {t.dtype}", "a floating point tensor (float64, float32, bfloat16, float16)"
        )
    if t.ndim < min_dim:
        raise argument_error(argument, shape_of(t), "a batch [N, C, ...]")


def same_shape(argument: str, t: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError unless t has the given shape; ``why`` explains it in the message."""
    if tuple(t.shape) != tuple(shape):
        raise argument_error(argument, shape_of(t), f"{list(shape)} ({why})")


def same_device_and_precision(argument: str, t: Tensor, x_name: str, x: Tensor) -> None:
    """Raise ValueError unless t is on x's device, and both or neither of them are float64.

    Half precision and float32 can be mixed: kernels compute both in float32.
    """
    if t.device != x.device:
        raise argument_error(argument, f"device {t.device}", f"{x.device}, the device of {x_name}")
    double = torch.float64
    if t.dtype not in FLOATING or (t.dtype == double) != (x.dtype == double):
        raise argument_error(argument, f"dtype {t.dtype}", f"{x.dtype}, the dtype of {x_name}")


def channels(argument: str, t: Tensor, count: int, why: str) -> None:
    """Raise ValueError unless t has the shape ``[count]``; ``why`` explains it in the message."""
    if tuple(t.shape) != (count,):
        raise argument_error(argument, shape_of(t), f"[{count}], {why}")


def writable(argument: str, t: Tensor) -> None:
    """Raise ValueError if elements of t share memory, so that it cannot be written in place."""
    if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
        raise argument_error(argument, "an expanded tensor", "one without shared memory, to write in place")


def not_a_leaf(argument: str, t: Tensor) -> None:
    """Raise ValueError if t is a leaf that requires a gradient, or a view of one: autograd forbids a write."""
    base = t if t._base is None else t._base
    if base.is_leaf and base.requires_grad:
        raise argument_error(
            argument, "a leaf that requires a gradient", "a computed tensor, to write in place"
        )


def gradients(x_name: str, x: Tensor, dy: Tensor | None, dlog_det: Tensor | None = None) -> None:
    """Raise ValueError unless dy has the shape of x and dlog_det has the shape ``[N]``.

    None stands for an output without a gradient.
    """
    if dy is not None:
        same_shape("dy", dy, x.shape, f"like {x_name}")
    if dlog_det is not None:
        same_shape("dlog_det", dlog_det, x.shape[:1], "one value per sample")


def diagonal(op: str, d: Tensor) -> None:
    """Raise SingularError if a diagonal of the stack d ``[K, n]`` has 0, inf or NaN; no check on a GPU."""
    if d.device.type != "cpu":
        return
    singular = (d == 0) | ~d.isfinite()
    if singular.any():
        matrix, index = singular.nonzero()[0].tolist()
        got = f"got {d[matrix, index].item():g} at index {index}"
        raise SingularError(f"{op}: diagonal of matrix {matrix}: {got}, expected a finite nonzero number")


def printable(name: object) -> str:
    """``name`` for a message of one line."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in str(name))
