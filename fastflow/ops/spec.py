"""Cases of the ops, which drive the generic tests, the sanitizer's run and the tables: an op cannot be forgotten there.

``fastflow/ops/NAME/spec.py`` has a function ``cases(make, shape)`` for the ops of its folder, as PyTorch's OpInfo has
sample inputs. ``make`` decides dtype, layout and device, so one function serves every test.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype
from fastflow.ops.registry import folders


@dataclass(frozen=True)
class Case:
    """A call of ``torch.ops.fastflow.OP``.

    Attributes:
        op: the op's name.
        variant: tells the cases of an op apart.
        args: the arguments.
        bytes_moved: bytes per element of x that the Triton kernels move in float32, each tensor once; None if there is
            no kernel that the interpreter can count.
        launches: kernels launched; the second of two adds up what the programs of the first have summed.
        tolerance: factor on ``bytes_moved`` for what a value per channel, sample or program adds.
    """

    op: str
    variant: str
    args: tuple
    bytes_moved: float | None = None
    launches: int = 1
    tolerance: float = 1.05

    def __str__(self) -> str:
        return f"{self.op} {self.variant}".strip()

    def __call__(self) -> object:
        return getattr(torch.ops.fastflow, self.op).default(*self.args)


@dataclass(frozen=True)
class Make:
    """Makes the tensors of cases.

    Attributes:
        dtype: of tensors like x. Gradients of log-dets and log-densities have its accumulation dtype.
        lay_out: puts a tensor like x into a memory layout.
    """

    dtype: torch.dtype = torch.float32
    lay_out: Callable[[Tensor], Tensor] = torch.Tensor.contiguous

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal, in dtype and layout."""
        return self.lay_out(torch.randn(shape).to(self.dtype))

    def per_channel(self, channels: int) -> Tensor:
        return 0.5 * torch.randn(channels, dtype=acc_dtype(self.dtype))

    def per_sample(self, samples: int) -> Tensor:
        return torch.randn(samples, dtype=acc_dtype(self.dtype))

    def pixels(self, *shape: int) -> Tensor:
        return self.lay_out(torch.randint(0, 256, shape, dtype=torch.uint8))


def cases(make: Make, shape: tuple[int, ...], folder: str | None = None) -> Iterator[Case]:
    """The cases of every op (of one folder), for an x of ``shape`` ``[N, C, H, W]`` with C a multiple of 4 and even H, W."""
    for name in folders() if folder is None else [folder]:
        yield from importlib.import_module(f"fastflow.ops.{name}.spec").cases(make, shape)
