r"""Backprop through a chain of invertible steps from its output: what is kept for it does not grow with the chain's length.

The forward pass keeps the chain's output. The backward pass walks from there to the input: each step gives
:math:`(x, \partial x, \text{gradients})` from :math:`(z, \partial z, \partial \log\det)`, by inverting itself, running again and
differentiating that, or by a rule of its own, its method ``inverse_backward`` (the idea: RevNet, arXiv:1707.04585, section 3.2).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

Gradients = dict[Tensor, Tensor]
Weights = Callable[[list[nn.Module]], list[tuple[Tensor, ...]]]
NO_INVERSE = (
    0.05  # of the largest value: an inverse that is farther off than this gives no gradient worth having
)


def stored(
    steps: Sequence[nn.Module], x: Tensor, context: Tensor | None = None, *, weights: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """The chain as PyTorch runs it, every activation kept for backward. Arguments as :func:`reversible`."""
    steps = list(steps)
    log_det = _zeros(x)
    for step, given in zip(steps, _given(steps, weights), strict=True):
        x, step_log_det = step(x, context, *given)
        log_det = log_det + step_log_det
    return x, log_det


def reversible(
    steps: Sequence[nn.Module],
    x: Tensor,
    context: Tensor | None = None,
    *,
    weights: Weights | None = None,
    checkpoint_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(z, log_det)`` of a chain of flows, differentiable in x, context and parameters, of which z alone is kept for backward.

    Where no gradient is asked for, this is :func:`stored`. In backward the steps find autocast, training mode, the states of torch's
    default generators and buffers as they were, and running statistics do not move again. A step that draws random numbers has to draw the
    same ones in its inverse. What reaches a step by another way than x, context and its parameters gets no gradient.

    Args:
        steps: flows.
        weights: gives the arguments of each step after the context, for work that the steps share: called with the steps once forward
            and once backward, where it is differentiated.
        checkpoint_every: keep the activation after every so many steps, too: rounding then adds up over no more steps than these.

    Raises ValueError for a step without an inverse or with a log_det that is not ``[N]``, TypeError for a context that is no tensor.
    Backward raises RuntimeError for a parameter or buffer that changed since, for second derivatives, and for an inverse that is none (in
    steps without a rule of their own, on the CPU, where looking is free).
    """
    steps = list(steps)
    exporting = (
        torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    )  # torch 2.11 says both of compiling
    if not torch.is_grad_enabled() or x.is_meta or exporting:
        return stored(steps, x, context, weights=weights)
    run = run_chains
    if torch.compiler.is_compiling():
        from fastflow.reversible.untraced import run_chains as run
    return run(steps, x, context, weights, checkpoint_every or max(1, len(steps)))


def run_chains(
    steps: list[nn.Module], x: Tensor, context: Tensor | None, weights: Weights | None, length: int
) -> tuple[Tensor, Tensor]:
    """What :func:`reversible` does where gradients are wanted: chains of ``length`` steps, each of which keeps its output."""
    chains = [_Chain(steps[start : start + length], weights, start) for start in range(0, len(steps), length)]
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(
            f"context: got {type(context).__name__}, expected a tensor or None; reversible=False hands on whatever it is"
        )
    parameters = [p for chain in chains for p in chain.distinct]
    if not any(t is not None and t.requires_grad for t in (x, context, *parameters)) or any(
        map(is_lazy, parameters)
    ):
        return stored(steps, x, context, weights=weights)
    if any("_is_replica" in vars(step) for step in steps):  # nn.DataParallel's, which have no parameters
        return stored(steps, x, context, weights=weights)
    for i, step in enumerate(steps):
        if getattr(getattr(step, "inverse", None), "__isabstractmethod__", not hasattr(step, "inverse")):
            raise ValueError(
                f"steps[{i}]: {type(step).__name__} has no inverse, expected a step that has; reversible=False does without"
            )
    log_det = _zeros(x)
    for chain in chains:
        x, part = _Reversible.apply(chain, x, context, *chain.distinct)
        log_det = log_det + part
    return x, log_det


def vjp(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], wanted: Sequence[Tensor]
) -> Gradients:
    """The gradients of those of ``wanted`` that the outputs depend on."""
    pairs = [(v, g) for v, g in zip(outputs, cotangents, strict=True) if v is not None and v.requires_grad]
    if not pairs or not wanted:
        return {}
    found = torch.autograd.grad([v for v, _ in pairs], list(wanted), [g for _, g in pairs], allow_unused=True)
    return {v: g for v, g in zip(wanted, found, strict=True) if g is not None}


def add(gradients: Gradients, more: Gradients) -> None:
    """Adds to ``gradients``; what several steps share has one from each."""
    for v, g in more.items():
        gradients[v] = gradients[v] + g if v in gradients else g


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(
        x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )


def _given(steps: list[nn.Module], weights: Weights | None) -> list[tuple[Tensor, ...]]:
    return [()] * len(steps) if weights is None else weights(steps)


class _Reversible(torch.autograd.Function):
    """Parameters are inputs of it, so that their hooks run, and gradients of all of them come back at once."""

    @staticmethod
    def forward(
        ctx, chain: "_Chain", x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        z, log_det = chain.forward(x.detach(), None if context is None else context.detach())
        ctx.chain = chain
        ctx.save_for_backward(z, context)
        return z, log_det

    @staticmethod
    def backward(ctx, dz: Tensor, dlog_det: Tensor):
        z, context = ctx.saved_tensors
        with torch.no_grad():
            dx, dcontext, gradients = ctx.chain.backward(z, context, dz, dlog_det, ctx.needs_input_grad[1])
        found = (dx, dcontext, *(gradients.get(p) for p in ctx.chain.distinct))
        if torch.is_grad_enabled():  # create_graph=True
            found = _Once.apply(*(None if g is None else g.detach().requires_grad_() for g in found))
        return None, *found


class _Once(torch.autograd.Function):
    """Gradients that say so when they are to be differentiated."""

    @staticmethod
    def forward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the gradients of a reversible chain cannot be differentiated again: there are no second derivatives"
        )


class _Chain:
    """One pass through some steps: what they have to find as it was when they run again."""

    def __init__(self, steps: list[nn.Module], weights: Weights | None, start: int) -> None:
        self.steps, self.weights, self.start = steps, weights, start
        self.modules = [tuple(step.modules()) for step in steps]
        self.rules = [
            has_its_own_rule(step, modules) for step, modules in zip(steps, self.modules, strict=True)
        ]
        # not step.parameters(), which takes as long as a kernel does: {id: p} is each once, as that has them
        self.parameters = [
            tuple({id(p): p for m in modules for p in m._parameters.values() if p is not None}.values())
            for modules in self.modules
        ]
        self.distinct = tuple({id(p): p for each in self.parameters for p in each}.values())
        self.places = [
            (m, name, p) for modules in self.modules for m in modules for name, p in m._parameters.items()
        ]

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        self.modes = tuple(m.training for each in self.modules for m in each)
        self.autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in {"cpu", x.device.type}
        }
        self.generators = _generators(x.device, self.steps)
        self.replays: list[_Replay] = []
        log_det = _zeros(x)
        with self._uncached():
            states = [get() for get, _ in self.generators]
            for i, (step, given) in enumerate(zip(self.steps, _given(self.steps, self.weights), strict=True)):
                buffers = _buffers(self.modules[i], self.rules[i])
                versions = _versions(self.parameters[i]) if buffers else None
                x, step_log_det = step(x, context, *given)
                if not isinstance(step_log_det, Tensor) or step_log_det.shape != log_det.shape:
                    got = (
                        list(step_log_det.shape)
                        if isinstance(step_log_det, Tensor)
                        else type(step_log_det).__name__
                    )
                    expected = f"{list(log_det.shape)}, one value for each sample"
                    raise ValueError(
                        f"log_det of steps[{self.start + i}] ({type(step).__name__}): got {got}, expected {expected}"
                    )
                if (
                    buffers and _versions(self.parameters[i]) != versions
                ):  # it has initialised itself, which is not to be done again
                    buffers = _buffers(self.modules[i], self.rules[i])
                before, states = states, [get() for get, _ in self.generators]
                self.replays.append(_Replay(before, states, buffers))
                if self.replays[-1].states:
                    _draw.add(step)
                log_det = log_det + step_log_det
        moved = {(id(m), name) for replay in self.replays for m, name, *_ in replay.buffers}
        still = [
            b
            for each in self.modules
            for m in each
            for name, b in m._buffers.items()
            if b is not None and (id(m), name) not in moved
        ]
        self.watched = (*self.distinct, *{id(b): b for b in still if not b.is_inference()}.values())
        self.versions = _versions(self.watched)
        if any(m._parameters.get(name) is not p for m, name, p in self.places):
            raise RuntimeError(
                "parameters of a reversible chain were exchanged for others while it ran; reversible=False allows it"
            )
        return x, log_det

    def backward(self, z, context, dz, dlog_det, need_dx) -> tuple[Tensor | None, Tensor | None, Gradients]:
        """``(dx, dcontext, gradients of parameters)``."""
        self._assert_unchanged()
        context = None if context is None else context.detach().requires_grad_(context.requires_grad)
        gradients: Gradients = {}

        with self._as_it_was():
            with torch.enable_grad():
                given = _given(self.steps, self.weights)
            leaves = [tuple(v.detach().requires_grad_(v.requires_grad) for v in each) for each in given]
            for i in reversed(range(0 if need_dx else self._first(context), len(self.steps))):
                args = (context, *leaves[i])
                wanted = [v for v in (*self.parameters[i], *args) if v is not None and v.requires_grad]
                rule = self.steps[i].inverse_backward if self.rules[i] else self._general_rule(i)
                self.replays[i].restore(self.generators)
                z, dz, found = rule(z, dz, dlog_det, wanted, *args)
                add(gradients, found)
            if self.weights is not None:
                pairs = [
                    (v, gradients.pop(leaf, None))
                    for vs, ls in zip(given, leaves, strict=True)
                    for v, leaf in zip(vs, ls, strict=True)
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

    def _first(self, context: Tensor | None) -> int:
        """The first step in which something wants a gradient."""
        if self.weights is not None or (context is not None and context.requires_grad):
            return 0
        wanting = (
            i for i, parameters in enumerate(self.parameters) if any(p.requires_grad for p in parameters)
        )
        return next(wanting, len(self.steps))

    def _general_rule(self, i: int) -> Callable[..., tuple[Tensor, Tensor, Gradients]]:
        """Its inverse, then its forward pass again, differentiated."""
        step = self.steps[i]

        def rule(z, dz, dlog_det, wanted, *args):
            self.replays[i].restore_flows()
            x = step.inverse(z, *args)[0].detach()
            x.requires_grad_(x.is_floating_point() or x.is_complex())
            self.replays[i].restore(self.generators)
            with torch.enable_grad():
                z_again, log_det = step(
                    x.view_as(x), *args
                )  # a view, since hooks on what comes in want no leaf
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
            raise RuntimeError(
                f"steps[{self.start + i}]: forward(inverse(z)) of {type(self.steps[i]).__name__} is off by {error:.1e}, where the largest "
                f"|z| is {largest:.1e}: its inverse is wrong, or loses all digits here; reversible=False does without it"
            )

    def _assert_unchanged(self) -> None:
        for v, *versions in zip(self.watched, *self.versions, *_versions(self.watched), strict=True):
            if versions[:2] != versions[2:]:
                named = (
                    (i, n, p)
                    for i, step in enumerate(self.steps)
                    for n, p in (*step.named_parameters(), *step.named_buffers())
                )
                name = next((f"steps[{self.start + i}].{n}" for i, n, p in named if p is v), "a parameter")
                raise RuntimeError(
                    f"{name} of a reversible chain changed between forward and backward, which recomputes activations from it: call "
                    "backward before the optimizer's step, and before a module writes into it; reversible=False does without"
                )

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Steps run as they did in the forward pass, and leave nothing behind but gradients."""
        draws = any(replay.states for replay in self.replays)
        states = [get() for get, _ in self.generators] if draws else []
        modules = [m for each in self.modules for m in each]
        modes = [
            (m, m.training)
            for m, training in zip(modules, self.modes, strict=True)
            if m.training is not training
        ]
        moved = {(m, name): m._buffers[name] for replay in self.replays for m, name, *_ in replay.buffers}
        exchanged = [
            (m, name, m._parameters.get(name), p)
            for m, name, p in self.places
            if m._parameters.get(name) is not p
        ]
        hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in self.distinct if p._backward_hooks]
        with self._uncached():
            try:
                for m, training in modes:
                    m.training = not training
                for m, name, _, p in exchanged:  # by functional_call, or another parameter in its place
                    m._parameters[name] = p
                for tensor_hooks, _ in hooks:  # they are for the gradient that leaves the chain, and run then
                    tensor_hooks.clear()
                yield
            finally:
                for m, training in modes:
                    m.training = training
                for m, name, p, _ in exchanged:
                    m._parameters[name] = p
                for tensor_hooks, kept in hooks:
                    tensor_hooks.update(kept)
                for (m, name), buffer in moved.items():
                    m._buffers[name] = buffer
                for (_, put), state in zip(self.generators, states, strict=False):
                    put(state)

    @contextmanager
    def _uncached(self) -> Iterator[None]:
        """Autocast as in the forward pass, and no caches: of casts, which would keep one of each weight, and of parametrizations, where
        what is made without gradients would be taken for what has them."""
        with ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(
                        torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
            try:
                yield
            finally:
                parametrize._cache_enabled = cached


class _Replay:
    """What one step changed in the forward pass, as it was before: states of generators, buffers."""

    def __init__(
        self, states: list[Tensor], now: list[Tensor], buffers: list[tuple[nn.Module, str, Tensor | None]]
    ) -> None:
        self.states = [] if all(map(torch.equal, states, now)) else states
        moved = (
            (m, name, b, m._buffers[name]) for m, name, b in buffers if not _unmoved(b, m._buffers[name])
        )
        # a flag that was set stays so: what it says is done once
        self.buffers = [
            (
                m,
                name,
                after.clone() if _is_flag(after) else before,
                after.clone() if _is_flow(m) and after is not None else None,
            )
            for m, name, before, after in moved
        ]

    def restore(self, generators: list) -> None:
        for (_, put), state in zip(generators, self.states, strict=False):
            put(state)
        for m, name, before, _ in self.buffers:
            m._buffers[name] = None if before is None else before.clone()

    def restore_flows(self) -> None:
        """Gives flows what the forward pass left in them, which their inverses take back; networks run in an inverse as they ran then."""
        for m, name, _, after in self.buffers:
            if after is not None:
                m._buffers[name] = after.clone()


def _unmoved(before: Tensor | None, after: Tensor | None) -> bool:
    """By their values, since batch norm moves its buffers without a new version; unknown on a device, which a look would wait for."""
    if before is None or after is None:
        return before is after
    return before.device.type == "cpu" and torch.equal(before, after)


def _is_flag(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.dtype in (torch.bool, torch.uint8)


def _is_flow(m: nn.Module) -> bool:
    return hasattr(type(m), "inverse_backward")


def _buffers(modules: Sequence[nn.Module], by_rule: bool) -> list[tuple[nn.Module, str, Tensor | None]]:
    """Copies of the buffers that a forward pass may move; those of flows that go by a rule stay, or the rule could not be."""
    watched = [m for m in modules if m._buffers and not (by_rule and _is_flow(m))]
    return [(m, name, None if b is None else b.clone()) for m in watched for name, b in m._buffers.items()]


_draw: WeakSet[nn.Module] = WeakSet()  # steps that have been seen to draw random numbers


def _generators(
    device: torch.device, steps: Sequence[nn.Module]
) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """What reads and what sets the state of the generators that steps on this device draw from."""
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cpu":
        return generators
    if (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):  # a graph keeps its generator's state to itself
        for step in steps:
            if step in _draw:
                raise RuntimeError(
                    f"{type(step).__name__} draws random numbers (dropout?), which a reversible chain cannot replay in a captured CUDA "
                    "graph; reversible=False does without"
                )
        return generators
    of_device = torch.get_device_module(device)
    where = () if device.type == "mps" else (device,)
    return [
        *generators,
        (lambda: of_device.get_rng_state(*where), lambda state: of_device.set_rng_state(state, *where)),
    ]


def has_its_own_rule(step: nn.Module, modules: Sequence[nn.Module] | None = None) -> bool:
    """Whether ``inverse_backward`` holds: not where a flow within has none, nor where one has hooks, which the rule would pass by."""
    flows = [m for m in modules or step.modules() if _is_flow(m)]
    return step in flows and all(
        m.inverse_backward is not None and not has_hooks(m) and not vars(m).keys() & {"forward", "inverse"}
        for m in flows
    )


def has_hooks(m: nn.Module) -> bool:
    return any((m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))


def _versions(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What changes with them: writing into one gives it a new version, and other memory in its place another address."""
    return tuple(v._version for v in tensors), tuple(v.data_ptr() for v in tensors)


def _tell_versions(optimizer: torch.optim.Optimizer, *_) -> None:
    """Fused optimizers write into parameters without giving them a new version."""
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_tell_versions)
