"""Training on several devices: a process ("rank") for each, as torchrun starts them, on torch.distributed.

A batch of B samples is shared by all ranks: rank r of W has samples ``r B // W`` to ``(r + 1) B // W`` of it.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=2)  # for what one rank does alone: a download, a folder's pictures, a checkpoint


class DeviceError(ValueError):
    """A device that a rank cannot have; the message is one line."""


class LostRankError(RuntimeError):
    """Another rank has died or does not answer; its own error says why."""


def share(n: int, index: int, count: int) -> tuple[int, int]:
    """First and end of the ``index``-th of ``count`` parts of n things, which differ by one at most."""
    return n * index // count, n * (index + 1) // count


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: ``index`` of ``count``, ``local`` on its machine."""

    index: int = 0
    count: int = 1
    local: int = 0
    patient: "dist.ProcessGroup | None" = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.index == 0

    def add(self, values: Tensor, patiently: bool = False) -> Tensor:
        """The sum over all ranks, in place; the same bits on each. ``patiently``: of tensors of the CPU, as :meth:`wait`."""
        if self.count > 1:
            dist.all_reduce(values, group=self.patient if patiently else None)
        return values

    def wait(self) -> None:
        """Until all ranks are here, for as long as one of them may have to do alone."""
        if self.count > 1:
            with self.losing():
                dist.barrier(group=self.patient)

    def first_then_rest(self, load: Callable):
        """``load()``, by the first rank of each machine before the others: what is downloaded is downloaded once."""
        if self.local == 0:
            loaded = load()
            self.wait()
            return loaded
        self.wait()
        return load()

    def tell(self, text: str) -> str:
        """The first rank's ``text``."""
        if self.count == 1:
            return text
        told = [text]
        dist.broadcast_object_list(told, group=self.patient, device=torch.device("cpu"))
        return told[0]

    @contextmanager
    def losing(self) -> Iterator[None]:
        """Errors of a collective are those of another rank: LostRankError."""
        if self.count == 1:
            yield
            return
        with _losing():
            yield


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if _is_of_a_collective(error):
            reason = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().split("\n")[0]).split(". ")[0][
                :160
            ]  # less its place in gloo
            raise LostRankError(
                f"another rank has died or does not answer; its own error says why ({reason})"
            ) from None
        raise


def _is_of_a_collective(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    said = str(error).lower()
    return any(
        word in said for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    )


@contextmanager
def join(device: str = "cpu", timeout: float = 60.0) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, this one's device with them; one rank where it did not start this process.

    ``device``: cpu, or cuda, which becomes that of the rank's place on its machine. A collective that waits for longer than ``timeout``
    seconds is an error. A process group that is there already is used, and left as it is.

    Raises DeviceError for a device that torch does not know, and where a machine has more ranks than GPUs.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device is {device!r}, expected cpu, cuda or another that torch knows") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device is {device}, but torch sees no GPU")
    local = int(os.environ.get("LOCAL_RANK", 0))
    mine = not dist.is_initialized()
    if mine and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield Ranks(), chosen
        return
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", local)
        if chosen.index >= torch.cuda.device_count():
            raise DeviceError(
                f"rank {local} of this machine has no GPU, of which it sees {torch.cuda.device_count()}: start fewer ranks"
            )
        torch.cuda.set_device(chosen)
    with _losing():
        if mine:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout)
            )
        ranks = Ranks(
            dist.get_rank(), dist.get_world_size(), local, dist.new_group(backend="gloo", timeout=PATIENCE)
        )
        ranks.wait()  # or a rank with an error might be gone before another has found it, which could then not tell its own
    yield ranks, chosen
    if mine:  # after an error the others may wait for what will not come: no farewell, the process ends
        dist.destroy_process_group()
