"""A chain of flows."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastflow import check
from fastflow.nn.flow import Flow
from fastflow.ops import acc_dtype
from fastflow.reversible import has_hooks, reversible, stored


class Sequential(Flow):
    r"""A chain of flows, :math:`z = f_K(\dots f_1(x))`; its log-det is the sum of theirs.

    Every flow gets the same ``context``. Its backward pass recomputes activations from z instead of keeping them, which takes the flows'
    inverses at their word: see docs/memory.md.

    Args:
        flows: of which one after the other runs; a Sequential among them counts as its own, unless it says otherwise below.
        reversible: False keeps every activation, as a flow without an inverse wants it, and torch.compile of the whole chain.
        checkpoint_every: keep the activation after every so many flows all the same; rounding then adds up over no more than these.

    Raises TypeError for a module that is no :class:`Flow` (a ``Split`` has three outputs and belongs into a model).

    Example:
        >>> import torch
        >>> from fastflow.nn import ActNorm, AffineCoupling, InvertibleConv1x1, Sequential
        >>> flow = Sequential(ActNorm(4), InvertibleConv1x1(4), AffineCoupling(torch.nn.Linear(2, 4)))
        >>> z, log_det = flow(torch.randn(8, 4))
    """

    def __init__(self, *flows: Flow, reversible: bool = True, checkpoint_every: int | None = None) -> None:
        super().__init__()
        check.count("checkpoint_every", checkpoint_every, optional=True)
        for i, flow in enumerate(flows):
            if not isinstance(flow, Flow):
                raise TypeError(f"flows[{i}]: got {type(flow).__name__}, expected a Flow")
        self.flows = nn.ModuleList(flows)
        self.reversible, self.checkpoint_every = reversible, checkpoint_every

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.reversible:
            return reversible(list(self._flat()), x, context, checkpoint_every=self.checkpoint_every)
        return stored(self.flows, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros(z.shape[0], dtype=acc_dtype(z.dtype), device=z.device)
        for flow in reversed(self.flows):
            z, step = flow.inverse(z, context)
            log_det = log_det + step
        return z, log_det

    def _flat(self) -> Iterator[Flow]:
        """The flows, and in place of a Sequential among them its own, so that each is recomputed alone."""
        for flow in self.flows:
            alike = (
                type(flow) is Sequential
                and flow.reversible
                and flow.checkpoint_every in (None, self.checkpoint_every)
            )
            if alike and not has_hooks(flow) and flow._compiled_call_impl is None:
                yield from flow._flat()
            else:
                yield flow

    def __len__(self) -> int:
        return len(self.flows)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self.flows)

    def __getitem__(self, index: int) -> Flow:
        return self.flows[index]
