"""fastflow::mixture_cdf, its backward, and its inverse + backward."""

from typing import Any

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops import columns
from fastflow.ops.mixture_cdf import reference
from fastflow.ops.mixture_cdf.reference import mixture_cdf_parameters
from fastflow.ops.registry import register


def _check(
    argument: str,
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    components: int,
    dy: Tensor | None = None,
    dlog_det: Tensor | None = None,
) -> None:
    validation.positive_int("components", components)
    each = mixture_cdf_parameters(components)
    columns.check(
        argument,
        x,
        params,
        channel_order,
        first_channel,
        each,
        dy,
        dlog_det,
        lambda: f"{components} components",
    )


MAX_COMPONENTS = 64  # of the kernels


def _in_kernel(*args: Any) -> bool:
    """Whether the kernels have these mixtures, of the arguments of any of the ops."""
    return (args[4] if isinstance(args[4], int) else args[6]) <= MAX_COMPONENTS


kernels = {"triton": True, "compiled": ("cpu",), "eligible": _in_kernel}
register(reference.mixture_cdf_backward, **kernels)
register(reference.mixture_cdf_inverse_backward, **kernels, check=_check)
register(
    reference.mixture_cdf,
    **kernels,
    check=_check,
    outputs="y log_det",
    backward=reference.mixture_cdf_backward,
    gradients="x params",
    batched="x params",
)


def mixture_cdf(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None = None,
    *,
    first_channel: int = 0,
    components: int,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Logit of the CDF of a mixture of logistics of each element of x, scaled and shifted, with its log-det.

    :math:`y = e^{\tanh a} \operatorname{logit} F(x) + b,\; F(x) = \sum_k \pi_k \sigma((x - \mu_k) e^{-s_k})` with
    :math:`\pi = \operatorname{softmax}(l)`. Source: Flow++, arXiv:1902.00275, section 3.2. As in its code, the log-scale of
    y is between -1 and 1 and :math:`s_k` below -7 is -7; above 7 it is 7. It is the identity for parameters of 0.

    Args:
        x: input; the output y with ``inverse=True``.
        params: raw parameters, the output of a network: for each transformed channel a, b, the logits l of the
            components' weights, their means and their log-scales s.
        channel_order: a permutation of the channels: the T transformed ones, in the order of ``params``, then the
            others, which pass through. None: the transformed ones are neighbors.
        first_channel: the first of the transformed channels, without a ``channel_order``.
        components: number of components K.
        inverse: compute x from y, by Newton's method in a bracket to the last digits, and the log-det of that
            direction.

    Shape: x, y ``[N, C, ...]``; params ``[N, T P, ...]`` with P = 3K + 2; log_det ``[N]``, nats, float32 (float64 for
    float64 x).

    NaN stays NaN. The tails are straight lines, and neither F nor 1 - F underflows. Where x is far from every
    component, but between two of them, the slope of y is as small as the density: x has then few digits of y.
    Raises ValueError for other shapes, dtypes or devices. The values of ``channel_order`` are not checked.
    """
    return torch.ops.fastflow.mixture_cdf.default(
        x, params, channel_order, first_channel, components, inverse
    )


def mixture_cdf_inverse_backward(
    y: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    first_channel: int = 0,
    components: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Input and gradients of :func:`mixture_cdf` from its output y: ``(x, dx, dparams)``.

    Reversible backprop uses it. Arguments, shapes and errors are as in :func:`mixture_cdf`; dy has the shape of y,
    dlog_det ``[N]``. dx excludes the gradient that reaches x through the network.
    """
    return torch.ops.fastflow.mixture_cdf_inverse_backward.default(
        y, params, channel_order, first_channel, dy, dlog_det, components
    )
