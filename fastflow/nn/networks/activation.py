"""Activations that ops have by name."""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "silu": F.silu, "elu": F.elu}
_NAMES = {function: name for name, function in ACTIVATIONS.items()} | {torch.relu: "relu", F.tanh: "tanh"}
_MODULES = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.ELU: "elu"}


def activation_name(function: object) -> str | None:
    """Name of an activation, a function or a module; None if ops do not have it."""
    if isinstance(function, nn.Module):
        name = _MODULES.get(type(function))
        return None if name == "elu" and function.alpha != 1 else name
    return _NAMES.get(function) if callable(function) else None
