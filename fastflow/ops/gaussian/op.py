"""fastflow::gaussian_log_prob with its backward, and fastflow::gaussian_sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.gaussian import reference
from fastflow.ops.noise import as_seed, normal_noise
from fastflow.ops.registry import register


def _check_term(argument: str, v: Tensor, size: Sequence[int]) -> None:
    if tuple(v.shape) not in (tuple(size), (size[1],)):
        raise validation.argument_error(
            argument, validation.shape_of(v), f"{list(size)} like z, or [{size[1]}], one for each channel"
        )


def _check(argument: str, z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> None:
    validation.floating_point(argument, z)
    for name, v in (("mean", mean), ("log_scale", log_scale)):
        if v is not None:
            validation.same_device_and_precision(name, v, argument, z)
            _check_term(name, v, z.shape)


def _check_sample(
    argument: str, size: list[int], mean: Tensor | None, log_scale: Tensor | None, seed: Tensor
) -> None:
    for name, v in (("mean", mean), ("log_scale", log_scale)):
        if v is not None:
            _check_term(name, v, size)
            if v.device != seed.device:
                raise validation.argument_error(
                    name, f"device {v.device}", f"{seed.device}, the device of the sample"
                )


def _sample(size, mean, log_scale, temperature, seed, offset, dtype):
    return reference.gaussian_sample_by(normal_noise, size, mean, log_scale, temperature, seed, offset, dtype)


register(reference.gaussian_log_prob_backward, triton=True, compiled=("cpu",))
register(
    reference.gaussian_log_prob,
    check=_check,
    triton=True,
    compiled=("cpu",),
    outputs="log_prob",
    backward=reference.gaussian_log_prob_backward,
    gradients="z mean log_scale",
    batched="z mean log_scale",
)
register(
    reference.gaussian_sample,
    check=_check_sample,
    triton=True,
    fallback=_sample,
    outputs="z",
    backward=reference.gaussian_sample_backward,
    gradients="mean log_scale",
)


def gaussian_log_prob(z: Tensor, mean: Tensor | None = None, log_scale: Tensor | None = None) -> Tensor:
    r"""Log-density of a diagonal Gaussian.

    It is :math:`-\sum \tfrac12 (z - \mu)^2 e^{-2 s} + s + \tfrac12 \log 2\pi`, summed over each sample.

    Args:
        z: latents.
        mean, log_scale: :math:`\mu` and :math:`s`; None means 0.

    Shape: z ``[N, C, ...]``; mean, log_scale the same or ``[C]``; the result ``[N]``, nats, float32 (float64
    for float64 z).

    Raises ValueError for other shapes, dtypes or devices.
    """
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
    r"""Samples a diagonal Gaussian.

    The sample is :math:`z = \mu + T e^{s} \varepsilon` with standard normal :math:`\varepsilon`. The
    Box-Muller transform makes :math:`\varepsilon` from Philox words.

    Args:
        size: shape ``[N, C, ...]`` of z.
        mean, log_scale: :math:`\mu` and :math:`s`, of that shape or ``[C]``, differentiable; None means 0.
        seed, offset: the noise is keyed by (seed, ``offset`` + sample, element); see
            :func:`fastflow.ops.uniform_noise`.
        temperature: T; 0 gives the mean.
        dtype: dtype of z.
        device: device of z; by default the device of mean, log_scale or seed, else torch's default device.

    Raises ValueError for other shapes or devices.
    """
    given = next((v for v in (mean, log_scale, seed) if isinstance(v, Tensor)), None)
    device = torch.device(device or (given.device if given is not None else torch.get_default_device()))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return torch.ops.fastflow.gaussian_sample.default(
        list(size), mean, log_scale, temperature, as_seed(seed, device), offset, dtype
    )
