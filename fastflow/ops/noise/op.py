"""fastflow::uniform_noise: counter-based noise, a function of (seed, sample index, element) only."""

import math

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.dispatch import Implementations
from fastflow.ops.layout import acc_dtype
from fastflow.ops.noise import reference
from fastflow.ops.registry import define_compiled, register

ROWS = "(int n, int d, Tensor seed, int offset, bool as_double) -> Tensor"


def _rows(op, size, seed, offset, dtype):
    """The compiled ops draw rows in the dtype that is computed in."""
    rows = op(size[0], math.prod(size[1:]), seed, offset, acc_dtype(dtype) == torch.float64)
    return rows.to(dtype).reshape(size)


register(reference.uniform_noise, triton=True, compiled=("cpu",), compiled_schema=ROWS, call=_rows)
# not an op: gaussian_sample draws it
define_compiled("normal_noise", ROWS)
normal_noise = Implementations(
    "normal_noise", reference.normal_noise, device_of=1, compiled=("cpu",), call=_rows
)


def as_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """``seed`` as the int64 tensor without dimensions that ops take, so that no op waits for its value."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim:
            raise validation.argument_error(
                "seed",
                f"{seed.dtype} of shape {list(seed.shape)}",
                "an int, or an int64 tensor without dimensions",
            )
        return seed.to(device)
    return torch.full(
        (), seed, dtype=torch.int64, device=device
    )  # filled there: a copy would wait, and fail in a captured graph


def random_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A seed from torch's own generator (of ``generator``'s device where one is given), so that torch.manual_seed governs the noise."""
    source = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, device=source).to(device)


def uniform_noise(
    size: tuple[int, ...],
    seed: int | Tensor,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform noise on [0, 1), multiples of 2⁻¹⁶, from Philox4x32-10 (Salmon et al., SC'11) keyed by (seed, sample, element).

    Args:
        size: ``[N, ...]``.
        seed: an int, or an int64 tensor without dimensions.
        offset: index of the first sample: samples ``offset ... offset + N - 1`` of a batch, however it is split.
        device: the seed's where that is a tensor, else torch's default device.

    Example:
        >>> from fastflow.ops import uniform_noise
        >>> whole = uniform_noise((4, 3), seed=1)
        >>> bool((uniform_noise((2, 3), seed=1, offset=2) == whole[2:]).all())
        True
    """
    device = torch.device(device or (seed.device if isinstance(seed, Tensor) else torch.get_default_device()))
    return torch.ops.fastflow.uniform_noise.default(list(size), as_seed(seed, device), offset, dtype)
