"""Training on several devices with torch.distributed: torchrun starts one process ("rank") per device.

All ranks share a batch of B samples: rank r of W processes samples ``r B // W`` to ``(r + 1) B // W - 1``.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastflow.trainer.rendezvous import DeviceError, LostRankError, meet, rank_of_environment

T = TypeVar("T")

# for work that a single rank does while the others wait: a download, pictures, a checkpoint
LONG_TIMEOUT = timedelta(hours=2)


def shard_bounds(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """First index and end of the items of ``rank`` among ``n``; numbers of items differ by at most 1."""
    return n * rank // world_size, n * (rank + 1) // world_size


@dataclass(frozen=True)
class Ranks:
    """This process, and the number of processes that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    long_timeout_group: "dist.ProcessGroup | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor, long_timeout: bool = False) -> Tensor:
        """Sum over all ranks, in place; every rank gets the same bits.

        ``long_timeout``: wait for the other ranks as long as :meth:`barrier` does; CPU tensors only.
        """
        if self.world_size > 1:
            dist.all_reduce(values, group=self.long_timeout_group if long_timeout else None)
        return values

    def barrier(self) -> None:
        """Wait for all ranks, as long as the work of a single rank may take."""
        if self.world_size > 1:
            with self.translate_collective_errors():
                dist.barrier(group=self.long_timeout_group)

    def local_main_first(self, load: Callable[[], T]) -> T:
        """Call ``load`` on the first rank of each machine, then on the others: data are downloaded once."""
        if self.local_rank == 0:
            loaded = load()
            self.barrier()
            return loaded
        self.barrier()
        return load()

    def broadcast_str(self, text: str) -> str:
        """The ``text`` of the main rank."""
        if self.world_size == 1:
            return text
        texts = [text]
        with self.translate_collective_errors():
            dist.broadcast_object_list(texts, group=self.long_timeout_group, device=torch.device("cpu"))
        return texts[0]

    @contextmanager
    def translate_collective_errors(self) -> Iterator[None]:
        """Raise LostRankError for an error of a collective, which means that another rank failed."""
        if self.world_size == 1:
            yield
            return
        with _translate_collective_errors():
            yield


@contextmanager
def _translate_collective_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _is_collective_error(error):
            raise
        if "shared memory segment" in str(error):  # NCCL's words
            got = "shared memory: got too little for NCCL, expected more"
            raise DeviceError(f"{got}: of a container, such as docker run --shm-size 1g") from None
        first_line = str(error).strip().split("\n")[0]
        reason = re.sub(r"^\[[^]]*\]\s*", "", first_line).split(". ")[0][:160]  # without gloo's file and line
        raise LostRankError(f"another rank died or does not respond; see its own error ({reason})") from None


def _is_collective_error(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return any(word in str(error).lower() for word in words)


@contextmanager
def init_process_group(device: str = "cpu", timeout: float = 60.0) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started and the device of this rank; a single rank without torchrun.

    ``device``: cpu, or cuda, which becomes the GPU with the number of the local rank. ``timeout``: seconds
    after which a waiting collective fails. An existing process group is used and not destroyed.

    Raises DeviceError for an unknown device, if a machine has fewer GPUs than ranks, and for environment variables
    that torchrun would not set; LostRankError if the first rank is not there.
    """
    chosen = available_device(device)
    owns_group = not dist.is_initialized()
    rank, local_rank = rank_of_environment() if owns_group else (None, int(os.environ.get("LOCAL_RANK", 0)))
    if owns_group and rank is None:
        yield Ranks(), chosen
        return
    if chosen.type == "cuda":
        chosen = _gpu_of_rank(chosen, local_rank)
        torch.cuda.set_device(chosen)
    with _translate_collective_errors():
        if rank is not None:
            store = meet(rank, timeout)
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timedelta(seconds=timeout),
            )
        long_timeout_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        every_rank = cast(
            "dist.ProcessGroup", long_timeout_group
        )  # the type has a value for ranks outside of it
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), local_rank, every_rank)
        # Without this barrier a rank that fails early could be gone before the others are connected; they
        # would then report a lost rank instead of their own error.
        ranks.barrier()
    yield ranks, chosen
    if (
        owns_group
    ):  # not after an error: the other ranks may still wait in a collective, and the process ends anyway
        dist.destroy_process_group()


def available_device(device: str) -> torch.device:
    """The torch device of a name. Raises DeviceError if it is unknown or not there."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device: got {device!r}, expected cpu, cuda or another torch device") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device: got {device}, expected an available device; torch finds no GPU")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    counts = {"cpu": 1}
    if accelerator is not None:
        counts[accelerator.type] = torch.accelerator.device_count()
    if (chosen.index or 0) >= counts.get(chosen.type, 0):
        there = ", ".join(f"{name}:{i}" for name, count in counts.items() for i in range(count))
        raise DeviceError(f"device: got {device}, expected an available device: {there}")
    return chosen


def _gpu_of_rank(device: torch.device, local_rank: int) -> torch.device:
    chosen = torch.device("cuda", local_rank) if device.index is None else device
    visible = torch.cuda.device_count()
    if chosen.index >= visible:
        raise DeviceError(
            f"local rank {local_rank} needs a GPU but only {visible} are visible; start fewer ranks"
        )
    return chosen
