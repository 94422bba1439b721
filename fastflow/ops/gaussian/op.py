"""fastflow::gaussian_log_prob with its backward, and fastflow::gaussian_sample."""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import check
from fastflow.ops.gaussian import reference
from fastflow.ops.layout import acc_dtype, channel_sum
from fastflow.ops.noise import as_seed, drawn_normal
from fastflow.ops.registry import register, with_cpu, with_kernel


def _fake(z, mean, log_scale):
    return z.new_empty(z.shape[0], dtype=acc_dtype(z.dtype))


def _fake_backward(z, mean, log_scale, dlog_prob):
    return torch.empty_like(z), *(
        z.new_empty(0) if v is None else torch.empty_like(v) for v in (mean, log_scale)
    )


def _fake_sample(size, mean, log_scale, temperature, seed, offset, dtype):
    return seed.new_empty(size, dtype=dtype)


class GaussianLogProbFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, mean, log_scale)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastflow.gaussian_log_prob.default(z, mean, log_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlog_prob: Tensor):
        z, mean, log_scale = ctx.saved_tensors
        dz, dmean, dlog_scale = torch.ops.fastflow.gaussian_log_prob_backward.default(
            z, mean, log_scale, dlog_prob
        )
        return dz, None if mean is None else dmean, None if log_scale is None else dlog_scale


class GaussianSampleFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, size, mean: Tensor | None, log_scale: Tensor | None, temperature: float, seed, offset, dtype
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            z = torch.ops.fastflow.gaussian_sample.default(
                size, mean, log_scale, temperature, seed, offset, dtype
            )
        ctx.save_for_backward(z, mean, log_scale)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor):
        z, mean, log_scale = ctx.saved_tensors

        def gradient(v: Tensor | None, dv: Tensor) -> Tensor | None:
            if v is None:
                return None
            return channel_sum(dv).to(v.dtype) if v.ndim == 1 and z.ndim > 1 else dv.to(v.dtype)

        m, _ = reference.gaussian_terms(z, mean, None, z.dtype)
        return None, gradient(mean, dz), gradient(log_scale, dz * (z - m)), None, None, None, None


_sample = functools.wraps(reference.gaussian_sample)(
    functools.partial(reference.gaussian_sample, normal=drawn_normal)
)

register(
    "gaussian_log_prob",
    "(Tensor z, Tensor? mean, Tensor? log_scale) -> Tensor",
    with_kernel(with_cpu(reference.gaussian_log_prob), "gaussian"),
    _fake,
    GaussianLogProbFunction,
)
register(
    "gaussian_log_prob_backward",
    "(Tensor z, Tensor? mean, Tensor? log_scale, Tensor dlog_prob) -> (Tensor, Tensor, Tensor)",
    with_kernel(with_cpu(reference.gaussian_log_prob_backward), "gaussian"),
    _fake_backward,
)
register(
    "gaussian_sample",
    "(SymInt[] size, Tensor? mean, Tensor? log_scale, float temperature, Tensor seed, SymInt offset, ScalarType dtype) -> Tensor",
    with_kernel(_sample, "gaussian", on=lambda size, mean, log_scale, temperature, seed, *_: seed),
    _fake_sample,
    GaussianSampleFunction,
)


def _check_term(argument: str, v: Tensor | None, size: tuple[int, ...]) -> None:
    if v is not None and tuple(v.shape) not in (tuple(size), (size[1],)):
        raise check.error(
            argument, check.shape_of(v), f"{list(size)} like z, or [{size[1]}], one for each channel"
        )


def gaussian_log_prob(z: Tensor, mean: Tensor | None = None, log_scale: Tensor | None = None) -> Tensor:
    r"""Log-density of a diagonal Gaussian, :math:`-\sum \tfrac12 (z - \mu)^2 e^{-2 s} + s + \tfrac12 \log 2\pi` over each sample.

    Shape: z ``[N, C, ...]``; mean :math:`\mu` and log_scale :math:`s` like z or ``[C]``, 0 where None; the result ``[N]``, nats, float32
    (float64 for float64 z). Raises ValueError for other shapes, dtypes or devices. Double backward is an error.
    """
    check.floating("z", z)
    for name, v in (("mean", mean), ("log_scale", log_scale)):
        if v is not None:
            check.beside(name, v, "z", z)
            _check_term(name, v, z.shape)
    return torch.ops.fastflow.gaussian_log_prob.default(z, mean, log_scale)


def gaussian_sample(
    size: tuple[int, ...],
    mean: Tensor | None = None,
    log_scale: Tensor | None = None,
    *,
    seed: int | Tensor,
    temperature: float = 1.0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""A sample :math:`z = \mu + T e^{s} \varepsilon`, :math:`\varepsilon` standard normal by Box and Muller from Philox words.

    Args:
        size: ``[N, C, ...]``; mean and log_scale like it or ``[C]``, differentiable.
        seed, offset: noise keyed by (seed, ``offset`` + sample, element), see :func:`fastflow.ops.uniform_noise`.
        temperature: T; 0 gives the mean.

    Raises ValueError for other shapes or devices.
    """
    given = next((v for v in (mean, log_scale, seed) if isinstance(v, Tensor)), None)
    device = torch.device(device or (given.device if given is not None else torch.get_default_device()))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for name, v in (("mean", mean), ("log_scale", log_scale)):
        _check_term(name, v, size)
        if v is not None and v.device != device:
            raise check.error(name, f"device {v.device}", f"{device}, where the sample is drawn")
    return torch.ops.fastflow.gaussian_sample.default(
        list(size), mean, log_scale, temperature, as_seed(seed, device), offset, dtype
    )
