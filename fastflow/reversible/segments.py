r"""Autograd of segments of a chain of invertible steps. Memory for backward does not grow with their length.

Forward stores the output of a segment. Backward goes from there to its input: each step computes
:math:`(x, \partial x, \text{gradients})` from :math:`(z, \partial z, \partial \log\det)`. The general rule
inverts the step, runs it again and differentiates that; a step can have its own rule, the method
``inverse_backward``. The idea is from RevNet (arXiv:1707.04585, section 3.2).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parameter import is_lazy

from fastflow.deprecation import renamed_arguments
from fastflow.reversible.log_det import zero_log_det
from fastflow.reversible.rules import has_its_own_rule
from fastflow.reversible.state import (
    ChangeDetector,
    Replay,
    autocast_settings,
    buffers_restored,
    copied_buffers,
    drawing,
    generators_of,
    hooks_suspended,
    no_parametrization_cache,
    parameters_in_place,
    replaying,
    rng_restored,
    same_autocast,
    training_modes,
)
from fastflow.reversible.vjp import Gradients, add, vjp
from fastflow.state_from_data import state_from_data, takes_state_from_data

Step = TypeVar("Step", bound=nn.Module)
SharedArgs = Callable[[list[Step]], Sequence[tuple[Tensor | None, ...]]]
# error of forward(inverse(z)) relative to 1 + max|z|; beyond it, gradients are useless and backward raises
NO_INVERSE = 0.05


@renamed_arguments(weights="shared_args")
def run_storing(
    steps: Iterable[Step],
    x: Tensor,
    context: Tensor | None = None,
    *,
    shared_args: SharedArgs[Step] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the chain with stored activations, as plain PyTorch does; arguments as :func:`run_reversible`."""
    steps = list(steps)
    log_det = zero_log_det(x)
    for step, args in zip(steps, _shared_args(steps, shared_args), strict=True):
        x, step_log_det = step(x, context, *args)
        log_det = log_det + step_log_det
    return x, log_det


def run_segments(
    steps: list[Step], x: Tensor, context: Tensor | None, shared_args: SharedArgs[Step] | None, length: int
) -> tuple[Tensor, Tensor]:
    """Run the chain in segments of ``length`` steps; each segment stores only its output for backward."""
    segments = [
        _Segment(steps[start : start + length], shared_args, start) for start in range(0, len(steps), length)
    ]
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(
            f"context: got {type(context).__name__}, expected a tensor or None; or pass reversible=False"
        )
    parameters = [p for segment in segments for p in segment.distinct]
    if not any(t is not None and t.requires_grad for t in (x, context, *parameters)) or any(
        map(is_lazy, parameters)
    ):
        return run_storing(steps, x, context, shared_args=shared_args)
    if any("_is_replica" in vars(step) for step in steps):  # replicas of nn.DataParallel have no parameters
        return run_storing(steps, x, context, shared_args=shared_args)
    for i, step in enumerate(steps):
        if getattr(getattr(step, "inverse", None), "__isabstractmethod__", not hasattr(step, "inverse")):
            raise ValueError(
                f"steps[{i}]: {type(step).__name__} has no inverse, "
                "expected a step with one; or pass reversible=False"
            )
    log_det = zero_log_det(x)
    for segment in segments:
        # asked here, because gradients are disabled within the function
        segment.takes_state = takes_state_from_data(training=True)
        place = _Place.apply(x) if x.requires_grad else None
        x, part = _Reversible.apply(segment, place, x.detach(), context, *segment.distinct)
        log_det = log_det + part
    return x, log_det


def _shared_args(
    steps: list[Step], shared_args: SharedArgs[Step] | None
) -> Sequence[tuple[Tensor | None, ...]]:
    """Arguments of each step after the context."""
    return [()] * len(steps) if shared_args is None else shared_args(steps)


class _Context(FunctionCtx):
    segment: "_Segment"
    saved_tensors: tuple[Tensor, Tensor | None, Tensor | None]
    needs_input_grad: tuple[bool, ...]


class _Reversible(torch.autograd.Function):
    """Autograd of one segment. Parameters are inputs, so that their hooks run.

    ``place`` stands for x in the graph of autograd, and ``x`` has no gradient.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        segment: "_Segment",
        place: Tensor | None,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        z, log_det = segment.forward(x, None if context is None else context.detach())
        ctx.segment = segment
        ctx.save_for_backward(z, context, place)  # pyright: ignore[reportArgumentType] # None is accepted
        return z, log_det

    @staticmethod
    def backward(ctx: _Context, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        dz, dlog_det = cotangents
        z, context, place = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            dx, dcontext, gradients = ctx.segment.differentiable_backward(z, place, context, dz, dlog_det)
        else:
            dx, dcontext, gradients = ctx.segment.backward(z, context, dz, dlog_det, ctx.needs_input_grad[1])
        return None, dx, None, dcontext, *(gradients.get(p) for p in ctx.segment.distinct)


class _Place(torch.autograd.Function):
    """The place of x in the graph of autograd, without its values: one element, expanded to the shape of x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *dx: Tensor) -> Tensor:
        return dx[0]


class _Put(torch.autograd.Function):
    """Values of x, recomputed, at its place in the graph of autograd."""

    @staticmethod
    def forward(ctx: FunctionCtx, place: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *dx: Tensor) -> tuple[Tensor, None]:
        return dx[0], None


class _Segment:
    """One pass through consecutive steps, with the state that backward restores to run them again."""

    takes_state: bool  # set before the segment runs

    def __init__(self, steps: list[Step], shared_args: SharedArgs[Step] | None, start: int) -> None:
        # Any: the type of a module's attributes hides that inverse is a method
        self.steps: list[Any] = list(steps)
        self.shared_args, self.start = shared_args, start
        self.modules = [tuple(step.modules()) for step in steps]
        self.rules = [
            has_its_own_rule(step, modules) for step, modules in zip(steps, self.modules, strict=True)
        ]
        # not step.parameters(), which takes as long as a kernel; this has each parameter once, too
        self.parameters: list[tuple[Tensor, ...]] = [
            tuple[Tensor, ...](
                {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
            )
            for modules in self.modules
        ]
        self.distinct: tuple[Tensor, ...] = tuple(
            {id(p): p for each in self.parameters for p in each}.values()
        )
        self.places: list[tuple[nn.Module, str, Tensor | None]] = [
            (m, name, p) for modules in self.modules for m in modules for name, p in m._parameters.items()
        ]

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        self.modes = tuple(m.training for each in self.modules for m in each)
        self.autocast = autocast_settings(x.device)
        self.generators = generators_of(x.device, self.steps)
        self.replays: list[Replay] = []
        log_det = zero_log_det(x)
        with same_autocast(self.autocast), no_parametrization_cache(), state_from_data(self.takes_state):
            states = [get() for get, _ in self.generators]
            shared = _shared_args(self.steps, self.shared_args)
            for i, (step, args) in enumerate(zip(self.steps, shared, strict=True)):
                buffers = copied_buffers(self.modules[i], self.rules[i])
                parameters = ChangeDetector(self.parameters[i]) if buffers else None
                x, step_log_det = step(x, context, *args)
                if not isinstance(step_log_det, Tensor) or step_log_det.shape != log_det.shape:
                    got = (
                        list(step_log_det.shape)
                        if isinstance(step_log_det, Tensor)
                        else type(step_log_det).__name__
                    )
                    expected = f"{list(log_det.shape)}, one value per sample"
                    where = f"steps[{self.start + i}] ({type(step).__name__})"
                    raise ValueError(f"log_det of {where}: got {got}, expected {expected}")
                if parameters is not None and parameters.changed() is not None:
                    # the step has initialized itself, which happens once
                    buffers = copied_buffers(self.modules[i], self.rules[i])
                before, states = states, [get() for get, _ in self.generators]
                self.replays.append(Replay(before, states, buffers))
                if self.replays[-1].states:
                    drawing.add(step)
                log_det = log_det + step_log_det
        moved = {(id(m), name) for replay in self.replays for m, name, *_ in replay.buffers}
        still = [
            b
            for each in self.modules
            for m in each
            for name, b in m._buffers.items()
            if b is not None and (id(m), name) not in moved
        ]
        self.watched = ChangeDetector(
            (*self.distinct, *{id(b): b for b in still if not b.is_inference()}.values())
        )
        if any(m._parameters.get(name) is not p for m, name, p in self.places):
            raise RuntimeError(
                "parameters of a reversible chain were exchanged for others while it ran; "
                "pass reversible=False"
            )
        return x, log_det

    def backward(
        self, z: Tensor, context: Tensor | None, dz: Tensor, dlog_det: Tensor, need_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, Gradients]:
        """``(dx, dcontext, gradients of parameters)``."""
        self._assert_unchanged()
        context = None if context is None else context.detach().requires_grad_(context.requires_grad)
        gradients: Gradients = {}

        with self._as_it_was():
            with torch.enable_grad():
                shared = _shared_args(self.steps, self.shared_args)
            leaves = [
                tuple(None if v is None else v.detach().requires_grad_(v.requires_grad) for v in each)
                for each in shared
            ]
            for i in reversed(range(0 if need_dx else self._first(context), len(self.steps))):
                args = (context, *leaves[i])
                wanted = [v for v in (*self.parameters[i], *args) if v is not None and v.requires_grad]
                rule = self.steps[i].inverse_backward if self.rules[i] else self._general_rule(i)
                self.replays[i].restore(self.generators)
                z, dz, found = rule(z, dz, dlog_det, wanted, *args)
                add(gradients, found)
            if self.shared_args is not None:
                pairs = [
                    (v, gradients.pop(leaf, None))
                    for vs, ls in zip(shared, leaves, strict=True)
                    for v, leaf in zip(vs, ls, strict=True)
                    if leaf is not None
                ]
                pairs = [(v, g) for v, g in pairs if g is not None]
                add(
                    gradients,
                    vjp(
                        [v for v, _ in pairs],
                        [g for _, g in pairs],
                        [p for p in self.distinct if p.requires_grad],
                    ),
                )
        return dz if need_dx else None, None if context is None else gradients.pop(context, None), gradients

    def differentiable_backward(
        self, z: Tensor, place: Tensor | None, context: Tensor | None, dz: Tensor, dlog_det: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Gradients]:
        """:meth:`backward` with a graph of the gradients, which stores the activations of the segment.

        It inverts all steps, runs them again and differentiates that. x, context and parameters are views, through
        which no other use of theirs is differentiated.
        """
        self._assert_unchanged()
        with self._as_it_was():
            with torch.no_grad():
                x, shared = z.detach(), _shared_args(self.steps, self.shared_args)
                for i in reversed(range(len(self.steps))):
                    self.replays[i].restore_flows()
                    x = self.steps[i].inverse(x, context, *shared[i])[0]
            views = {p: p.view_as(p) for p in self.distinct if p.requires_grad}
            exchanged = [(m, name, None if p is None else views.get(p, p)) for m, name, p in self.places]
            with parameters_in_place(exchanged), replaying():
                x = first = x.detach() if place is None else _Put.apply(place, x.detach())
                context = None if context is None else context.view_as(context)
                log_det = zero_log_det(x)
                shared = _shared_args(self.steps, self.shared_args)
                for i, step in enumerate(self.steps):
                    self.replays[i].restore(self.generators)
                    x, step_log_det = step(x, context, *shared[i])
                    log_det = log_det + step_log_det
            self._assert_inverse(len(self.steps) - 1, x.detach(), z.detach())
            wanted = [v for v in (first, context, *views.values()) if v is not None and v.requires_grad]
            found = vjp((x, log_det), (dz, dlog_det), wanted, create_graph=True)
        gradients = {p: found[view] for p, view in views.items() if view in found}
        return found.get(first), None if context is None else found.get(context), gradients

    def _first(self, context: Tensor | None) -> int:
        """Index of the first step that needs a gradient."""
        if self.shared_args is not None or (context is not None and context.requires_grad):
            return 0
        wanting = (
            i for i, parameters in enumerate(self.parameters) if any(p.requires_grad for p in parameters)
        )
        return next(wanting, len(self.steps))

    def _general_rule(self, i: int) -> Callable[..., tuple[Tensor, Tensor, Gradients]]:
        """Rule for a step without ``inverse_backward``: invert it, run it again, differentiate that."""
        step = self.steps[i]

        def rule(
            z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], *args: Tensor | None
        ) -> tuple[Tensor, Tensor, Gradients]:
            self.replays[i].restore_flows()
            x = step.inverse(z, *args)[0].detach()
            x.requires_grad_(x.is_floating_point() or x.is_complex())
            self.replays[i].restore(self.generators)
            with torch.enable_grad():
                # a view, because hooks on a module's input do not accept a leaf
                z_again, log_det = step(x.view_as(x), *args)
            self._assert_inverse(i, z_again.detach(), z)
            found = vjp((z_again, log_det), (dz, dlog_det), [x, *wanted] if x.requires_grad else wanted)
            dx = found.pop(x, None)
            return x.detach(), torch.zeros_like(x) if dx is None else dx, found

        return rule

    def _assert_inverse(self, i: int, z_again: Tensor, z: Tensor) -> None:
        if z.device.type != "cpu" or not z.numel():
            return
        error, largest = (z_again - z).abs().max().item(), z.abs().max().item()
        if error > NO_INVERSE * (1 + largest):
            step = type(self.steps[i]).__name__
            raise RuntimeError(
                f"steps[{self.start + i}]: forward(inverse(z)) of {step} is off by {error:.1e}, with max|z| "
                f"{largest:.1e}: the inverse is inaccurate here; fix it or pass reversible=False"
            )

    def _assert_unchanged(self) -> None:
        changed = self.watched.changed()
        if changed is None:
            return
        named = (
            (i, n, p)
            for i, step in enumerate(self.steps)
            for n, p in (*step.named_parameters(), *step.named_buffers())
        )
        name = next((f"steps[{self.start + i}].{n}" for i, n, p in named if p is changed), "a parameter")
        raise RuntimeError(
            f"{name} of a reversible chain changed between forward and backward, which recomputes "
            "activations from it: call backward before the optimizer step, and before a module writes to it; "
            "or pass reversible=False"
        )

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Restore the state of the forward pass within the block, so that steps run as in forward."""
        modules = [m for each in self.modules for m in each]
        draws = any(replay.states for replay in self.replays)
        with ExitStack() as stack:
            for manager in (
                same_autocast(self.autocast),
                no_parametrization_cache(),
                training_modes(modules, self.modes),
                state_from_data(self.takes_state),
                parameters_in_place(self.places),
                hooks_suspended(self.distinct),
                buffers_restored((m, name) for replay in self.replays for m, name, *_ in replay.buffers),
                rng_restored(self.generators if draws else []),
            ):
                stack.enter_context(manager)
            yield
