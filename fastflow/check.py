"""The checks of arguments: shapes, dtypes and devices; of values only that matrices on the CPU are not singular."""

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SingularError(ValueError):
    """A triangular matrix with 0, inf or NaN on its diagonal; the message names the op, the matrix of the stack and the place."""


def error(argument: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{argument}: got {got}, expected {expected}")


def shape_of(t: Tensor) -> str:
    return f"shape {list(t.shape)}"


def one_of(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise error(argument, repr(value), f"one of {', '.join(map(repr, choices))}")


def count(argument: str, value: int | None, optional: bool = False) -> None:
    if not (value is None and optional) and not (isinstance(value, int) and value >= 1):
        raise error(argument, repr(value), f"a positive integer{' or None' if optional else ''}")


def floating(argument: str, t: Tensor, min_dim: int = 2) -> None:
    if t.dtype not in FLOATING:
        raise error(
            argument, f"dtype {t.dtype}", "a floating point tensor (float64, float32, bfloat16, float16)"
        )
    if t.ndim < min_dim:
        raise error(argument, shape_of(t), "a batch [N, C, ...]")


def same_shape(argument: str, t: Tensor, shape: tuple[int, ...], why: str) -> None:
    if tuple(t.shape) != tuple(shape):
        raise error(argument, shape_of(t), f"{list(shape)} ({why})")


def beside(argument: str, t: Tensor, x_name: str, x: Tensor) -> None:
    """``t`` on x's device, in x's dtype or in one that computes as well: half precision beside float32, float32 beside half precision."""
    if t.device != x.device:
        raise error(argument, f"device {t.device}", f"{x.device}, where {x_name} is")
    double = torch.float64
    if t.dtype not in FLOATING or (t.dtype == double) != (x.dtype == double):
        raise error(argument, f"dtype {t.dtype}", f"{x.dtype}, the dtype of {x_name}")


def channels(argument: str, t: Tensor, count: int, why: str) -> None:
    if tuple(t.shape) != (count,):
        raise error(argument, shape_of(t), f"[{count}], {why}")


def gradients(x_name: str, x: Tensor, dy: Tensor | None, dlog_det: Tensor | None = None) -> None:
    """Gradients of an op's output, which has the shape of ``x``, and of its log-det; None if the op takes none."""
    if dy is not None:
        same_shape("dy", dy, x.shape, f"like {x_name}")
    if dlog_det is not None:
        same_shape("dlog_det", dlog_det, x.shape[:1], "one value for each sample")


def diagonal(op: str, d: Tensor) -> None:
    """Finite numbers other than 0 on the diagonals ``[K, n]`` of a stack, where the host can look without waiting for a device."""
    if d.device.type != "cpu":
        return
    singular = (d == 0) | ~d.isfinite()
    if singular.any():
        matrix, place = singular.nonzero()[0].tolist()
        found = f"{d[matrix, place].item():g} at place {place} of its diagonal"
        raise SingularError(
            f"{op}: matrix {matrix} of the stack has {found}, expected a finite number other than 0"
        )
