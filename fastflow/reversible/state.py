"""State that a chain restores so that steps run in backward as in forward: one context manager per kind."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastflow.reversible.rules import is_flow

Generator = tuple[Callable[[], Tensor], Callable[[Tensor], None]]  # reads a generator's state, and sets it
Buffer = tuple[nn.Module, str, Tensor | None]
Autocast = dict[str, tuple[bool, torch.dtype]]


@contextmanager
def training_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> Iterator[None]:
    """Put each module in its mode of ``modes`` (True: training) within the block."""
    changed = [
        (m, m.training) for m, training in zip(modules, modes, strict=True) if m.training is not training
    ]
    try:
        for m, training in changed:
            m.training = not training
        yield
    finally:
        for m, training in changed:
            m.training = training


@contextmanager
def parameters_in_place(places: Iterable[tuple[nn.Module, str, Tensor | None]]) -> Iterator[None]:
    """Put the parameters of the forward pass in their modules within the block (cf. functional_call)."""
    exchanged = [
        (m, name, m._parameters.get(name), p) for m, name, p in places if m._parameters.get(name) is not p
    ]
    try:
        for m, name, _, p in exchanged:
            m._parameters[name] = p  # pyright: ignore[reportArgumentType] # also a view of a parameter
        yield
    finally:
        for m, name, p, _ in exchanged:
            m._parameters[name] = p


_replays = 0


@contextmanager
def replaying() -> Iterator[None]:
    """Tell flows within the block that forward runs again, on statistics that it has updated already."""
    global _replays
    _replays += 1
    try:
        yield
    finally:
        _replays -= 1


def is_replay() -> bool:
    """Whether forward runs again in the backward pass of a reversible chain, and must not update statistics."""
    return _replays > 0


@contextmanager
def hooks_suspended(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Remove gradient hooks of ``tensors`` within the block: they run on gradients that leave the chain."""
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    try:
        for of_tensor, _ in hooks:
            of_tensor.clear()
        yield
    finally:
        for of_tensor, kept in hooks:
            of_tensor.update(kept)


def autocast_settings(device: torch.device) -> Autocast:
    """Whether autocast is enabled, and its dtype, for the CPU and for ``device``."""
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in {"cpu", device.type}
    }


@contextmanager
def same_autocast(settings: Autocast) -> Iterator[None]:
    """Apply autocast ``settings`` within the block, without its cache, which would copy each weight."""
    with ExitStack() as stack:
        for device, (enabled, dtype) in settings.items():
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


@contextmanager
def no_parametrization_cache() -> Iterator[None]:
    """Disable the cache of parametrizations, which would return tensors computed without gradients."""
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = cached


@contextmanager
def rng_restored(generators: Sequence[Generator]) -> Iterator[None]:
    """Restore the states of ``generators`` after the block."""
    states = [get() for get, _ in generators]
    try:
        yield
    finally:
        for (_, put), state in zip(generators, states, strict=True):
            put(state)


@contextmanager
def buffers_restored(buffers: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Put the same tensors back into the named buffers after the block; values written to them stay."""
    kept = {(m, name): m._buffers[name] for m, name in buffers}
    try:
        yield
    finally:
        for (m, name), buffer in kept.items():
            m._buffers[name] = buffer


class ChangeDetector:
    """Detects tensors that were written to or replaced, by version counters and data pointers."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.versions = self._now()

    def _now(self) -> list[tuple[int, int]]:
        return [(t._version, t.data_ptr()) for t in self.tensors]

    def changed(self) -> Tensor | None:
        """The first tensor that has changed since, or None."""
        for tensor, before, now in zip(self.tensors, self.versions, self._now(), strict=True):
            if before != now:
                return tensor
        return None


class Replay:
    """Generator states and buffers that one step changed in the forward pass, with their values before it."""

    def __init__(self, states: list[Tensor], now: list[Tensor], buffers: list[Buffer]) -> None:
        self.states = [] if all(map(torch.equal, states, now)) else states
        moved = (
            (m, name, b, m._buffers[name]) for m, name, b in buffers if not _unmoved(b, m._buffers[name])
        )
        # a flag stays set: it marks an action that happens once, such as an initialization
        self.buffers = [
            (
                m,
                name,
                after.clone() if after is not None and _is_flag(after) else before,
                after.clone() if is_flow(m) and after is not None else None,
            )
            for m, name, before, after in moved
        ]

    def restore(self, generators: Sequence[Generator]) -> None:
        """Set generators and buffers to their values before the step's forward pass."""
        for (_, put), state in zip(generators, self.states, strict=False):
            put(state)
        for m, name, before, _ in self.buffers:
            m._buffers[name] = None if before is None else before.clone()

    def restore_flows(self) -> None:
        """Set the buffers of flows to their values after the forward pass, which their inverses need."""
        for m, name, _, after in self.buffers:
            if after is not None:
                m._buffers[name] = after.clone()


def _unmoved(before: Tensor | None, after: Tensor | None) -> bool:
    """Compares values, because batch norm bumps no versions. False on a GPU: it would synchronize."""
    if before is None or after is None:
        return before is after
    return before.device.type == "cpu" and torch.equal(before, after)


def _is_flag(buffer: Tensor) -> bool:
    return buffer.dtype in (torch.bool, torch.uint8)


def copied_buffers(modules: Sequence[nn.Module], by_rule: bool) -> list[Buffer]:
    """Copies of the buffers that a forward pass may change.

    Buffers of flows with ``inverse_backward`` are excluded, because that method needs the updated values.
    """
    watched = [m for m in modules if m._buffers and not (by_rule and is_flow(m))]
    return [(m, name, None if b is None else b.clone()) for m in watched for name, b in m._buffers.items()]


drawing: WeakSet[nn.Module] = WeakSet()  # steps that have drawn random numbers


def generators_of(device: torch.device, steps: Sequence[nn.Module]) -> list[Generator]:
    """The generators that steps on this device draw from."""
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cpu":
        return generators
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # the state of a captured graph's generator cannot be read
        for step in steps:
            if step in drawing:
                raise RuntimeError(
                    f"{type(step).__name__} draws random numbers (dropout?), which a reversible chain cannot "
                    "replay in a captured CUDA graph; pass reversible=False"
                )
        return generators
    of_device = torch.get_device_module(device)
    where = () if device.type == "mps" else (device,)
    return [
        *generators,
        (lambda: of_device.get_rng_state(*where), lambda state: of_device.set_rng_state(state, *where)),
    ]


def _bump_versions(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Bump versions of parameters after a fused optimizer step, which ChangeDetector would miss."""
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_bump_versions)
