"""Chains of flow layers."""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from fastflow import validation
from fastflow.deprecation import renamed_arguments, renamed_property
from fastflow.nn.flow import Flow
from fastflow.nn.lu_linear import shared_inverses, shared_matrices
from fastflow.reversible import has_hooks, run_reversible, run_storing, zero_log_det
from fastflow.state_from_data import state_from_data


class Sequential(Flow):
    r"""A chain of flows, :math:`z = f_K(\dots f_1(x))`; its log-det is the sum of the flows' log-dets.

    Every flow receives the same ``context``. Backward recomputes activations from z instead of storing them,
    so it relies on exact inverses, see docs/memory.md.

    Args:
        flows: flows, applied in order. Nested Sequentials are flattened if their options agree.
        reversible: recompute activations in backward. False stores them. Set it to False for flows without an
            inverse, and to compile the whole chain with torch.compile.
        activation_checkpoint_every: number of flows between two stored activations. Rounding errors
            accumulate over at most this many flows.

    Shape: x, z as the first flow takes and the last one returns them; log_det ``[N]``, nats.
    Raises TypeError for a module that is not a :class:`Flow` (:class:`Split` has three outputs and belongs in
    a model), and ValueError if ``activation_checkpoint_every`` is neither None nor a positive integer.

    Example:
        >>> import torch
        >>> from fastflow.nn import ActNorm, AffineCoupling, InvertibleConv1x1, Sequential
        >>> flow = Sequential(ActNorm(4), InvertibleConv1x1(4), AffineCoupling(torch.nn.Linear(2, 4)))
        >>> z, log_det = flow(torch.randn(8, 4))
    """

    @renamed_arguments(checkpoint_every="activation_checkpoint_every")
    def __init__(
        self, *flows: Flow, reversible: bool = True, activation_checkpoint_every: int | None = None
    ) -> None:
        super().__init__()
        validation.positive_int("activation_checkpoint_every", activation_checkpoint_every, optional=True)
        validation.boolean("reversible", reversible)
        for i, flow in enumerate(flows):
            if not isinstance(flow, Flow):
                raise TypeError(f"flows[{i}]: got {type(flow).__name__}, expected a Flow")
        self.flows = cast("Sequence[Flow]", nn.ModuleList(flows))
        self.reversible, self.activation_checkpoint_every = reversible, activation_checkpoint_every

    checkpoint_every = renamed_property("checkpoint_every", "activation_checkpoint_every")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.reversible:
            return run_reversible(
                list(self._flat()),
                x,
                context,
                shared_args=shared_matrices,
                activation_checkpoint_every=self.activation_checkpoint_every,
            )
        return run_storing(self.flows, x, context, shared_args=shared_matrices)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = zero_log_det(z)
        with state_from_data(False):
            shared_args = shared_inverses(self.flows)
            for flow, args in zip(reversed(self.flows), reversed(shared_args), strict=True):
                z, step = flow.inverse(z, context, *args)
                log_det = log_det + step
        return z, log_det

    def _flat(self) -> Iterator[Flow]:
        """The flows with nested Sequentials flattened, so that backward recomputes one flow at a time."""
        for flow in self.flows:
            if (
                type(flow) is Sequential
                and flow.reversible
                and flow.activation_checkpoint_every in (None, self.activation_checkpoint_every)
                and not has_hooks(flow)
                and flow._compiled_call_impl is None
            ):
                yield from flow._flat()
            else:
                yield flow

    def __len__(self) -> int:
        return len(self.flows)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self.flows)

    def __getitem__(self, index: int) -> Flow:
        return self.flows[index]
