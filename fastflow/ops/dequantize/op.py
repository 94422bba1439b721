"""fastflow::dequantize, the gradient of its noise, and its inverse."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.dequantize import reference
from fastflow.ops.noise import as_seed
from fastflow.ops.registry import register
from fastflow.ops.squeeze import ORDERS, check_even, check_image


def _check_map(n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None) -> None:
    if not 1 <= n_bits <= 8:
        raise validation.argument_error("n_bits", n_bits, "1 to 8, the bit depth of uint8 images")
    if not scale > 0:
        raise validation.argument_error("scale", scale, "a positive number")
    if logit and not (shift > 0 and scale + shift <= 1):
        raise validation.argument_error(
            "shift",
            f"{shift} with scale {scale}",
            "0 < shift and scale + shift <= 1, so that the logit is finite",
        )
    if squeeze_order is not None:
        validation.one_of("squeeze_order", squeeze_order, ORDERS)


def _check(
    argument: str,
    x: Tensor,
    noise: Tensor | None,
    n_bits: int,
    scale: float,
    shift: float,
    logit: bool,
    squeeze_order: str | None,
    seed: Tensor | None,
) -> None:
    if x.dtype != torch.uint8:
        raise validation.argument_error(argument, f"dtype {x.dtype}", "uint8 images")
    if x.ndim < 2:
        raise validation.argument_error(argument, validation.shape_of(x), "a batch [N, ...]")
    _check_map(n_bits, scale, shift, logit, squeeze_order)
    if squeeze_order is not None:
        check_even(x)
    if (noise is None) == (seed is None):
        raise validation.argument_error(
            "noise, seed", "both" if seed is not None else "neither", "one of them"
        )
    if noise is not None:
        validation.floating_point("noise", noise)
        validation.same_shape("noise", noise, x.shape, "like x")
        if noise.device != x.device:
            raise validation.argument_error("noise", f"device {noise.device}", f"{x.device}, the device of x")


def _check_inverse(
    argument: str, y: Tensor, n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None
) -> None:
    validation.floating_point(argument, y)
    _check_map(n_bits, scale, shift, logit, squeeze_order)
    if squeeze_order is not None:
        check_image(y)
        if y.shape[1] % 4:
            raise validation.argument_error(
                argument, validation.shape_of(y), "a number of channels divisible by 4"
            )


register(reference.dequantize_backward, triton=True, compiled=("cpu",))
register(
    reference.dequantize,
    check=_check,
    triton=True,
    compiled=("cpu",),
    outputs="y log_det",
    backward=reference.dequantize_backward,
    gradients="noise",
    batched="x noise",
)
register(
    reference.dequantize_inverse,
    check=_check_inverse,
    triton=True,
    compiled=("cpu",),
    outputs="x log_det",
    integers="x",
    backward=reference.dequantize_inverse_backward,
    gradients="y",
    batched="y",
)


def dequantize(
    x: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    n_bits: int = 8,
    scale: float = 1.0,
    shift: float = 0.0,
    logit: bool = False,
    squeeze_order: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    r"""Dequantization with its log-det: :math:`p = \alpha_1 (x + u) / 2^{n} + \alpha_0`, y = p or logit p.

    Sources: uniform dequantization, Theis et al., arXiv:1511.01844, section 3.1; the logit map, RealNVP,
    arXiv:1605.08803, section 4.1. :math:`1 - p` is computed from :math:`2^n - x - u`, so the logit is finite
    and accurate up to the largest pixel.

    Args:
        x: uint8 images or vectors with values below ``2 ** n_bits``.
        noise: noise u in [0, 1). The outputs are differentiable with respect to it, for variational
            dequantization. Pass either noise or seed.
        seed: seed of Philox noise, keyed by (seed, ``offset`` + sample, element); see
            :func:`fastflow.ops.uniform_noise`.
        offset: index of the first sample.
        n_bits: bit depth n of the pixels, 1 to 8.
        scale, shift: :math:`\alpha_1` and :math:`\alpha_0`. Glow: 1 and -1/2. With a constant α that keeps the
            logit finite, RealNVP: 1 - α and α; UvA tutorial: 1 - α and α/2.
        logit: apply the logit.
        squeeze_order: also squeeze the result; see :func:`fastflow.ops.squeeze2d`.
        dtype: dtype of y; ignored if noise is given, whose dtype is used.

    Shape: x, noise ``[N, ...]``; y the same (squeezed ``[N, 4C, H/2, W/2]``); log_det ``[N]``, nats,
    :math:`\sum \log(\alpha_1 2^{-n}) - [\mathrm{logit}] \sum (\log p + \log(1 - p))`.

    Raises ValueError if x is not uint8, if neither or both of noise and seed are given, and if the logit
    could be infinite.
    """
    if noise is not None:
        dtype = noise.dtype
    seed = None if seed is None else as_seed(seed, x.device)
    return torch.ops.fastflow.dequantize.default(
        x, noise, seed, offset, n_bits, scale, shift, logit, squeeze_order, dtype
    )


def dequantize_inverse(
    y: Tensor,
    *,
    n_bits: int = 8,
    scale: float = 1.0,
    shift: float = 0.0,
    logit: bool = False,
    squeeze_order: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Inverse of :func:`dequantize`.

    Formula: :math:`x = \lfloor 2^n (p - \alpha_0) / \alpha_1 \rfloor`, clamped to the bit depth. The
    arguments are the same as in :func:`dequantize`.

    Shape: y floating point; x uint8; log_det ``[N]``, nats. x is not differentiable. log_det is
    differentiable: it is the log-det of the continuous map from y to x + u.

    Raises ValueError if y is not floating point, for a y that cannot be unsqueezed, and for maps that
    :func:`dequantize` rejects.
    """
    return torch.ops.fastflow.dequantize_inverse.default(y, n_bits, scale, shift, logit, squeeze_order)
