"""CUDA graphs: work that is recorded once and replayed, and functions that are replayed on new inputs.

Not yet run on a GPU. The bookkeeping is tested on the CPU with a graph that repeats the work in its replay.
"""

import sys
from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastflow.validation import SingularError

# Graphs whose capture failed. The allocator may keep a reference to such a graph, so they are not freed.
_failed: list[torch.cuda.CUDAGraph] = []


class CaptureError(RuntimeError):
    """Work that a CUDA graph cannot record; the message is one line."""


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None: ...


Record = Callable[[Callable[[], None], Iterable[torch.Generator]], Graph]


def record_on(
    device: torch.device, stream: "torch.cuda.Stream | None" = None, enabled: bool = True
) -> Record | None:
    """Recording on ``device``: a function ``(work, generators) -> graph``; None without CUDA."""
    if device.type != "cuda" or not enabled:
        return None
    return lambda work, generators: capture(work, device, stream, generators)


def capture(
    work: Callable[[], None],
    device: torch.device,
    stream: "torch.cuda.Stream | None" = None,
    generators: Iterable[torch.Generator] = (),
) -> torch.cuda.CUDAGraph:
    """Record the kernels of ``work`` in a CUDA graph without running them.

    ``generators``: generators that the work draws from; a replay draws from their states at that time. Raises
    CaptureError if the work cannot be recorded. The generators, the default one too, and the current stream
    then are as before; tensors that the work made hold no values.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    current, generators = torch.cuda.current_stream(device), list(generators)
    kept = [(g, g.clone_state()) for g in (torch.cuda.default_generators[index], *generators)]
    graph = torch.cuda.CUDAGraph()
    try:
        for generator in generators:
            graph.register_generator_state(generator)
        # other threads may call CUDA during the capture, which must not invalidate it
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    except Exception as error:
        _failed.append(graph)
        # torch leaves the stream of the capture current, and generators that refuse to draw outside of one
        torch.cuda.set_stream(current)
        for generator, state in kept:
            generator.graphsafe_set_state(state)
        cause = _first(error)
        if isinstance(cause, SingularError):  # of an earlier call, which the device reports at the next one
            raise cause from None
        raise CaptureError(_line(cause)) from error
    return graph


def _first(error: BaseException) -> BaseException:
    """The error that came first; the end of a capture that failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _note(reason: str) -> None:
    print(f"not captured in a CUDA graph: {reason}", file=sys.stderr)


class Captured:
    """A function of tensors, generators and constants without gradients, replayed from CUDA graphs.

    There is one graph per signature: shapes, strides, dtypes and devices of tensors, values of constants,
    training mode, autocast. The first call runs the function, the second records it, later ones copy their
    tensors and the states of their generators to those of the recording, and replay it. The result is a copy.
    A replay does not advance the generator that it is given.

    The graphs read the module's parameters and buffers at their addresses, so they stay valid when an
    optimizer updates these. If an address changes, all graphs are dropped.

    Args:
        function: ``function(*inputs)``, which returns one tensor.
        module: the module whose parameters and buffers the function reads.
        record: records work, see :func:`record_on`; None: every call runs the function.
        uncaptured: called with the reason if the function cannot be captured; all calls then run it. None:
            this raises CaptureError.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        module: nn.Module,
        record: Record | None,
        uncaptured: Callable[[str], None] | None = _note,
    ) -> None:
        self.function, self.module, self.record, self.uncaptured = function, module, record, uncaptured
        self._addresses: list[int] = []
        self._recordings: dict[Hashable, _Recording | None] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        if self.record is None:
            return self.function(*inputs)
        addresses = [t.data_ptr() for t in chain(self.module.parameters(), self.module.buffers())]
        if addresses != self._addresses:
            self._recordings.clear()
            self._addresses = addresses
        key = (self.module.training, *_autocast(), *map(_signature, inputs))
        if key not in self._recordings:
            self._recordings[key] = None
            return self.function(*inputs)
        recording = self._recordings[key]
        if recording is None:
            try:
                recording = self._recordings[key] = _Recording(self.function, inputs, self.record)
            except CaptureError as error:
                self.stop()
                if self.uncaptured is None:
                    name = self.function.__name__.strip("_")
                    raise CaptureError(f"cuda_graph: {name} cannot be captured: {error}") from error
                self.uncaptured(str(error))
                return self.function(*inputs)
        return recording.replay(*inputs)

    def stop(self) -> None:
        """Drop all graphs; later calls run the function."""
        self.record = None
        self._recordings.clear()


class _Recording:
    """Recorded work with its static inputs and output."""

    output: Tensor

    def __init__(self, function: Callable[..., Tensor], inputs: Iterable[Any], record: Record) -> None:
        self.inputs = [_static(value) for value in inputs]

        def work() -> None:
            self.output = function(*self.inputs)

        self.graph = record(work, [v for v in self.inputs if isinstance(v, torch.Generator)])

    def replay(self, *inputs: Any) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)
            elif isinstance(static, torch.Generator):
                static.set_state(given.get_state())
        self.graph.replay()
        return self.output.clone()


def _static(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return torch.Generator(value.device) if isinstance(value, torch.Generator) else value


def _signature(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return (torch.Generator, value.device) if isinstance(value, torch.Generator) else value


def _autocast() -> tuple[Hashable, ...]:
    return (
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cuda"),
    )
