"""Affine coupling in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow.ops.layout import acc_dtype, channel_sum, channel_view, dense_like, sample_view


def checkerboard_transformed(x: Tensor, swap_halves: bool) -> Tensor:
    """Mask of the positions that a checkerboard coupling transforms: even parity, odd with ``swap_halves``.

    Source: RealNVP, arXiv:1605.08803, fig. 3.
    """
    spatial = x.shape[2:] or x.shape[1:]
    parity = torch.zeros((), dtype=torch.int64, device=x.device)
    for d, size in enumerate(spatial):
        index = torch.arange(size, device=x.device)
        parity = parity + index.view(-1, *[1] * (len(spatial) - 1 - d))
    return (parity % 2 == int(swap_halves)).expand(x.shape)


def split_h(params: Tensor, params_layout: str) -> tuple[Tensor, Tensor]:
    """Splits the raw output of the network into ``(shift, raw scale)``."""
    if params_layout == "interleaved":
        return params[:, 0::2], params[:, 1::2]
    first, second = params.chunk(2, dim=1)
    return (first, second) if params_layout == "shift_scale" else (second, first)


def join_h(shift: Tensor, raw: Tensor, params_layout: str) -> Tensor:
    if params_layout == "interleaved":
        return torch.stack([shift, raw], dim=2).flatten(1, 2)
    return torch.cat([shift, raw] if params_layout == "shift_scale" else [raw, shift], dim=1)


def log_scale_of(raw: Tensor, factor: Tensor | None, scale: str) -> Tensor:
    """log s of a scale function, applied to the raw scale."""
    if scale == "sigmoid":
        return F.logsigmoid(raw + 2)
    if factor is None:  # "exp"
        return raw
    f = channel_view(factor, raw)
    return f * torch.tanh(raw / f) if scale == "soft_clamp" else f * torch.tanh(raw)


def log_scale_vjp(g: Tensor, raw: Tensor, factor: Tensor | None, scale: str) -> tuple[Tensor, Tensor | None]:
    """Gradients ``(draw, dfactor)`` of :func:`log_scale_of` for the upstream gradient ``g``."""
    if scale == "sigmoid":
        return g * torch.sigmoid(-(raw + 2)), None
    if factor is None:  # "exp"
        return g, None
    f = channel_view(factor, raw)
    if scale == "soft_clamp":
        a = raw / f
        th = torch.tanh(a)
        slope = 1 - th * th
        return g * slope, channel_sum(g * (th - a * slope))
    th = torch.tanh(raw)
    return g * f * (1 - th * th), channel_sum(g * th)


def _coupling_parts(
    x: Tensor,
    params: Tensor,
    factor: Tensor | None,
    mask: str,
    swap_halves: bool,
    scale: str,
    params_layout: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The transformed part v of x and its parameters, in the accumulation dtype.

    Returns ``(v, shift, raw, factor, transformed)``; ``transformed`` is the mask of a checkerboard, None for
    halves.
    """
    acc = acc_dtype(x.dtype)
    shift, raw = (params, None) if scale == "none" else split_h(params, params_layout)
    shift, raw = shift.to(acc), None if raw is None else raw.to(acc)
    factor = None if factor is None else factor.to(acc)
    if mask == "halves":
        return x.chunk(2, dim=1)[0 if swap_halves else 1].to(acc), shift, raw, factor, None
    transformed = checkerboard_transformed(x, swap_halves)
    zero = torch.zeros((), dtype=acc, device=x.device)
    shift = torch.where(transformed, shift, zero)
    # masked values must not reach tanh or exp: their gradients would turn an infinity into NaN
    raw = None if raw is None else torch.where(transformed, raw, zero)
    return x.to(acc), shift, raw, factor, transformed


def _coupling_join(x: Tensor, v: Tensor, mask: str, swap_halves: bool) -> Tensor:
    if mask == "halves":
        x_a = x.chunk(2, dim=1)[1 if swap_halves else 0]
        v = v.to(x.dtype)
        v = torch.cat([v, x_a] if swap_halves else [x_a, v], dim=1)
    return dense_like(v, x)


def _masked_log_scale(raw: Tensor, factor: Tensor | None, scale: str, transformed: Tensor | None) -> Tensor:
    log_s = log_scale_of(raw, factor, scale)
    return log_s if transformed is None else torch.where(transformed, log_s, torch.zeros_like(log_s))


def affine_coupling(
    x: Tensor,
    params: Tensor,
    factor: Tensor | None,
    mask: str,
    swap_halves: bool,
    scale: str,
    affine_order: str,
    params_layout: str,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    v, t, raw, factor, transformed = _coupling_parts(
        x, params, factor, mask, swap_halves, scale, params_layout
    )
    if raw is None:
        out = v - t if inverse else v + t
        return _coupling_join(x, out, mask, swap_halves), v.new_zeros(x.shape[0])
    log_s = _masked_log_scale(raw, factor, scale, transformed)
    if inverse:
        inverse_s = torch.exp(-log_s)
        out = (v - t) * inverse_s if affine_order == "scale_first" else v * inverse_s - t
    else:
        s = torch.exp(log_s)
        out = v * s + t if affine_order == "scale_first" else (v + t) * s
    log_det = log_s.flatten(1).sum(1)
    return _coupling_join(x, out, mask, swap_halves), -log_det if inverse else log_det


def affine_coupling_backward(
    x: Tensor, params: Tensor, factor: Tensor | None, dy: Tensor, dlog_det: Tensor,
    mask: str, swap_halves: bool, scale: str, affine_order: str, params_layout: str, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients ``(dx, dparams, dfactor)`` from the input; dfactor is empty without a factor."""
    v, t, raw, f, transformed = _coupling_parts(x, params, factor, mask, swap_halves, scale, params_layout)
    g = (dy if mask == "checkerboard" else dy.chunk(2, dim=1)[0 if swap_halves else 1]).to(v.dtype)
    if raw is None:
        dt = -g if inverse else g.clone()  # an op must not return its input
        if transformed is not None:
            dt = torch.where(transformed, dt, torch.zeros_like(dt))
        return _coupling_join(dy, g.clone(), mask, swap_halves), dense_like(dt, params), v.new_empty(0)
    log_s = _masked_log_scale(raw, f, scale, transformed)
    dl = sample_view(dlog_det.to(v.dtype), v)
    if inverse:
        dv = g * torch.exp(-log_s)
        if affine_order == "scale_first":
            dt, dlog_s = -dv, -dv * (v - t) - dl
        else:
            dt, dlog_s = -g, -dv * v - dl
    else:
        dv = g * torch.exp(log_s)
        dt, dlog_s = (g, dv * v + dl) if affine_order == "scale_first" else (dv, dv * (v + t) + dl)
    if transformed is not None:
        dt = torch.where(transformed, dt, torch.zeros_like(dt))
        dlog_s = torch.where(transformed, dlog_s, torch.zeros_like(dlog_s))
    draw, df = log_scale_vjp(dlog_s, raw, f, scale)
    dparams = dense_like(join_h(dt, draw, params_layout), params)
    dfactor = v.new_empty(0) if df is None or factor is None else df.to(factor.dtype)
    return _coupling_join(dy, dv, mask, swap_halves), dparams, dfactor


def affine_coupling_inverse_backward(
    y: Tensor, params: Tensor, factor: Tensor | None, dy: Tensor, dlog_det: Tensor,
    mask: str, swap_halves: bool, scale: str, affine_order: str, params_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Input and gradients ``(x, dx, dparams, dfactor)`` of the forward direction, from its output."""
    x, _ = affine_coupling(y, params, factor, mask, swap_halves, scale, affine_order, params_layout, True)
    return x, *affine_coupling_backward(
        x, params, factor, dy, dlog_det, mask, swap_halves, scale, affine_order, params_layout, False
    )
