"""Whether a run stores activations or recomputes them in backward: their estimated size, and the free memory."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastflow.models.glow import choose_networks_for_cpu
from fastflow.models.model import Model
from fastflow.trainer.build import build_model, model_name
from fastflow.trainer.config import Config
from fastflow.trainer.data import Source
from fastflow.trainer.kinds import empty_batch
from fastflow.trainer.model_options import MODELS
from fastflow.trainer.ranks import Ranks, shard_bounds

# Activations are stored if they take at most this share of the memory that is free once weights, gradients,
# the optimizer's state and averaged weights are allocated. The rest is for temporary tensors of a step, for
# evaluation, and for other processes.
STORED_SHARE = 0.5

_CGROUPS = Path("/sys/fs/cgroup")


def with_activations_chosen(
    config: Config, source: Source, ranks: Ranks, device: torch.device, bf16: bool
) -> tuple[Config, str | None]:
    """``config`` with ``reversible`` yes or no instead of auto, and a line that gives the reason.

    Every rank makes the same choice: activations are stored if they fit on all of them.
    """
    if config.reversible != "auto" or "reversible" not in MODELS[model_name(config, source)].options():
        return config, None
    if config.activation_checkpoint_every is not None:
        return replace(config, reversible="yes"), "activations: recomputed, one in some steps is stored"
    # ranks on CPUs share the memory of their machine
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)) if device.type == "cpu" else 1
    free = free_bytes(device)
    fits, line = False, f"activations: recomputed, the free memory of {device.type} is unknown"
    if free is not None:
        stored, weights = _estimate(config, source, ranks, device, bf16)
        left = _left(free / sharing, weights, bool(config.ema))
        fits = stored <= STORED_SHARE * left
        sizes = f"{_gb(stored)} estimated of {_gb(left)} free"
        line = f"activations: stored, {sizes}" if fits else f"activations: recomputed, {sizes} if stored"
    with ranks.translate_collective_errors():
        fitting = ranks.all_reduce_sum(torch.tensor(float(fits)), long_timeout=True).item()
    if fits and fitting < ranks.world_size:
        line = "activations: recomputed, another rank has too little free memory to store them"
    return replace(config, reversible="yes" if fitting < ranks.world_size else "no"), line


def fit(build: Callable[[], Model], samples: int, device: torch.device, bf16: bool = False) -> bool:
    """Whether a run without averaged weights, the only one on ``device``, stores activations by default."""
    free = free_bytes(device)
    if free is None:
        return False
    stored, weights = stored_bytes(build, samples, device, bf16)
    return stored <= STORED_SHARE * _left(free, weights)


def _left(free: float, weights: int, ema: bool = False) -> float:
    """Bytes that weights, gradients, two averages of Adam, and averaged weights leave."""
    return max(0.0, free - weights * (5 if ema else 4))


def _estimate(
    config: Config, source: Source, ranks: Ranks, device: torch.device, bf16: bool
) -> tuple[int, int]:
    """Bytes of the stored activations of this rank's largest micro-batch, and of the weights."""

    def build() -> Model:
        model = build_model(replace(config, reversible="no"), source)
        return model.double() if config.float64 else model

    first, end = shard_bounds(config.batch_size, ranks.rank, ranks.world_size)
    return stored_bytes(build, -(-(end - first) // config.accumulate), device, bf16)


def stored_bytes(
    build: Callable[[], Model], samples: int, device: torch.device, bf16: bool = False
) -> tuple[int, int]:
    """Bytes that a forward pass on ``samples`` samples stores on ``device``, and bytes of the weights.

    Nothing is computed or allocated: the pass runs on meta tensors, and the distinct storages that autograd
    saves are added up. ``build``: makes the model, with stored activations.
    """
    with torch.device("meta"):
        model = build().eval()  # in training mode, ActNorms would be initialized from the batch
        x, labels = empty_batch(model, samples, "meta")
        seed = torch.empty((), dtype=torch.int64)
    if device.type == "cpu":
        choose_networks_for_cpu(model, torch.bfloat16 if bf16 else next(model.parameters()).dtype)
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        with _MetaAutocast() if bf16 else nullcontext():
            loss = model(x, labels, seed=seed)
    del loss
    for kept in (*model.parameters(), *model.buffers(), x):
        saved.pop(kept.untyped_storage()._cdata, None)
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(storage.nbytes() for storage in saved.values()), weights


class _MetaAutocast(TorchFunctionMode):
    """Autocast to bfloat16 of the functions that networks call; torch has none for meta tensors."""

    glow_network = torch.ops.fastflow.glow_network.default
    lower = (torch.conv2d, F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, glow_network)
    float32 = (F.layer_norm,)

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        dtype = torch.bfloat16 if func in self.lower else torch.float32 if func in self.float32 else None
        if dtype is None:
            return func(*args, **(kwargs or {}))

        def cast(value: object) -> object:
            casts = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16)
            return value.to(dtype) if casts else value

        return func(*map(cast, args), **{name: cast(value) for name, value in (kwargs or {}).items()})


def free_bytes(device: torch.device) -> float | None:
    """Free memory of a CUDA device or of this machine's CPU, in bytes; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _cached_bytes(device)
    if device.type != "cpu":
        return None
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return min(1024.0 * int(available[1]), _left_in_cgroup()) if available else None


def _cached_bytes(device: torch.device) -> int:
    """Memory that torch has reserved on a CUDA device and that no tensor uses."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _left_in_cgroup(groups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Memory that the limits of this process's control group and its parents leave; infinite without any."""
    left = float("inf")
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, usage = groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        # in a container the path may be the host's; the container's own group is then at the top
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                left = min(left, _limit(folder, limit) - _used(folder, usage))
    return max(0.0, left)


def _limit(folder: Path, name: str) -> float:
    try:
        text = (folder / name).read_text().strip()
    except OSError:
        return float("inf")
    return float("inf") if text == "max" else float(text)


def _used(folder: Path, name: str) -> float:
    """Bytes in use without pages of files that the system can drop."""
    try:
        used, statistics = float((folder / name).read_text()), (folder / "memory.stat").read_text()
    except OSError:
        return 0.0
    inactive = dict(line.split() for line in statistics.splitlines())
    return used - float(inactive.get("total_inactive_file", inactive.get("inactive_file", 0)))


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
