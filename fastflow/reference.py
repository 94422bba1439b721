"""Every op in plain PyTorch: what a device without a kernel runs, the oracle of the tests, the eager side of the benchmarks.

Functions bear their op's name and take its arguments in the schema's order; formulas and vector-Jacobian products are derived in
docs/maths.md. Everything computes in the accumulation dtype and returns the dtype and the dense layout of its input. Arguments
are checked by the functions of :mod:`fastflow.ops`, not here.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
REALNVP_PIXELS = (0, 3, 1, 2)  # of a 2x2 block (00, 01, 10, 11): the main diagonal first


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_like(y: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``y`` in the dtype and the strides of ``torch.empty_like(x)``, so that every body and the fake agree on the layout."""
    y = y.to(dtype or x.dtype)
    if y.stride() == x.stride() or y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


def channel_view(v: Tensor, x: Tensor) -> Tensor:
    """``v`` of shape ``[C]`` as ``[1, C, 1, ...]``, to broadcast against ``x``."""
    return v.view(1, -1, *[1] * (x.ndim - 2))


def sample_view(v: Tensor, x: Tensor) -> Tensor:
    """``v`` of shape ``[N]`` as ``[N, 1, ...]``, to broadcast against ``x``."""
    return v.view(-1, *[1] * (x.ndim - 1))


def channel_sum(v: Tensor) -> Tensor:
    """Sum over everything but dimension 1."""
    return v.sum([d for d in range(v.ndim) if d != 1])


def positions(x: Tensor) -> int:
    """How many vectors of channels a sample holds: ``H * W`` of an image, 1 of a vector."""
    return math.prod(x.shape[2:])


# affine coupling ---------------------------------------------------------------------------------------------------------------


def checkerboard_transformed(x: Tensor, flip: bool) -> Tensor:
    """Boolean mask of what a checkerboard coupling transforms: even parity, odd with ``flip`` (RealNVP, arXiv:1605.08803, fig. 3)."""
    spatial = x.shape[2:] or x.shape[1:]
    parity = torch.zeros((), dtype=torch.int64, device=x.device)
    for d, size in enumerate(spatial):
        index = torch.arange(size, device=x.device)
        parity = parity + index.view(-1, *[1] * (len(spatial) - 1 - d))
    return (parity % 2 == int(flip)).expand(x.shape)


def split_h(h: Tensor, h_order: str) -> tuple[Tensor, Tensor]:
    """The network's raw output as (shift, raw scale)."""
    if h_order == "interleaved":
        return h[:, 0::2], h[:, 1::2]
    first, second = h.chunk(2, dim=1)
    return (first, second) if h_order == "shift_scale" else (second, first)


def join_h(shift: Tensor, raw: Tensor, h_order: str) -> Tensor:
    if h_order == "interleaved":
        return torch.stack([shift, raw], dim=2).flatten(1, 2)
    return torch.cat([shift, raw] if h_order == "shift_scale" else [raw, shift], dim=1)


def log_scale_of(raw: Tensor, factor: Tensor | None, scale: str) -> Tensor:
    """log s of a scale function applied to the network's raw output."""
    if scale == "exp":
        return raw
    if scale == "sigmoid":
        return F.logsigmoid(raw + 2)
    f = channel_view(factor, raw)
    return f * torch.tanh(raw / f) if scale == "soft_clamp" else f * torch.tanh(raw)


def log_scale_vjp(g: Tensor, raw: Tensor, factor: Tensor | None, scale: str) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`log_scale_of` for the upstream ``g``: (raw, factor)."""
    if scale == "exp":
        return g, None
    if scale == "sigmoid":
        return g * torch.sigmoid(-(raw + 2)), None
    f = channel_view(factor, raw)
    if scale == "soft_clamp":
        a = raw / f
        th = torch.tanh(a)
        slope = 1 - th * th
        return g * slope, channel_sum(g * (th - a * slope))
    th = torch.tanh(raw)
    return g * f * (1 - th * th), channel_sum(g * th)


def _coupling_parts(
    x: Tensor, h: Tensor, factor: Tensor | None, mask: str, flip: bool, scale: str, h_order: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(v, shift, raw, factor, transformed): the transformed part of x, and what transforms it, in the accumulation dtype."""
    acc = acc_dtype(x.dtype)
    shift, raw = (h, None) if scale == "none" else split_h(h, h_order)
    shift, raw = shift.to(acc), None if raw is None else raw.to(acc)
    factor = None if factor is None else factor.to(acc)
    if mask == "halves":
        return x.chunk(2, dim=1)[0 if flip else 1].to(acc), shift, raw, factor, None
    transformed = checkerboard_transformed(x, flip)
    zero = torch.zeros((), dtype=acc, device=x.device)
    shift = torch.where(transformed, shift, zero)
    # what lies under the mask must not reach a tanh or an exp, whose gradients would turn an infinity into NaN
    raw = None if raw is None else torch.where(transformed, raw, zero)
    return x.to(acc), shift, raw, factor, transformed


def _coupling_join(x: Tensor, v: Tensor, mask: str, flip: bool) -> Tensor:
    if mask == "halves":
        x_a = x.chunk(2, dim=1)[1 if flip else 0]
        v = v.to(x.dtype)
        v = torch.cat([v, x_a] if flip else [x_a, v], dim=1)
    return dense_like(v, x)


def _masked_log_scale(raw: Tensor, factor: Tensor | None, scale: str, transformed: Tensor | None) -> Tensor:
    log_s = log_scale_of(raw, factor, scale)
    return log_s if transformed is None else torch.where(transformed, log_s, torch.zeros_like(log_s))


def affine_coupling(
    x: Tensor, h: Tensor, factor: Tensor | None, mask: str, flip: bool, scale: str, order: str, h_order: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    v, t, raw, factor, transformed = _coupling_parts(x, h, factor, mask, flip, scale, h_order)
    if scale == "none":
        out = v - t if inverse else v + t
        return _coupling_join(x, out, mask, flip), v.new_zeros(x.shape[0])
    log_s = _masked_log_scale(raw, factor, scale, transformed)
    if inverse:
        inverse_s = torch.exp(-log_s)
        out = (v - t) * inverse_s if order == "scale_first" else v * inverse_s - t
    else:
        s = torch.exp(log_s)
        out = v * s + t if order == "scale_first" else (v + t) * s
    log_det = log_s.flatten(1).sum(1)
    return _coupling_join(x, out, mask, flip), -log_det if inverse else log_det


def affine_coupling_backward(
    x: Tensor, h: Tensor, factor: Tensor | None, dy: Tensor, dlog_det: Tensor,
    mask: str, flip: bool, scale: str, order: str, h_order: str, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dh, dfactor) from the direction's own input; dfactor has no elements where there is no factor."""
    v, t, raw, f, transformed = _coupling_parts(x, h, factor, mask, flip, scale, h_order)
    g = (dy if mask == "checkerboard" else dy.chunk(2, dim=1)[0 if flip else 1]).to(v.dtype)
    dfactor = v.new_empty(0) if factor is None else None
    if scale == "none":
        dt = -g if inverse else g.clone()  # an op must not return its input
        if transformed is not None:
            dt = torch.where(transformed, dt, torch.zeros_like(dt))
        return _coupling_join(dy, g.clone(), mask, flip), dense_like(dt, h), dfactor
    log_s = _masked_log_scale(raw, f, scale, transformed)
    dl = sample_view(dlog_det.to(v.dtype), v)
    if inverse:
        dv = g * torch.exp(-log_s)
        if order == "scale_first":
            dt, dlog_s = -dv, -dv * (v - t) - dl
        else:
            dt, dlog_s = -g, -dv * v - dl
    else:
        dv = g * torch.exp(log_s)
        dt, dlog_s = (g, dv * v + dl) if order == "scale_first" else (dv, dv * (v + t) + dl)
    if transformed is not None:
        dt = torch.where(transformed, dt, torch.zeros_like(dt))
        dlog_s = torch.where(transformed, dlog_s, torch.zeros_like(dlog_s))
    draw, df = log_scale_vjp(dlog_s, raw, f, scale)
    dh = dense_like(join_h(dt, draw, h_order), h)
    return _coupling_join(dy, dv, mask, flip), dh, dfactor if df is None else df.to(factor.dtype)


def affine_coupling_inverse_backward(
    y: Tensor, h: Tensor, factor: Tensor | None, dy: Tensor, dlog_det: Tensor,
    mask: str, flip: bool, scale: str, order: str, h_order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(x, dx, dh, dfactor) of the forward direction, from its output."""
    x, _ = affine_coupling(y, h, factor, mask, flip, scale, order, h_order, True)
    return x, *affine_coupling_backward(x, h, factor, dy, dlog_det, mask, flip, scale, order, h_order, False)


# activation normalization ------------------------------------------------------------------------------------------------------


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    s, b = channel_view(log_scale.to(acc), x), channel_view(bias.to(acc), x)
    y = x.to(acc) * torch.exp(-s) - b if inverse else (x.to(acc) + b) * torch.exp(s)
    log_det = positions(x) * log_scale.to(acc).sum()
    return dense_like(y, x), (-log_det if inverse else log_det).repeat(x.shape[0])


def actnorm_backward(
    x: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dlog_scale, dbias) from the direction's own input."""
    acc = acc_dtype(x.dtype)
    s, b, g = channel_view(log_scale.to(acc), x), channel_view(bias.to(acc), x), dy.to(acc)
    dlog_scale = positions(x) * dlog_det.to(acc).sum()
    if inverse:
        dx = g * torch.exp(-s)
        dbias = -channel_sum(g)
        dlog_scale = -channel_sum(dx * x.to(acc)) - dlog_scale
    else:
        dx = g * torch.exp(s)
        dbias = channel_sum(dx)
        dlog_scale = channel_sum(dx * (x.to(acc) + b)) + dlog_scale
    return dense_like(dx, dy), dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


def actnorm_inverse_backward(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, dx, dlog_scale, dbias) of the forward direction, from its output."""
    x, _ = actnorm(y, log_scale, bias, True)
    return x, *actnorm_backward(x, log_scale, bias, dy, dlog_det, False)


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over the batch and the positions."""
    dims = [d for d in range(x.ndim) if d != 1]
    var, mean = torch.var_mean(x.to(acc_dtype(x.dtype)), dims, correction=0)
    return mean, var


# squeeze -----------------------------------------------------------------------------------------------------------------------


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of a squeezed or unsqueezed ``x``: channels_last when channels are what lies side by side in ``x``."""
    side_by_side = x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if side_by_side else torch.contiguous_format


def squeeze(x: Tensor, order: str, inverse: bool) -> Tensor:
    n, c, h, w = x.shape
    c, h, w = (c // 4, h, w) if inverse else (c, h // 2, w // 2)
    layout = memory_format(x)
    if order == "realnvp" and inverse:
        x = x.reshape(n, 4, c, h, w)[:, [REALNVP_PIXELS.index(k) for k in range(4)]].flatten(1, 2)
    # a copy into new memory: of 2x2 pixels and the like the reshaped x would be a view, and an op must not return its input
    y = torch.empty((n, c, 2 * h, 2 * w) if inverse else (n, 4 * c, h, w), dtype=x.dtype, device=x.device, memory_format=layout)
    image, squeezed = (y, x) if inverse else (x, y)
    pixels = image.view(n, c, h, 2, w, 2)
    if order == "channel":
        blocks = squeezed.view(n, c, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        blocks = squeezed.view(n, 2, 2, c, h, w).permute(0, 3, 4, 1, 5, 2)
    if inverse:
        pixels.copy_(blocks)
    else:
        blocks.copy_(pixels)
    if order == "realnvp" and not inverse:
        y.copy_(y.view(n, 4, c, h, w)[:, list(REALNVP_PIXELS)].flatten(1, 2))
    return y


# counter-based noise -----------------------------------------------------------------------------------------------------------

LOW32 = 0xFFFFFFFF
UNIFORM, NORMAL = 0, 1  # the stream: the second word of the counter


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11): four 32-bit words, each an int64 tensor in ``[0, 2^32)``, for four counter words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW32, (seed >> 32) & LOW32
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & LOW32 ^ c1 ^ k0, p1 & LOW32, (p0 >> 32) & LOW32 ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1, c2, c3


def _words(n: int, blocks: int, seed: Tensor, offset: int, stream: int) -> Tensor:
    """``[n, blocks, 4]`` words; the counter is (block, stream, sample's low word, sample's high word)."""
    sample = offset + torch.arange(n, device=seed.device).view(-1, 1)
    block = torch.arange(blocks, device=seed.device).view(1, -1)
    zero = torch.zeros_like(sample * block)
    words = philox((block + zero, zero + stream, (sample & LOW32) + zero, (sample >> 32) + zero), seed)
    return torch.stack(words, dim=2)


def uniform_noise(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Uniform on ``{0, 1, ..., 65535} / 65536``: element e of a sample is half ``e % 2`` of word ``e // 2 % 4`` of block ``e // 8``."""
    n, d = size[0], math.prod(size[1:])
    words = _words(n, -(-d // 8), seed, offset, UNIFORM)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=3).flatten(1)[:, :d]
    return (halves.to(acc_dtype(dtype)) * 2.0**-16).to(dtype).reshape(size)


def normal_noise(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Standard normal by Box and Muller: elements ``4b .. 4b + 3`` of a sample from the word pairs (0, 1) and (2, 3) of block b."""
    n, d = size[0], math.prod(size[1:])
    words = _words(n, -(-d // 4), seed, offset, NORMAL).unflatten(2, (2, 2)).to(acc_dtype(dtype))
    radius = torch.sqrt(-2 * torch.log((words[..., 0] + 0.5) * 2.0**-32))
    angle = words[..., 1] * (2.0**-32 * 2 * math.pi)
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=3)
    return pair.flatten(1)[:, :d].to(dtype).reshape(size)


# dequantization ----------------------------------------------------------------------------------------------------------------


def _dequantized(
    x: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int, n_bits: int, scale: float, shift: float, logit: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """p = scale v + shift, v = (x + u) / 2^n_bits, and for the logit 1 - p from 1 - v, so that it keeps its digits where p is near 1."""
    acc = acc_dtype(dtype)
    u = uniform_noise(list(x.shape), seed, offset, acc) if noise is None else noise.to(acc)
    bins = 2.0**n_bits
    xf = x.to(acc)
    p = torch.add(xf, u).mul_(scale / bins).add_(shift)
    if not logit:
        return p, None
    q = ((bins - xf) - u) * (scale / bins) + (1 - scale - shift)
    return p, q


def dequantize(
    x: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int,
    n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p, q = _dequantized(x, noise, seed, offset, n_bits, scale, shift, logit, dtype)
    log_det = p.new_full((x.shape[0],), math.prod(x.shape[1:]) * math.log(scale / 2.0**n_bits))
    if logit:
        log_p, log_q = torch.log(p), torch.log(q)
        log_det = log_det - (log_p + log_q).flatten(1).sum(1)
        p = log_p - log_q
    y = dense_like(p, x, dtype)
    return y if squeeze_order is None else squeeze(y, squeeze_order, False), log_det


def dequantize_backward(
    x: Tensor, noise: Tensor, dy: Tensor, dlog_det: Tensor,
    n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None,
) -> Tensor:  # fmt: skip
    """The gradient of given noise, as variational dequantization (arXiv:1902.00275) needs it."""
    g = (dy if squeeze_order is None else squeeze(dy, squeeze_order, True)).to(acc_dtype(noise.dtype))
    if logit:
        p, q = _dequantized(x, noise, None, 0, n_bits, scale, shift, logit, noise.dtype)
        g = (g + sample_view(dlog_det.to(p.dtype), p) * (p - q)) / (p * q)
    return dense_like(g * (scale / 2.0**n_bits), noise)


def dequantize_inverse(y: Tensor, n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None) -> tuple[Tensor, Tensor]:
    y = y if squeeze_order is None else squeeze(y, squeeze_order, True)
    p = y.to(acc_dtype(y.dtype))
    log_det = p.new_full((y.shape[0],), -math.prod(y.shape[1:]) * math.log(scale / 2.0**n_bits))
    if logit:
        log_det = log_det + (F.logsigmoid(p) + F.logsigmoid(-p)).flatten(1).sum(1)
        p = torch.sigmoid(p)
    x = torch.floor((p - shift) * (2.0**n_bits / scale)).clamp(0, 2**n_bits - 1)
    return dense_like(x, y, torch.uint8), log_det


# Gaussian density --------------------------------------------------------------------------------------------------------------


def gaussian_terms(z: Tensor, mean: Tensor | None, log_scale: Tensor | None, acc: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """Mean and log scale in the accumulation dtype, broadcast against ``z``; 0 where there is none."""
    per_channel = [v is not None and v.ndim == 1 and z.ndim > 1 for v in (mean, log_scale)]
    return tuple(
        0.0 if v is None else channel_view(v.to(acc), z) if channel else v.to(acc)
        for v, channel in zip((mean, log_scale), per_channel, strict=True)
    )


def gaussian_log_prob(z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> Tensor:
    acc = acc_dtype(z.dtype)
    m, s = gaussian_terms(z, mean, log_scale, acc)
    e = z.to(acc) if mean is None else z.to(acc) - m
    if log_scale is not None:
        e = e * torch.exp(-s)
    log_prob = -0.5 * ((e * e).flatten(1).sum(1) + LOG_2PI * math.prod(z.shape[1:]))
    if log_scale is None:
        return log_prob
    return log_prob - (s.sum() * positions(z) if log_scale.ndim == 1 and z.ndim > 1 else s.flatten(1).sum(1))


def gaussian_log_prob_backward(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None, dlog_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dmean, dlog_scale); no elements for an argument that is None."""
    acc = acc_dtype(z.dtype)
    m, s = gaussian_terms(z, mean, log_scale, acc)
    g = sample_view(dlog_prob.to(acc), z)
    e = z.to(acc) if mean is None else z.to(acc) - m
    if log_scale is not None:
        inverse_scale = torch.exp(-s)
        e = e * inverse_scale
    dz = -g * e if log_scale is None else -g * e * inverse_scale

    def gradient(v: Tensor | None, dv: Callable[[], Tensor]) -> Tensor:
        if v is None:
            return z.new_empty(0)
        return channel_sum(dv()).to(v.dtype) if v.ndim == 1 and z.ndim > 1 else dense_like(dv(), v)

    return dense_like(dz, z), gradient(mean, lambda: -dz), gradient(log_scale, lambda: g * (e * e - 1))


def gaussian_sample(
    size: list[int], mean: Tensor | None, log_scale: Tensor | None, temperature: float, seed: Tensor, offset: int, dtype: torch.dtype,
    normal: Callable = normal_noise,
) -> Tensor:  # fmt: skip
    acc = acc_dtype(dtype)
    z = normal(size, seed, offset, acc)
    m, s = gaussian_terms(z, mean, log_scale, acc)
    if temperature != 1:
        z = z * temperature
    if log_scale is not None:
        z = z * torch.exp(s)
    if mean is not None:
        z = z + m
    return z.to(dtype).contiguous()


# 1x1 convolution ---------------------------------------------------------------------------------------------------------------


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = acc_dtype(x.dtype)
    w, b = weight.to(acc), None if bias is None else bias.to(acc)
    v = x.to(acc)
    if x.ndim == 2:
        y = F.linear(v, w, b)
    elif x.ndim == 4 and x.is_cuda and memory_format(x) == torch.channels_last:
        # cuDNN takes TF32 by default, whose 10 bits no inverse survives; a product of matrices does not
        y = F.linear(v.movedim(1, -1), w, b).movedim(-1, 1)
    elif x.ndim == 4 and not x.is_cuda:
        y = F.conv2d(v, w[:, :, None, None], b)
    else:
        y = torch.matmul(w, v.flatten(2)).unflatten(2, x.shape[2:])
        y = y if b is None else y + channel_view(b, y)
    return dense_like(y, x)


def conv1x1_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias)."""
    acc = acc_dtype(x.dtype)
    dx = dense_like(conv1x1(dy.to(acc), weight.to(acc).mT, None), x)
    rows, columns = (v.to(acc).movedim(1, -1).reshape(-1, v.shape[1]) for v in (dy, x))
    dweight = rows.mT @ columns
    return dx, dweight.to(weight.dtype), rows.sum(0).to(weight.dtype)


def conv1x1_inverse_backward(
    y: Tensor, weight: Tensor, weight_inverse: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, dx, dweight, dbias) of the forward direction, from its output."""
    v = y if bias is None else dense_like(y.to(acc_dtype(y.dtype)) - channel_view(bias, y), y)
    x = conv1x1(v, weight_inverse, None)
    return x, *conv1x1_backward(x, weight, dy)


# triangular solves and LU weights ----------------------------------------------------------------------------------------------

Solve = Callable[[Tensor, Tensor, bool, bool, bool], Tensor]  # triangular_solve, or another that does the same


def triangular_solve(A: Tensor, B: Tensor, upper: bool, unit_diagonal: bool, transpose: bool) -> Tensor:
    left, upper = (A.mT, not upper) if transpose else (A, upper)
    return torch.linalg.solve_triangular(left, B, upper=upper, unitriangular=unit_diagonal).contiguous()


def triangular_solve_backward(
    A: Tensor, X: Tensor, dX: Tensor, upper: bool, unit_diagonal: bool, transpose: bool, solve: Solve = triangular_solve
) -> tuple[Tensor, Tensor]:
    """(dA, dB)."""
    dB = solve(A, dX, upper, unit_diagonal, not transpose)
    dA = -(X @ dB.mT if transpose else dB @ X.mT)
    diagonal = 1 if unit_diagonal else 0
    return (dA.triu(diagonal) if upper else dA.tril(-diagonal)), dB


def _lu_factors(lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor) -> tuple[Tensor, Tensor]:
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return lower.tril(-1) + unit, upper.triu(1) + torch.diag_embed(sign_s * torch.exp(log_s))


def lu_weight(
    perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor, solve: Solve = triangular_solve
) -> tuple[Tensor, Tensor, Tensor]:
    L, U = _lu_factors(lower, upper, log_s, sign_s)
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(L)
    inverse = solve(U, solve(L, unit, False, True, False), True, False, False)
    rows = perm.unsqueeze(-1).expand_as(L)
    return (L @ U).gather(1, rows), inverse.gather(2, rows.mT).contiguous(), log_s.sum(-1)


def lu_weight_backward(
    perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor, weight_inverse: Tensor,
    dweight: Tensor, dweight_inverse: Tensor, dlog_det: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dlower, dupper, dlog_s)."""
    L, U = _lu_factors(lower, upper, log_s, sign_s)
    dweight = dweight - weight_inverse.mT @ dweight_inverse @ weight_inverse.mT
    dA = torch.zeros_like(dweight).scatter(1, perm.unsqueeze(-1).expand_as(dweight), dweight)  # W = A[perm]
    dU = L.mT @ dA
    dlog_s = dU.diagonal(dim1=-2, dim2=-1) * sign_s * torch.exp(log_s) + dlog_det.unsqueeze(-1)
    return (dA @ U.mT).tril(-1), dU.triu(1), dlog_s
