"""A chain of flows."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastflow.nn.flow import Flow
from fastflow.ops import acc_dtype


class Sequential(Flow):
    r"""A chain of flows, :math:`z = f_K(\dots f_1(x))`; its log-det is the sum of theirs.

    Every flow gets the same ``context``. Raises TypeError for a module that is no :class:`Flow` (a ``Split`` has three outputs and
    belongs into a model).

    Example:
        >>> flow = Sequential(ActNorm(4), InvertibleConv1x1(4), AffineCoupling(torch.nn.Linear(2, 4)))
        >>> z, log_det = flow(torch.randn(8, 4))
    """

    def __init__(self, *flows: Flow) -> None:
        super().__init__()
        for i, flow in enumerate(flows):
            if not isinstance(flow, Flow):
                raise TypeError(f"flows[{i}]: got {type(flow).__name__}, expected a Flow")
        self.flows = nn.ModuleList(flows)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._chain(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._chain(z, context, inverse=True)

    def _chain(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros(x.shape[0], dtype=acc_dtype(x.dtype), device=x.device)
        for flow in reversed(self.flows) if inverse else self.flows:
            x, step = flow.inverse(x, context) if inverse else flow(x, context)
            log_det = log_det + step
        return x, log_det

    def __len__(self) -> int:
        return len(self.flows)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self.flows)

    def __getitem__(self, index: int) -> Flow:
        return self.flows[index]
