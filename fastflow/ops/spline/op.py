"""fastflow::spline, its backward, and its inverse + backward."""

import functools
from typing import Any

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops import columns
from fastflow.ops.registry import register
from fastflow.ops.spline import reference
from fastflow.ops.spline.reference import parameters_per_element

CONVENTIONS = ("fastflow", "nflows", "zuko", "freia")
TAILS = {
    "fastflow": ("linear", "circular", "none"),
    "nflows": ("linear", "circular", "none"),
    "zuko": ("linear", "circular", "none"),
    "freia": ("linear", "affine"),
}
MAX_BINS = 64  # of the kernels


@functools.lru_cache(maxsize=256)  # a layer has one form: its checks would take as long as a small batch
def check_form(
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float
) -> None:
    """Raise ValueError unless the arguments describe a spline."""
    validation.positive_int("bins", bins)
    validation.one_of("convention", convention, CONVENTIONS)
    validation.one_of("tails", tails, TAILS[convention])
    validation.number("bound", bound, "a positive number", lambda v: 0 < v < float("inf"))
    validation.number("factor", factor, "a positive number", lambda v: 0 < v < float("inf"))
    widest = (2 * bound if convention == "freia" else 1) / bins
    # zuko's bins have no smallest size, and those of FrEIA's linear tails neither
    used = convention in ("fastflow", "nflows") or tails == "affine"
    expected = f"a number of at least 0 and less than {widest:g}, for {bins} bins"
    validation.number("min_bin", min_bin, expected, lambda v: 0 <= v and (v < widest or not used))
    validation.number("min_slope", min_slope, "a number between 0 and 1", lambda v: 0 < v < 1)


def _check(
    argument: str,
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    bins: int,
    bound: float,
    tails: str,
    convention: str,
    factor: float,
    min_bin: float,
    min_slope: float,
    dy: Tensor | None = None,
    dlog_det: Tensor | None = None,
) -> None:
    check_form(bins, bound, tails, convention, factor, min_bin, min_slope)
    each = parameters_per_element(bins, tails, convention)
    columns.check(
        argument,
        x,
        params,
        channel_order,
        first_channel,
        each,
        dy,
        dlog_det,
        lambda: f"{bins} bins, {tails} tails",
        may_share=True,
    )


def _in_kernel(*args: Any) -> bool:
    """Whether the kernels have these splines, of the arguments of any of the ops."""
    bins, convention = (args[4], args[7]) if isinstance(args[4], int) else (args[6], args[9])
    return convention != "freia" and bins <= MAX_BINS


kernels = {"triton": True, "compiled": ("cpu",), "eligible": _in_kernel}
register(reference.spline_backward, **kernels)
register(reference.spline_inverse_backward, **kernels, check=_check)
register(
    reference.spline,
    **kernels,
    check=_check,
    outputs="y log_det",
    backward=reference.spline_backward,
    gradients="x params",
    batched="x params",
)


def spline(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None = None,
    *,
    first_channel: int = 0,
    bins: int,
    bound: float = 3.0,
    tails: str = "linear",
    convention: str = "fastflow",
    factor: float = 1.0,
    min_bin: float = 1e-3,
    min_slope: float = 1e-3,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Monotonic rational-quadratic splines of the elements of x, with their log-det.

    Source: Neural Spline Flows, arXiv:1906.04032, eq. 4-8; docs/maths.md has the formulas and the conventions.

    Args:
        x: input; the output y with ``inverse=True``.
        params: raw parameters, the output of a network: for each transformed channel those of its bins' widths, then
            those of their heights, then those of the slopes at the knots. With a first dimension of 1, all samples
            share them.
        channel_order: a permutation of the channels: the T transformed ones, in the order of ``params``, then the
            others, which pass through. None: the transformed ones are neighbors.
        first_channel: the first of the transformed channels, without a ``channel_order``.
        bins: number of bins K.
        bound: the spline maps the interval ``[-bound, bound]`` to itself; with tails ``"none"``, ``[0, 1]``.
        tails: what is outside. ``"linear"``: the identity, with slope 1 at both ends; ``"circular"``: the identity,
            with equal learned slopes at both ends, for angles; ``"none"``: lines with the learned slopes of the ends;
            ``"affine"``: FrEIA's lines.
        convention: ``"fastflow"``: the identity for parameters of 0; ``"nflows"`` (also normflows and glasflow);
            ``"zuko"``; ``"freia"``: how the parameters become bins and slopes, to the libraries' last digits.
        factor: multiplies the raw widths and heights, such as nflows' :math:`1/\sqrt{\text{hidden}}`.
        min_bin: smallest width and height of a bin, as a share of the interval (FrEIA: a length; zuko: not used).
        min_slope: smallest slope (zuko: also the inverse of the largest; FrEIA: not used).
        inverse: compute x from y, and the log-det of that direction.

    Shape: x, y ``[N, C, ...]``; params ``[N, T P, ...]`` or ``[1, T P, ...]`` with P = 3K - 1 for linear, 3K for circular and 3K + 1 for no
    tails (FrEIA: 3K for linear, 3K + 1 for affine); log_det ``[N]``, nats, float32 (float64 for float64 x).

    At a knot, either bin may be taken. NaN stays NaN.
    Raises ValueError for other shapes, dtypes, devices, names or numbers. The values of ``channel_order`` are not
    checked.
    """
    return torch.ops.fastflow.spline.default(
        x,
        params,
        channel_order,
        first_channel,
        bins,
        bound,
        tails,
        convention,
        factor,
        min_bin,
        min_slope,
        inverse,
    )


def spline_inverse_backward(
    y: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    first_channel: int = 0,
    bins: int,
    bound: float = 3.0,
    tails: str = "linear",
    convention: str = "fastflow",
    factor: float = 1.0,
    min_bin: float = 1e-3,
    min_slope: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Input and gradients of :func:`spline` from its output y: ``(x, dx, dparams)``.

    Reversible backprop uses it. Arguments, shapes and errors are as in :func:`spline`; dy has the shape of y,
    dlog_det ``[N]``. dx excludes the gradient that reaches x through the network.
    """
    return torch.ops.fastflow.spline_inverse_backward.default(
        y,
        params,
        channel_order,
        first_channel,
        dy,
        dlog_det,
        bins,
        bound,
        tails,
        convention,
        factor,
        min_bin,
        min_slope,
    )
