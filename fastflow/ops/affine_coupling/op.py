"""fastflow::affine_coupling, its backward, and its inverse + backward."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.affine_coupling import reference
from fastflow.ops.registry import register

MASKS = ("halves", "checkerboard")
SCALES = ("exp", "sigmoid", "soft_clamp", "tanh", "none")
AFFINE_ORDERS = ("scale_first", "shift_first")
PARAMS_LAYOUTS = ("shift_scale", "scale_shift", "interleaved")
WITH_FACTOR = ("soft_clamp", "tanh")


def _check(
    argument: str,
    x: Tensor,
    params: Tensor,
    factor: Tensor | None,
    mask: str,
    scale: str,
    affine_order: str,
    params_layout: str,
    dy: Tensor | None = None,
    dlog_det: Tensor | None = None,
) -> None:
    validation.one_of("mask", mask, MASKS)
    validation.one_of("scale", scale, SCALES)
    validation.one_of("affine_order", affine_order, AFFINE_ORDERS)
    validation.one_of("params_layout", params_layout, PARAMS_LAYOUTS)
    validation.floating_point(argument, x)
    c = x.shape[1]
    if mask == "halves" and c % 2:
        raise validation.argument_error(
            argument, validation.shape_of(x), "an even number of channels, to split into halves"
        )
    validation.same_device_and_precision("params", params, argument, x)
    transformed = c // 2 if mask == "halves" else c
    validation.same_shape(
        "params",
        params,
        (x.shape[0], transformed if scale == "none" else 2 * transformed, *x.shape[2:]),
        f"{argument} is {list(x.shape)}, {mask}, "
        f"{'shift' if scale == 'none' else 'shift and scale'} of {transformed} channels",
    )
    if (factor is not None) != (scale in WITH_FACTOR):
        raise validation.argument_error(
            "factor",
            "None" if factor is None else "a tensor",
            f"one for {' and '.join(WITH_FACTOR)} only, scale is {scale!r}",
        )
    if factor is not None:
        validation.same_device_and_precision("factor", factor, argument, x)
        validation.channels("factor", factor, transformed, "one for each transformed channel")
    validation.gradients(argument, x, dy, dlog_det)


kernels = {"triton": True, "compiled": ("cpu",)}
register(reference.affine_coupling_backward, **kernels)
register(reference.affine_coupling_inverse_backward, **kernels, check=_check)
register(
    reference.affine_coupling,
    **kernels,
    check=_check,
    outputs="y log_det",
    backward=reference.affine_coupling_backward,
    gradients="x params factor",
    batched="x params",
)


def affine_coupling(
    x: Tensor,
    params: Tensor,
    factor: Tensor | None = None,
    *,
    mask: str = "halves",
    swap_halves: bool = False,
    scale: str = "exp",
    affine_order: str = "scale_first",
    params_layout: str = "shift_scale",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Affine coupling :math:`y_a = x_a,\; y_b = s(h) x_b + t(h)` with its log-det.

    Source: RealNVP, arXiv:1605.08803, eq. 7-8.

    Args:
        x: input; the output y with ``inverse=True``.
        params: raw output h of the coupling network for :math:`x_a`: shift and raw scale along the channels.
        factor: factor :math:`f > 0` of the scale functions that have one, one value per transformed channel.
        mask: ``"halves"``: the first half of the channels passes through. ``"checkerboard"``: the positions
            with odd :math:`i + j` pass through, and ``params`` covers all channels and positions.
        swap_halves: swap the part that passes through and the part that is transformed: the halves of the
            channels, or the positions of odd and even parity.
        scale: scale function s: ``"exp"``: :math:`e^h`; ``"sigmoid"``: :math:`\sigma(h + 2)` (Glow);
            ``"soft_clamp"``: :math:`e^{f \tanh(h / f)}`; ``"tanh"``: :math:`e^{f \tanh h}` (RealNVP);
            ``"none"``: 1, an additive coupling (NICE, arXiv:1410.8516).
        affine_order: ``"scale_first"``: :math:`s x + t`; ``"shift_first"``: :math:`s (x + t)`.
        params_layout: layout of the channels of ``params``: ``"shift_scale"`` or ``"scale_shift"``, halves;
            ``"interleaved"``, shift in the even channels and scale in the odd ones.
        inverse: compute :math:`x_b = (y_b - t) / s` and the log-det of that direction.

    Shape: x, y ``[N, C, ...]``, C even for ``mask="halves"``; params ``[N, C, ...]`` for halves and
    ``[N, 2C, ...]`` for checkerboard, half as many channels for ``scale="none"``; log_det ``[N]``, nats,
    :math:`\pm\sum \log s`, float32 (float64 for float64 x).

    Raises ValueError for other shapes, dtypes, devices or names.
    """
    return torch.ops.fastflow.affine_coupling.default(
        x, params, factor, mask, swap_halves, scale, affine_order, params_layout, inverse
    )


def affine_coupling_inverse_backward(
    y: Tensor,
    params: Tensor,
    factor: Tensor | None,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    mask: str = "halves",
    swap_halves: bool = False,
    scale: str = "exp",
    affine_order: str = "scale_first",
    params_layout: str = "shift_scale",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Input and gradients of :func:`affine_coupling` from its output y: ``(x, dx, dparams, dfactor)``.

    Reversible backprop uses it. Arguments, shapes and errors are as in :func:`affine_coupling`; dy has the
    shape of y, dlog_det ``[N]``. dx excludes the gradient that reaches x through the network.
    """
    x, dx, dparams, dfactor = torch.ops.fastflow.affine_coupling_inverse_backward.default(
        y, params, factor, dy, dlog_det, mask, swap_halves, scale, affine_order, params_layout
    )
    return x, dx, dparams, None if factor is None else dfactor
