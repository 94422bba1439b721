"""One training step over static buffers: the same code uncaptured on any device and captured in a CUDA graph."""

from contextlib import nullcontext
from inspect import signature

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastflow.trainer.ranks import share

WARM_UP = 3  # steps before a capture: libraries choose their kernels and take their memory
# what a step changes of the buffers it brings together itself; torch 2.14 has given the option another name
BROADCAST_BUFFERS = next(
    n
    for n in ("forward_sync_buffers", "broadcast_buffers")
    if n in signature(DistributedDataParallel).parameters
)
WARM_UP_OF_RANKS = (
    11  # DistributedDataParallel measures the order of gradients in its first steps, and rebuilds its buckets
)


def autocast(device, enabled):
    """bfloat16 for the networks; casts are not kept, since what is kept would not be cast again in a captured step."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


class Step:
    """Forward, backward, clipping and update: ``step(x, labels, seed, lr)``.

    The batch is copied to where the last one was, nothing waits for the device before the report is read, and where the loss or the
    gradient's norm is not finite the update is left out on the device. So the whole step can be captured once and replayed.

    Args:
        model: one of fastflow.models, in training mode; its weights and the optimizer's state stay where they are.
        optimizer: fused, over the model's parameters; its learning rate becomes a tensor.
        ranks: the processes that share a batch.
        batch_size: B, images over all ranks; this rank has its share of them.
        parts: gradients are accumulated over so many parts of the share.
        clip: the largest norm of the gradient, greater ones are scaled down to it; ``inf`` for none.
        bf16: run the networks in bfloat16.
        capture: capture the step in a CUDA graph after some steps of warm-up.
    """

    def __init__(
        self, model, optimizer, ranks, *, batch_size, parts=1, clip=float("inf"), bf16=False, capture=False
    ):
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.batch_size, self.clip, self.bf16, self.capture = batch_size, clip, bf16, capture
        self.first, end = share(batch_size, ranks.index, ranks.count)
        self.bounds = [share(end - self.first, i, parts) for i in range(parts)]

        self.statistics = (
            [b for b in model.running_statistics() if b.is_floating_point()] if ranks.count > 1 else []
        )

        # The buffers: what a step reads that is not the model's, and what it reports.
        shape = (end - self.first, *model.shape)
        self.x = torch.empty(shape, dtype=torch.uint8, device=self.device).contiguous(
            memory_format=torch.channels_last
        )
        self.labels = (
            None if model.classes is None else torch.empty(shape[:1], dtype=torch.int64, device=self.device)
        )
        self.seed = torch.empty((), dtype=torch.int64, device=self.device)
        exact = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        self.wishes = torch.zeros(2, dtype=exact, device=self.device)
        self.report: Tensor | None = None
        # The CPU's fused Adam takes any dtype, CUDA's a float32.
        self.lr = torch.empty(
            (), dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device
        )
        for group in optimizer.param_groups:
            group.update(lr=self.lr, capturable=capture)

        self.graph, self.calls = None, 0
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" and capture else None
        self.forward = model
        if ranks.count > 1:
            with torch.cuda.stream(self.stream) if self.stream else nullcontext():
                device_ids = [self.device.index] if self.device.type == "cuda" else None
                self.forward = DistributedDataParallel(
                    model, device_ids, gradient_as_bucket_view=True, **{BROADCAST_BUFFERS: False}
                )

    def __call__(self, x, labels, seed, lr, wishes=(0.0, 0.0)):
        """Takes one step; gives bits/dim and gradient norm of the whole batch, and the sums of the ranks' ``wishes``, as floats.

        x, labels: this rank's share of the batch, on any device. Values that are not finite mean that nothing was updated.
        """
        self.x.copy_(x, non_blocking=True)
        if self.labels is not None:
            self.labels.copy_(labels, non_blocking=True)
        self.seed.fill_(seed)
        self.lr.fill_(lr)
        if self.ranks.count > 1:
            self.wishes.copy_(torch.tensor(wishes))
        with self.ranks.losing():
            self._run_or_replay()
            bits, norm, *summed = self.report.tolist()
        return bits, norm, *(summed if self.ranks.count > 1 else wishes)

    def alone(self):
        """Forward and backward of this rank by itself, on an empty batch, so that what is to be compiled is."""
        kept = [b.clone() for b in self.model.buffers()]
        self.x.zero_()
        for first, end in self.bounds:
            with autocast(self.device, self.bf16):
                labels = None if self.labels is None else self.labels[first:end].zero_()
                self.model(self.x[first:end], labels, seed=0).sum().backward()
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)

    def _run_or_replay(self):
        if self.stream is None:
            self.run()
            return
        if self.graph is None:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            if self.calls < (WARM_UP if self.ranks.count == 1 else WARM_UP_OF_RANKS):
                self.calls += 1
                with torch.cuda.stream(self.stream):
                    self.run()
                current.wait_stream(self.stream)
                return
            self.graph = torch.cuda.CUDAGraph()
            # a loader's pinning thread may call CUDA meanwhile, which is no error of this thread's capture
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.run()
        self.graph.replay()

    def run(self):
        """The step, on what lies in the buffers."""
        self.optimizer.zero_grad(set_to_none=True)
        summed = 0.0
        for i, (first, end) in enumerate(self.bounds):
            last = i == len(self.bounds) - 1
            with self.forward.no_sync() if self.ranks.count > 1 and not last else nullcontext():
                with autocast(self.device, self.bf16):
                    labels = None if self.labels is None else self.labels[first:end]
                    bits = self.forward(self.x[first:end], labels, seed=self.seed, offset=self.first + first)
                # DistributedDataParallel divides by the number of ranks
                (bits.sum() * (self.ranks.count / self.batch_size)).backward()
            summed = summed + bits.detach().sum()
        report = self.ranks.add(torch.cat([summed.to(self.wishes.dtype).view(1), self.wishes]))
        if self.statistics:  # each rank's batches moved its own: all go on from their mean
            mean = self.ranks.add(torch.cat([b.flatten() for b in self.statistics])) / self.ranks.count
            for buffer, value in zip(
                self.statistics, mean.split([b.numel() for b in self.statistics]), strict=True
            ):
                buffer.copy_(value.view_as(buffer))
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = ~(report[0].isfinite() & norm.isfinite())
        # where it is bad, gradients are left as they are, to be looked at
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm.masked_fill(bad, 0))
        self.optimizer.found_inf = (
            bad.float()
        )  # what torch.amp.GradScaler tells a fused optimizer: skip this update
        self.optimizer.step()
        self.report = torch.cat([report[:1] / self.batch_size, norm.to(report.dtype).view(1), report[1:]])
