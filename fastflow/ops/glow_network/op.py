"""fastflow::glow_network, Glow's coupling network; its gradient computes the hidden activations again."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.glow_network import reference
from fastflow.ops.layout import dense_like
from fastflow.ops.registry import register

# channels that fit the kernel's tiles: 9 * 56 columns fit 512; with three terms 256, since more spill registers
MAX_COMPILED = {"input": 56, "float32": 28, "hidden": 512}
SHARED_MEMORY = 163 << 10  # bytes a thread block may take on an A100, and more on later GPUs for data centers


def _check(
    argument: str, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> None:
    validation.floating_point(argument, x)
    if x.ndim != 4:
        raise validation.argument_error(argument, validation.shape_of(x), "images [N, C, H, W]")
    hidden, out = w1.shape[0], w3.shape[0]
    kernels = {
        "w1": (w1, (hidden, x.shape[1], 3, 3)),
        "w2": (w2, (hidden, hidden, 1, 1)[: max(w2.ndim, 2)]),
        "w3": (w3, (out, hidden, 3, 3)),
    }
    for name, (w, shape) in kernels.items():
        validation.same_device_and_precision(name, w, argument, x)
        if w.dtype != x.dtype:
            raise validation.argument_error(name, f"dtype {w.dtype}", f"{x.dtype}, the dtype of {argument}")
        validation.same_shape(name, w, shape, f"{argument} has {x.shape[1]} channels, w1 {hidden} outputs")
    for name, b, w in (("b1", b1, "w1"), ("b2", b2, "w2"), ("b3", b3, "w3")):
        validation.same_device_and_precision(name, b, argument, x)
        validation.channels(name, b, out if w == "w3" else hidden, f"one for each output of {w}")


def _eligible(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, tf32: bool
) -> bool:
    return _fits(x, w1.shape[1], w1.shape[0], tf32)


def _eligible_backward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    tf32: bool,
    dy: Tensor,
) -> bool:
    return _fits(x, max(w1.shape[1], w3.shape[0]), w1.shape[0], tf32)


def _fits(x: Tensor, channels: int, hidden: int, tf32: bool) -> bool:
    most = MAX_COMPILED["float32" if x.dtype == torch.float32 and not tf32 else "input"]
    fits = channels <= most and hidden <= MAX_COMPILED["hidden"] and x.dtype != torch.float64
    return fits and (not x.is_cuda or _shared_memory(x.device) >= SHARED_MEMORY)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _eligible_compiled(x: Tensor, w1: Tensor, b1: Tensor, *_: object) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.numel() > 0 and b1.numel() > 0


def _backward(op: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    return tuple(dense_like(gradient, v) for gradient, v in zip(op(*args), args[:7], strict=True))


kernels = {"triton": True, "compiled": ("cpu",), "eligible_compiled": _eligible_compiled}
register(
    reference.glow_network_backward,
    **kernels,
    eligible=_eligible_backward,
    call=_backward,
)
register(
    reference.glow_network,
    **kernels,
    eligible=_eligible,
    check=_check,
    outputs="y",
    backward=reference.glow_network_backward,
    gradients="x w1 b1 w2 b2 w3 b3",
    batched="x",
)


def glow_network(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
) -> Tensor:
    r"""Coupling network of Glow, :math:`y = w_3 * r(w_2 * r(w_1 * x + b_1) + b_2) + b_3` with :math:`r` = ReLU.

    Source: openai/glow, function `f` of model.py. The convolutions are 3x3, 1x1 and 3x3 with zero padding.
    ActNorm's factors and those of the last layer are already in weights and biases.

    The kernels keep hidden activations out of memory, Triton's in registers and those for the CPU in its cache.
    The Triton kernel rounds them to the dtype of x and accumulates in float32. It reads weights w1 and w3 in
    channels_last as they are and copies others first. The gradient computes the hidden activations again; if
    it is itself differentiated, it is plain PyTorch.

    Args:
        x: input, of any memory layout; y has its memory format.
        w1, w2, w3: weights, in the dtype of x.
        b1, b2, b3: biases; with half-precision x they may be float32.
        tf32: products of float32 in TF32, with 10 bits of the factors. Otherwise each product is the sum of
            three in TF32. Only the Triton kernels read it. Convolutions of PyTorch follow
            ``torch.backends.cudnn.allow_tf32``, and the matrix products of the gradient
            ``torch.backends.cuda.matmul.allow_tf32``.

    Shape: x ``[N, C, H, W]``; w1 ``[K, C, 3, 3]``; w2 ``[K, K]`` or ``[K, K, 1, 1]``; w3 ``[D, K, 3, 3]``; b1, b2
    ``[K]``; b3 ``[D]``; y ``[N, D, H, W]``.

    Raises ValueError for other shapes, dtypes or devices.
    """
    return torch.ops.fastflow.glow_network.default(x, w1, b1, w2, b2, w3, b3, tf32)
