"""fastflow::affine_coupling, its backward, and its inverse + backward."""

import torch
from torch import Tensor

from fastflow import check
from fastflow.ops.affine_coupling import reference
from fastflow.ops.registry import register

MASKS = ("halves", "checkerboard")
SCALES = ("exp", "sigmoid", "soft_clamp", "tanh", "none")
ORDERS = ("scale_first", "shift_first")
H_ORDERS = ("shift_scale", "scale_shift", "interleaved")
WITH_FACTOR = ("soft_clamp", "tanh")


def _check(
    argument: str,
    x: Tensor,
    h: Tensor,
    factor: Tensor | None,
    mask: str,
    scale: str,
    order: str,
    h_order: str,
    dy: Tensor | None = None,
    dlog_det: Tensor | None = None,
) -> None:
    check.one_of("mask", mask, MASKS)
    check.one_of("scale", scale, SCALES)
    check.one_of("order", order, ORDERS)
    check.one_of("h_order", h_order, H_ORDERS)
    check.floating_point(argument, x)
    c = x.shape[1]
    if mask == "halves" and c % 2:
        raise check.argument_error(
            argument, check.shape_of(x), "an even number of channels, to split into halves"
        )
    check.same_device_and_precision("h", h, argument, x)
    transformed = c // 2 if mask == "halves" else c
    check.same_shape(
        "h",
        h,
        (x.shape[0], transformed if scale == "none" else 2 * transformed, *x.shape[2:]),
        f"{argument} is {list(x.shape)}, {mask}, {'shift' if scale == 'none' else 'shift and scale'} of {transformed} channels",
    )
    if (factor is not None) != (scale in WITH_FACTOR):
        raise check.argument_error(
            "factor",
            "None" if factor is None else "a tensor",
            f"one for {' and '.join(WITH_FACTOR)} only, scale is {scale!r}",
        )
    if factor is not None:
        check.same_device_and_precision("factor", factor, argument, x)
        check.channels("factor", factor, transformed, "one for each transformed channel")
    check.gradients(argument, x, dy, dlog_det)


kernels = {"triton": True, "compiled": ("cpu",)}
register(reference.affine_coupling_backward, **kernels)
register(reference.affine_coupling_inverse_backward, **kernels, check=_check)
register(
    reference.affine_coupling,
    **kernels,
    check=_check,
    outputs="y log_det",
    backward=reference.affine_coupling_backward,
    gradients="x h factor",
)


def affine_coupling(
    x: Tensor,
    h: Tensor,
    factor: Tensor | None = None,
    *,
    mask: str = "halves",
    flip: bool = False,
    scale: str = "exp",
    order: str = "scale_first",
    h_order: str = "shift_scale",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Affine coupling :math:`y_a = x_a,\; y_b = s(h) x_b + t(h)` with its log-det (RealNVP, arXiv:1605.08803, eq. 7-8).

    Args:
        x: input; the output y with ``inverse=True``.
        h: raw output of the coupling network for :math:`x_a`: shift and raw scale along the channels.
        factor: :math:`f > 0` of the scale functions that have one, a value for each transformed channel.
        mask: ``"halves"``: the first half of the channels passes through; ``"checkerboard"``: the positions with odd
            :math:`i + j` do, and ``h`` is for all channels and positions.
        flip: the other half, the other parity.
        scale: :math:`s` is ``"exp"``: :math:`e^h`; ``"sigmoid"``: :math:`\sigma(h + 2)` (Glow); ``"soft_clamp"``:
            :math:`e^{f \tanh(h / f)}`; ``"tanh"``: :math:`e^{f \tanh h}` (RealNVP); ``"none"``: 1, additive (NICE, arXiv:1410.8516).
        order: ``"scale_first"``: :math:`s x + t`; ``"shift_first"``: :math:`s (x + t)`.
        h_order: ``"shift_scale"``, ``"scale_shift"`` (halves of h) or ``"interleaved"`` (shift in the even channels).
        inverse: :math:`x_b = (y_b - t) / s`, and the log-det of that direction.

    Shape: x, y ``[N, C, ...]``, C even for halves; h ``[N, C, ...]`` for halves and ``[N, 2C, ...]`` for checkerboard, half of that
    for ``"none"``; log_det ``[N]``, nats, :math:`\pm\sum \log s`, float32 (float64 for float64 x).

    Raises ValueError for other shapes, dtypes, devices or names. Double backward is an error.
    """
    return torch.ops.fastflow.affine_coupling.default(
        x, h, factor, mask, flip, scale, order, h_order, inverse
    )


def affine_coupling_inverse_backward(
    y: Tensor,
    h: Tensor,
    factor: Tensor | None,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    mask: str = "halves",
    flip: bool = False,
    scale: str = "exp",
    order: str = "scale_first",
    h_order: str = "shift_scale",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(x, dx, dh, dfactor)`` of :func:`affine_coupling` from its output y: what backprop without stored activations needs.

    Arguments, shapes and errors as there; ``dy`` like y, ``dlog_det`` ``[N]``. dx holds no part that comes through the network.
    """
    x, dx, dh, dfactor = torch.ops.fastflow.affine_coupling_inverse_backward.default(
        y, h, factor, dy, dlog_det, mask, flip, scale, order, h_order
    )
    return x, dx, dh, None if factor is None else dfactor
