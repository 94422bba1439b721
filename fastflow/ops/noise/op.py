"""fastflow::uniform_noise: counter-based noise that depends only on (seed, sample index, element)."""

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
    """Calls a compiled op, which draws one row per sample in the accumulation dtype."""
    rows = op(size[0], math.prod(size[1:]), seed, offset, acc_dtype(dtype) == torch.float64)
    return rows.to(dtype).reshape(size)


register(reference.uniform_noise, triton=True, compiled=("cpu",), compiled_schema=ROWS, call=_rows)
# not an op: only gaussian_sample uses it
define_compiled("normal_noise", ROWS)
normal_noise = Implementations(
    "normal_noise", "noise", reference.normal_noise, device_of=1, compiled=("cpu",), call=_rows
)


def as_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """Converts ``seed`` to a 0-dimensional int64 tensor, so that no op synchronizes to read its value."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim:
            raise validation.argument_error(
                "seed",
                f"{seed.dtype} of shape {list(seed.shape)}",
                "an int, or an int64 tensor without dimensions",
            )
        return seed.to(device)
    # filled on the device: a copy would synchronize, and fail in a captured graph
    return torch.full((), seed, dtype=torch.int64, device=device)


def random_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draws a seed from ``generator`` or torch's default generator, which torch.manual_seed seeds."""
    source = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, device=source).to(device)


def uniform_noise(
    size: tuple[int, ...],
    seed: int | Tensor,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform noise on [0, 1), multiples of 2⁻¹⁶, that depends only on (seed, sample, element).

    Source: Philox4x32-10 (Salmon et al., SC'11).

    Args:
        size: shape ``[N, ...]`` of the noise.
        seed: an int, or a 0-dimensional int64 tensor.
        offset: index of the first sample. The result is the noise of samples ``offset ... offset + N - 1``
            of a batch, for any split of the batch.
        dtype: dtype of the noise.
        device: device of the noise; by default the device of seed if it is a tensor, else torch's default
            device.

    Raises ValueError for a seed that is a tensor of another shape or dtype.

    Example:
        >>> from fastflow.ops import uniform_noise
        >>> whole = uniform_noise((4, 3), seed=1)
        >>> bool((uniform_noise((2, 3), seed=1, offset=2) == whole[2:]).all())
        True
    """
    device = torch.device(device or (seed.device if isinstance(seed, Tensor) else torch.get_default_device()))
    return torch.ops.fastflow.uniform_noise.default(list(size), as_seed(seed, device), offset, dtype)
