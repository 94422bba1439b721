"""Cases of the ops, which drive the generic tests, the sanitizer's run and the tables.

``fastflow/ops/NAME/spec.py`` has a function ``cases(make, shape)`` for the ops of its folder, similar to the
sample inputs of PyTorch's OpInfo. ``make`` sets dtype, layout and device, so all tests use the same
function.

The file may also have ``LIMITS``, a dict. For an op and a device (``"cuda"`` or ``"cpu"``) it describes the
arguments that the kernel takes, for the table in docs/backends.md.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype
from fastflow.ops.registry import OPS, folders


@dataclass(frozen=True)
class Case:
    """A call of ``torch.ops.fastflow.OP``.

    Attributes:
        op: name of the op.
        variant: name of the case, unique for the op.
        args: arguments of the call.
        bytes_moved: bytes per element of x that the kernels move in float32, counting each tensor once; None
            if there is no fixed number. The interpreter counts the bytes of Triton kernels.
        launches: number of kernel launches. If it is 2, the second kernel adds the sums of the first one's
            programs.
        operations: names of the PyTorch operations that the launcher calls, such as matrix products.
        tolerance: factor on ``bytes_moved`` that allows for values per channel, sample or program.
        ill_conditioned: whether rounding of the inputs changes results by more than float32's tolerance. Errors are
            then compared with those of the reference in the same dtype, as in half precision.
    """

    op: str
    variant: str
    args: tuple[Any, ...]
    bytes_moved: int | None = None
    launches: int = 1
    operations: tuple[str, ...] = ()
    tolerance: float = 1.05
    ill_conditioned: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.variant}".strip()

    def __call__(self) -> object:
        return getattr(torch.ops.fastflow, self.op).default(*self.args)


@dataclass(frozen=True)
class Make:
    """Makes the tensors of cases.

    Attributes:
        dtype: dtype of tensors like x. Gradients of log-dets and log-densities have its accumulation dtype.
        lay_out: converts a tensor like x to a memory layout.
    """

    dtype: torch.dtype = torch.float32
    lay_out: Callable[[Tensor], Tensor] = torch.Tensor.contiguous

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal tensor in this dtype and layout."""
        return self.lay_out(torch.randn(shape).to(self.dtype))

    def per_channel(self, channels: int) -> Tensor:
        return 0.5 * torch.randn(channels, dtype=acc_dtype(self.dtype))

    def per_sample(self, samples: int) -> Tensor:
        return torch.randn(samples, dtype=acc_dtype(self.dtype))

    def pixels(self, *shape: int) -> Tensor:
        return self.lay_out(torch.randint(0, 256, shape, dtype=torch.uint8))


def cases(make: Make, shape: tuple[int, ...], folder: str | None = None) -> Iterator[Case]:
    """Cases of every op, or of one folder.

    ``shape`` is the shape ``[N, C, H, W]`` of x; C must be a multiple of 4, H and W even.
    """
    for name in folders() if folder is None else [folder]:
        yield from importlib.import_module(f"fastflow.ops.{name}.spec").cases(make, shape)


@functools.cache
def bytes_per_element(op: str, variant: str = "") -> int:
    """``bytes_moved`` of a case. Raises ValueError if there is no such case, or if it has no such number."""
    found = cases(Make(), (2, 4, 2, 2), OPS[op].folder)
    known = {(case.op, case.variant): case.bytes_moved for case in found}
    moved = known.get((op, variant))
    if moved is None:
        raise ValueError(f"variant: got {variant!r} of {op}, expected a case with bytes_moved: {known}")
    return moved
