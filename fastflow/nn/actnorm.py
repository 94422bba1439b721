"""Activation normalization."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.distributed import merge_statistics
from fastflow.nn.flow import Flow, check_channels
from fastflow.reversible import Gradients, vjp
from fastflow.state_from_data import takes_state_from_data


class _Group:
    """A process group in the state of a copied module: ``deepcopy`` keeps it, a pickle cannot."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Group":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Group, ()


class ActNorm(Flow):
    r"""Activation normalization, :math:`y = e^{s} (x + b)` per channel (Glow, arXiv:1807.03039, section 3.1).

    The first forward pass in training mode with gradients enabled, or :meth:`initialize`, sets s and b so
    that y has zero mean and unit variance per channel. Before that, the layer is the identity. Eval mode,
    ``torch.no_grad``, the inverse direction of the layer or of a coupling around it, and samples do not
    initialize it. A buffer holds the initialization flag, so a loaded checkpoint is not initialized again.
    Constant channels keep scale 1. An empty batch does not initialize the layer.

    If torch.distributed is initialized, the statistics are computed over the batches of all ranks, and every
    rank must take part, even with an empty batch. Scale and bias are then bit-identical on all ranks.

    Args:
        num_features: number of channels C.
        process_group: ranks that share statistics; None: all ranks. A pickle does not keep it.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`P \sum_c s_c` with P the number of positions of
    a sample (H W for an image, 1 for a vector).
    Raises ValueError if C differs from ``num_features``, and for a ``num_features`` that is no positive
    integer.
    """

    initialized: Tensor

    def __init__(self, num_features: int, process_group: "dist.ProcessGroup | None" = None) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        self.num_features, self.process_group = num_features, process_group
        self.log_scale = nn.Parameter(torch.zeros(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("initialized", torch.tensor(False))
        self._read = False  # a Python copy of the flag, so that forward does not synchronize to read it

    @property
    def _initialized(self) -> bool:
        # read until it is true: DistributedDataParallel broadcasts the buffer, and users may set it directly
        if not self._read and not torch.compiler.is_compiling() and not self.initialized.is_meta:
            self._read = bool(self.initialized)
        return self._read

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set scale and bias from the statistics of ``x``, also if they were set before."""
        check_channels(x, self.num_features)
        mean, var = (
            ops.actnorm_statistics(x)
            if x.numel()
            else (torch.zeros_like(self.bias), torch.zeros_like(self.bias))
        )
        count, mean, var = merge_statistics(x.numel() // self.num_features, mean, var, self.process_group)
        if not count:
            return
        std = var.sqrt()
        # a smaller deviation is rounding noise, and scaling it up would give noise or infinities
        constant = std <= 1e-6 * mean.abs() + torch.finfo(std.dtype).tiny
        self.log_scale.copy_(
            torch.where(constant, torch.zeros_like(std), -torch.log(torch.where(constant, 1.0, std)))
        )
        self.bias.copy_(-mean)
        self.initialized.fill_(True)
        self._read = True

    @property
    def _pending(self) -> bool:
        """Whether a forward pass would initialize the layer from its batch."""
        return takes_state_from_data(self.training) and not self._initialized

    def initialize_once(self, x: Tensor) -> None:
        """Initialize from ``x`` if the layer is pending: once, in training mode with gradients enabled."""
        if self._pending:
            self.initialize(x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        self.initialize_once(x)
        return ops.actnorm(x, self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        return ops.actnorm(z, self.log_scale, self.bias, inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        with torch.enable_grad():
            log_scale, bias = self.log_scale, self.bias
        x, dx, *gradients = ops.actnorm_inverse_backward(z, log_scale.detach(), bias.detach(), dz, dlog_det)
        return x, dx, vjp((log_scale, bias), gradients, wanted)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read = not self.initialized.is_meta and bool(self.initialized)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": self.process_group and _Group(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state.get("process_group")
        super().__setstate__(state | {"process_group": group.group if isinstance(group, _Group) else group})

    def extra_repr(self) -> str:
        return f"{self.num_features}"
