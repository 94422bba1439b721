"""Ops with parameters of each element, ``[N, T P, ...]``, of T of the channels; the others pass through.

Some take parameters ``[1, T P, ...]`` that all samples share.

The T channels are the first ones of ``channel_order``, or without it neighbors from ``first_channel`` on.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.layout import acc_dtype, dense_like, sample_view


def check(
    argument: str,
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    each: int,
    dy: Tensor | None,
    dlog_det: Tensor | None,
    form: Callable[[], str],
    may_share: bool = False,
) -> None:
    """Raise ValueError unless the tensors match.

    ``each`` is the number of parameters per element, ``form`` names them, and with ``may_share`` they may be those of
    one sample, ``[1, T P, ...]``, for all.
    """
    validation.floating_point(argument, x)
    validation.same_device_and_precision("params", params, argument, x)
    channels = x.shape[1]
    got = validation.shape_of(params)
    transformed = params.shape[1] // each if params.ndim > 1 else 0
    samples = 1 if may_share and params.ndim and params.shape[0] == 1 else x.shape[0]
    expected = (samples, transformed * each, *x.shape[2:])
    enough = 1 <= transformed <= channels
    if tuple(params.shape) != expected or not enough:
        samples = f"{x.shape[0]} or 1" if may_share else str(x.shape[0])
        sizes = ", ".join([samples, f"{each} T", *map(str, x.shape[2:])])
        why = f"{argument} is {list(x.shape)}; {each} parameters of each of T channels, {form()}"
        raise validation.argument_error("params", got, f"[{sizes}] ({why})")
    if channel_order is None:
        last = channels - transformed
        if not 0 <= first_channel <= last:
            expected = (
                f"an index from 0 to {last}, of the first of {transformed} transformed channels of {channels}"
            )
            raise validation.argument_error("first_channel", first_channel, expected)
    else:
        if first_channel != 0:
            raise validation.argument_error("first_channel", first_channel, "0 with a channel_order")
        if channel_order.dtype != torch.int64 or channel_order.device != x.device:
            raise validation.argument_error(
                "channel_order",
                f"{channel_order.dtype} on {channel_order.device}",
                f"torch.int64 on {x.device}, the device of {argument}",
            )
        validation.channels("channel_order", channel_order, channels, "a permutation of the channels")
    validation.gradients(argument, x, dy, dlog_det)


def _per_element(params: Tensor, samples: int, each: int, acc: torch.dtype) -> Tensor:
    """``[N, T P, ...]``, or those of one sample for all, as ``[N, T, ..., P]``."""
    params = params.expand(samples, *params.shape[1:])
    return params.unflatten(1, (-1, each)).movedim(2, -1).to(acc)


def _transformed(
    params: Tensor, channel_order: Tensor | None, first_channel: int, each: int
) -> Tensor | tuple[int, int]:
    """Indices of the transformed channels, or the first of neighbors and their number."""
    count = params.shape[1] // each
    return (first_channel, count) if channel_order is None else channel_order[:count]


def _taken(x: Tensor, channels: Tensor | tuple[int, int]) -> Tensor:
    return x.index_select(1, channels) if isinstance(channels, Tensor) else x.narrow(1, *channels)


def _merged(x: Tensor, y: Tensor, channels: Tensor | tuple[int, int]) -> Tensor:
    y = y.to(x.dtype)
    if isinstance(channels, Tensor):
        return dense_like(x.index_copy(1, channels, y), x)
    first, count = channels
    if count < x.shape[1]:
        y = torch.cat([x[:, :first], y, x[:, first + count :]], 1)
    return dense_like(y, x)


def applied(
    elementwise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    each: int,
) -> tuple[Tensor, Tensor]:
    """``(y, log_det)`` of an ``elementwise`` function of ``(x, params [..., P])`` with its log-derivative."""
    acc = acc_dtype(x.dtype)
    channels = _transformed(params, channel_order, first_channel, each)
    y, log_slope = elementwise(_taken(x, channels).to(acc), _per_element(params, x.shape[0], each, acc))
    return _merged(x, y, channels), log_slope.flatten(1).sum(1)


def pulled_back(
    elementwise: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    v: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    g: Tensor,
    dlog_det: Tensor,
    each: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, dv, dparams)`` of an ``elementwise`` function of ``(v, params [..., P], g, gradient of the log-derivative)``."""
    acc = acc_dtype(v.dtype)
    channels = _transformed(params, channel_order, first_channel, each)
    taken = _taken(v, channels).to(acc)
    d = sample_view(dlog_det.to(acc), taken).expand(taken.shape)
    x, dv, dparams = elementwise(
        taken, _per_element(params, v.shape[0], each, acc), _taken(g, channels).to(acc), d
    )
    dparams = dense_like(dparams.movedim(-1, 2).flatten(1, 2).sum_to_size(params.shape), params)
    return _merged(v, x, channels), _merged(g, dv, channels), dparams
