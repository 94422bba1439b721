"""Whether a run stores activations or recomputes them in backward: their estimated size, and the free memory."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastflow.models.glow import choose_networks_for_cpu
from fastflow.models.model import Model
from fastflow.trainer.build import build_model, model_name
from fastflow.trainer.config import Config
from fastflow.trainer.data import Source
from fastflow.trainer.free_memory import free_bytes
from fastflow.trainer.kinds import empty_batch
from fastflow.trainer.model_options import MODELS
from fastflow.trainer.ranks import Ranks, shard_bounds

# Activations are stored if they take at most this share of the memory that is free once weights, gradients,
# the optimizer's state and averaged weights are allocated. The rest is for temporary tensors of a step, for
# evaluation, and for other processes.
STORED_SHARE = 0.5


_Config = TypeVar("_Config", bound=Config)


def with_activations_chosen(
    config: _Config, source: Source, ranks: Ranks, device: torch.device, bf16: bool
) -> tuple[_Config, str | None]:
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
            if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16):
                return value.to(dtype)
            return value

        return func(*map(cast, args), **{name: cast(value) for name, value in (kwargs or {}).items()})


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
