"""One training step over static buffers, which a CUDA graph can capture."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastflow import validation
from fastflow.models.model import Model
from fastflow.trainer.captured import CaptureError, Graph, Record, record_on
from fastflow.trainer.kinds import empty_batch
from fastflow.trainer.ranks import Ranks, shard_bounds

# uncaptured steps before a capture, in which libraries choose their kernels and allocate their memory
WARM_UP = 3
# DistributedDataParallel also records the order of gradients in its first steps and then rebuilds its buckets
DDP_WARM_UP = 11
# DistributedDataParallel's option that synchronizes buffers, which a step does itself; torch 2.14 renamed it
BROADCAST_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """bfloat16 for the networks. Casts are not cached: a captured step would not repeat a cached cast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextmanager
def _after_current(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """Run the block on ``stream``, between the work before and after it on the current stream."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Step:
    """Forward, backward, clipping and update: ``step(x, labels, seed, lr)``.

    The batch is copied into a static buffer. Nothing waits for the device before the report is read. If the
    loss or the norm of the gradient is not finite, the device skips the update. Therefore the whole step can
    be captured once and replayed.

    Args:
        model: one of fastflow.models, in training mode; its weights and the optimizer's state keep their
            addresses.
        optimizer: a fused optimizer of the model's parameters; its learning rate becomes a tensor.
        ranks: the processes that share a batch.
        batch_size: images over all ranks; this rank processes its part of them.
        micro_batches: number of parts of the rank's samples over which gradients are accumulated.
        clip: largest norm of the gradient; larger gradients are scaled down to it. ``inf`` disables clipping.
        bf16: run the networks in bfloat16.
        capture: capture the step in a CUDA graph after the warm-up steps, on a GPU.
        uncaptured: called with the reason if the capture fails on a rank; the steps then run uncaptured. None:
            this raises CaptureError.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        ranks: Ranks,
        *,
        batch_size: int,
        micro_batches: int = 1,
        clip: float = float("inf"),
        bf16: bool = False,
        capture: bool = False,
        uncaptured: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.batch_size, self.clip, self.bf16, self.uncaptured = batch_size, clip, bf16, uncaptured
        self.first, end = shard_bounds(batch_size, ranks.rank, ranks.world_size)
        self.bounds = [shard_bounds(end - self.first, i, micro_batches) for i in range(micro_batches)]
        floating = [b for b in model.running_statistics() if b.is_floating_point()]
        self.statistics = floating if ranks.world_size > 1 else []
        self._allocate_buffers(end - self.first)
        for group in optimizer.param_groups:
            group.update(lr=self.lr, capturable=capture)
        self.graph: Graph | None = None
        self.calls = 0
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" and capture else None
        self.record = record_on(self.device, self.stream, capture)
        self.forward = self._over_ranks()

    def _over_ranks(self) -> Model | DistributedDataParallel:
        """The model, with several ranks in DistributedDataParallel."""
        if self.ranks.world_size == 1:
            return self.model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        options: dict[str, Any] = {"gradient_as_bucket_view": True, BROADCAST_BUFFERS: False}
        with torch.cuda.stream(self.stream):
            return DistributedDataParallel(self.model, device_ids, **options)

    def _allocate_buffers(self, samples: int) -> None:
        """Allocate the inputs of a step that are not the model's, and the votes."""
        self.x, self.labels = empty_batch(self.model, samples, self.device)
        self.seed = torch.empty((), dtype=torch.int64, device=self.device)
        exact = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        self.votes = torch.zeros(2, dtype=exact, device=self.device)
        self.report = torch.empty(0)  # of the step before
        # CUDA's fused Adam takes a float32 learning rate, the CPU's any dtype
        lr_dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        self.lr = torch.zeros((), dtype=lr_dtype, device=self.device)

    def __call__(
        self,
        x: Tensor,
        labels: Tensor | None,
        seed: int,
        lr: float,
        votes: tuple[float, float] = (0.0, 0.0),
    ) -> tuple[float, float, float, float]:
        """Take one step; give bits/dim and gradient norm of the batch, and the sums of the ranks' ``votes``.

        x, labels: this rank's part of the batch, on any device. If a value is not finite, nothing was
        updated.
        """
        self.x.copy_(x, non_blocking=True)
        if self.labels is not None:
            if labels is None:
                raise validation.argument_error("labels", None, validation.shape_of(self.labels))
            self.labels.copy_(labels, non_blocking=True)
        self.seed.fill_(seed)
        self.lr.fill_(lr)
        if self.ranks.world_size > 1:
            self.votes.copy_(torch.tensor(votes))
        with self.ranks.translate_collective_errors():
            self._run_or_replay()
            bits, norm, *summed = self.report.tolist()
        first, second = summed if self.ranks.world_size > 1 else votes
        return bits, norm, first, second

    def compile_forward_backward(self) -> None:
        """Compile now: run forward and backward on an empty batch, without the other ranks."""
        kept = [b.clone() for b in self.model.buffers()]
        self.x.zero_()
        for first, end in self.bounds:
            with autocast(self.device, self.bf16):
                labels = None if self.labels is None else self.labels[first:end].zero_()
                self.model(self.x[first:end], labels, seed=0).sum().backward()
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)

    def _run_or_replay(self) -> None:
        warm = self.calls >= (WARM_UP if self.ranks.world_size == 1 else DDP_WARM_UP)
        if self.record is not None and self.graph is None and warm:
            self._capture(self.record)
        if self.graph is not None:
            self.graph.replay()
            return
        self.calls += 1
        with _after_current(self.stream):
            self.run()

    def _capture(self, record: Record) -> None:
        """Capture the step; if this fails on a rank, all ranks go on uncaptured, with the state of before."""
        graph, reason = None, None
        try:
            graph = record(self.run, ())
        except CaptureError as error:
            reason = str(error)
        failed = torch.tensor(float(reason is not None))
        self.ranks.all_reduce_sum(failed, long_timeout=True)
        if graph is not None and not failed:
            self.graph = graph
            return
        # a capture runs nothing, so weights and averages hold their values; these tensors hold none
        self.optimizer.zero_grad(set_to_none=True)
        self.report = torch.empty(0)
        self._skip_update_if(None)
        self.record = self.stream = None
        reason = reason or "it failed on another rank"
        if self.uncaptured is None:
            raise CaptureError(f"cuda_graph: the step cannot be captured: {reason}")
        self.uncaptured(reason)
        if self.ranks.world_size > 1:
            del self.forward
            gc.collect()  # its hooks on the parameters end with it
            self.forward = self._over_ranks()

    def run(self) -> None:
        """Take the step on the contents of the buffers."""
        self.optimizer.zero_grad(set_to_none=True)
        summed_bits = self._forward_backward()
        report = self.ranks.all_reduce_sum(torch.cat([summed_bits.to(self.votes.dtype).view(1), self.votes]))
        if self.statistics:
            self._average_statistics()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = ~(report[0].isfinite() & norm.isfinite())
        # non-finite gradients stay as they are, so that the error message can name the largest one
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm.masked_fill(bad, 0))
        self._skip_update_if(bad.float())
        self.optimizer.step()
        self.report = torch.cat([report[:1] / self.batch_size, norm.to(report.dtype).view(1), report[1:]])

    def _skip_update_if(self, bad: Tensor | None) -> None:
        """Let the fused optimizer skip its updates where ``bad`` is not 0, as torch.amp.GradScaler does."""
        self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]  # torch does not declare it

    def _forward_backward(self) -> Tensor:
        """Accumulate gradients over the micro-batches; give the sum of their bits/dim."""
        summed, forward = [], self.forward
        over_ranks = isinstance(forward, DistributedDataParallel)
        for i, (first, end) in enumerate(self.bounds):
            last = i == len(self.bounds) - 1
            with forward.no_sync() if over_ranks and not last else nullcontext():
                with autocast(self.device, self.bf16):
                    labels = None if self.labels is None else self.labels[first:end]
                    bits = forward(self.x[first:end], labels, seed=self.seed, offset=self.first + first)
                # DistributedDataParallel divides by the number of ranks
                (bits.sum() * (self.ranks.world_size / self.batch_size)).backward()
            summed.append(bits.detach().sum())
        return sum(summed[1:], summed[0])

    def _average_statistics(self) -> None:
        """Replace the running statistics, which each rank updated from its own samples, by their mean."""
        flat = torch.cat([b.flatten() for b in self.statistics])
        mean = self.ranks.all_reduce_sum(flat) / self.ranks.world_size
        parts = mean.split([b.numel() for b in self.statistics])
        for buffer, value in zip(self.statistics, parts, strict=True):
            buffer.copy_(value.view_as(buffer))
