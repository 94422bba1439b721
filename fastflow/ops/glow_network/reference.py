"""Coupling network of Glow in plain PyTorch, and its vector-Jacobian product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow.ops.layout import dense_like, memory_format
from fastflow.transforms import in_transform

_ONES, _ZEROS = (1, 1), (0, 0)


def glow_network(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, tf32: bool
) -> Tensor:
    _, h2 = _hidden(x, w1, b1, w2, b2)
    y = F.conv2d(h2, w3, b3.to(x.dtype), padding=1)
    if in_transform():  # vmap's tensors have other strides
        return y
    # y's strides are those of a new tensor in the memory format of x, also where sizes of 1 leave a choice
    expected = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory_format(x))
    return y if y.stride() == expected.stride() else expected.copy_(y)


def glow_network_backward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    tf32: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by all arguments, from the inputs: hidden activations are computed again."""
    h1, h2 = _hidden(x, w1, b1, w2, b2)
    dh2, dw3, db3 = _convolution_backward(dy, h2, w3, 1)
    dh1, dw2, db2 = _convolution_backward(_relu_backward(dh2, h2), h1, _as_kernel(w2), 0)
    dx, dw1, db1 = _convolution_backward(_relu_backward(dh1, h1), x, w1, 1)
    dw2 = dw2.view(w2.shape)
    found = (dx, x), (dw1, w1), (db1, b1), (dw2, w2), (db2, b2), (dw3, w3), (db3, b3)
    dx, dw1, db1, dw2, db2, dw3, db3 = (dense_like(gradient, v) for gradient, v in found)
    return dx, dw1, db1, dw2, db2, dw3, db3


def _hidden(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    h1 = F.relu(F.conv2d(x, w1, b1.to(x.dtype), padding=1))
    return h1, F.relu(F.conv2d(h1, _as_kernel(w2), b2.to(x.dtype)))


def _as_kernel(w2: Tensor) -> Tensor:
    return w2[:, :, None, None] if w2.ndim == 2 else w2


def _relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(dy, y, 0)


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        [weight.shape[0]],
        _ONES,
        (padding, padding),
        _ONES,
        False,
        _ZEROS,
        1,
        (True, True, True),
    )
