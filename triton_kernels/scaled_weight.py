"""A convolution's weight and bias times the scale of its output channels, and the gradients, in one pass.

Bytes an element of the weight in float32, which is the bound: forward 8, backward 12 (weight, dweight in, dweight out). Weights are small,
so what counts is that it is one launch where PyTorch has four, and ten for the gradients. A program has an output channel, whose weights
lie in one piece.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.tiles import block_size, launch

BLOCK = 1024  # elements that a program takes at a time


@triton.jit
def scaled_weight_kernel(
    weight, log_scale, bias, out, out_bias, row, stride_log_scale, stride_bias, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # weight, out: [O, row];  log_scale, bias, out_bias: [O]
    o = tl.program_id(0).to(tl.int64)
    scale = tl.exp(FACTOR * tl.load(log_scale + o * stride_log_scale))
    for start in range(0, row, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(out + o * row + i, tl.load(weight + o * row + i, mask=i < row) * scale, mask=i < row)
    tl.store(out_bias + o, tl.load(bias + o * stride_bias) * scale)


@triton.jit
def scaled_weight_backward_kernel(
    weight, log_scale, bias, dweight, dbias, out_weight, out_log_scale, out_bias, row, stride_log_scale, stride_bias, stride_dbias,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # weight, dweight, out_weight: [O, row];  the others: [O]
    o = tl.program_id(0).to(tl.int64)
    scale = tl.exp(FACTOR * tl.load(log_scale + o * stride_log_scale))
    total = tl.zeros([BLOCK], weight.dtype.element_ty)
    for start in range(0, row, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_dweight = tl.load(dweight + o * row + i, mask=i < row, other=0.0)
        total += b_dweight * tl.load(weight + o * row + i, mask=i < row, other=0.0)
        tl.store(out_weight + o * row + i, b_dweight * scale, mask=i < row)
    b_dbias = tl.load(dbias + o * stride_dbias)
    tl.store(out_log_scale + o, FACTOR * scale * (tl.sum(total) + b_dbias * tl.load(bias + o * stride_bias)))
    tl.store(out_bias + o, b_dbias * scale)


def _cut(weight: Tensor) -> dict:
    row = weight[0].numel()
    block = block_size(row, BLOCK)
    return {"BLOCK": block, "warps": min(max(block // 256, 1), 4)}


def scaled_weight(weight: Tensor, log_scale: Tensor, bias: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    out, out_bias = torch.empty_like(weight), bias.new_empty(bias.shape)
    launch(
        scaled_weight_kernel, weight.shape[0], weight, log_scale, bias, out, out_bias, weight[0].numel(), log_scale.stride(0),
        bias.stride(0), FACTOR=factor, **_cut(weight),
    )  # fmt: skip
    return out, out_bias


def scaled_weight_backward(
    weight: Tensor, log_scale: Tensor, bias: Tensor, factor: float, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(weight)
    out_log_scale, out_bias = log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)
    launch(
        scaled_weight_backward_kernel, weight.shape[0], weight, log_scale, bias, dweight, dbias, out, out_log_scale, out_bias,
        weight[0].numel(), log_scale.stride(0), bias.stride(0), dbias.stride(0), FACTOR=factor, **_cut(weight),
    )  # fmt: skip
    return out, out_log_scale, out_bias
