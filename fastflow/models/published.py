"""Published weights, converted to models of this package."""

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastflow import archive, validation
from fastflow.archive import CheckpointError
from fastflow.models.mnist_flow import VARIANTS, MNISTFlow, mnist_flow
from fastflow.nn import AffineCoupling, GatedNetwork, Sequential, VariationalDequantize

_SUPPORTED = f"one of {', '.join(f'MNISTFlow_{variant}' for variant in VARIANTS)} of 2020 or 2022"
# names of the weights of a layer normalization; those of 2022 have the shape [1, C, 1, 1]
_NORM = ("layer_norm.weight", "layer_norm.bias")
_PRE_ACTIVATION_NORM = ("gamma", "beta")


def load_published(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MNISTFlow:
    """Load a published checkpoint as a model in eval mode, without running code from the file.

    Supported are the three MNIST flows of P. Lippe's tutorial (phlippe/saved_models,
    ``tutorial11/MNISTFlow_*.ckpt``), as published in October 2020 and since June 2022. A file is a checkpoint
    with a ``state_dict`` or a plain state dict. The names of the weights decide which of the three it is, and
    whether its gated blocks have the pre-activation of 2022.

    Args:
        path: the file.
        device: device of the model.

    Raises ValueError for a ``path`` that is no path, and for a ``device`` that is none or holds no data.
    Raises CheckpointError, a ValueError with a one-line message, if the file is missing or damaged, if its
    names match no supported model, if a weight has another shape or is not floating point, or if its masks
    differ from the tutorial's.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise validation.argument_error("path", repr(path), "the path of a file")
    state = _state(path, _device(device))
    pre_activation = any(str(name).endswith((*_PRE_ACTIVATION_NORM, ".net.3.weight")) for name in state)
    with torch.random.fork_rng([]):  # unused initial weights must not advance the default generator
        models = [mnist_flow(variant, pre_activation=pre_activation).to(device) for variant in VARIANTS]
    model = min(models, key=lambda m: len(state.keys() ^ _names(m).keys()))
    model.load_state_dict(_weights(state, model, path))
    return model.eval()


def _device(device: torch.device | str) -> torch.device:
    """``device`` as a torch.device. Raises ValueError unless it is one that holds data."""
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError):
        known = None
    if known is None or known.type == "meta":
        raise validation.argument_error("device", repr(device), "a device that holds data, such as 'cpu'")
    return known


def _state(path: str | os.PathLike[str], device: torch.device) -> dict[str, Tensor]:
    """The state dict in a file. Raises CheckpointError if the file holds none."""
    contents = archive.read(path, device)
    state = contents.get("state_dict", contents) if isinstance(contents, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: holds no state_dict of tensors, expected {_SUPPORTED}")
    return state


def _weights(state: dict[str, Tensor], model: MNISTFlow, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a published state dict under their names in ``model``.

    Raises CheckpointError, which names the path, unless names, shapes and masks are those of ``model``.
    """
    names, expected = _names(model), model.state_dict()
    config = cast("dict[str, Any]", model.config)
    nearest = f"MNISTFlow_{config['variant']} of {2022 if config['pre_activation'] else 2020}"
    missing, unexpected = names.keys() - state.keys(), state.keys() - names.keys()
    if missing or unexpected:
        counts = f"{len(missing)} names are missing and {len(unexpected)} unexpected"
        such_as = min(missing or unexpected, key=str)
        raise CheckpointError(
            f"{path}: not a supported published model, expected {_SUPPORTED}; "
            f"compared with {nearest}, {counts}, such as {such_as}"
        )
    weights = {}
    for theirs, ours in names.items():
        value, wanted = state[theirs], ours if isinstance(ours, Tensor) else expected[ours]
        shape = _shape(theirs, wanted)
        if value.shape != shape:
            raise CheckpointError(f"{path}: {theirs} is {tuple(value.shape)}, expected {shape}")
        if isinstance(ours, Tensor) and not torch.equal(value, ours):
            raise CheckpointError(f"{path}: {theirs} differs from the mask of {nearest}")
        if isinstance(ours, str) and not value.is_floating_point():
            raise CheckpointError(f"{path}: {theirs} is {value.dtype}, expected floating point")
        if isinstance(ours, str):
            weights[ours] = value.reshape(wanted.shape)
    return weights


def _shape(name: str, weight: Tensor) -> tuple[int, ...]:
    """Shape in the published file of a weight that has the shape of ``weight`` here."""
    of_norm = name.endswith(_PRE_ACTIVATION_NORM)
    return (1, *weight.shape, 1, 1) if of_norm else tuple(weight.shape)


def _names(model: MNISTFlow) -> dict[str, str | Tensor]:
    """Map names in the published file to names here, and names of masks to their expected values."""
    names: dict[str, str | Tensor] = {}
    # the published list of flows has an entry for the split between levels
    chains = cast("Sequence[Sequential]", model.flows)
    flows = [m for chain in chains for m in (*chain, None)][:-1]
    places = [(f"flows.{1 + i}", m) for i, m in enumerate(flows)]
    if isinstance(model.dequantize, VariationalDequantize):
        of_noise = cast("Sequential", model.dequantize.flow)
        places += [(f"flows.0.flows.{i}", m) for i, m in enumerate(of_noise)]
    prefixes = {m: name for name, m in model.named_modules()}
    for theirs, coupling in places:
        if not isinstance(coupling, AffineCoupling):
            continue
        ours, net = prefixes[coupling], coupling.net
        names[f"{theirs}.scaling_factor"] = f"{ours}.log_factor"
        names[f"{theirs}.mask"] = _mask(coupling)
        net_prefix = f"{ours}.net" if coupling.mask == "checkerboard" else f"{ours}.net.net"
        gated = net if coupling.mask == "checkerboard" else net.net
        names |= _names_of_network(cast("GatedNetwork", gated), f"{theirs}.network.nn", net_prefix)
    return names


def _names_of_network(net: GatedNetwork, theirs: str, ours: str) -> dict[str, str]:
    """Map published names of the weights of ``net`` to names here, under a prefix each."""
    layers, names = {"0": "conv_in", str(2 * len(net.blocks) + 2): "conv_out"}, {}
    for j, block in enumerate(net.blocks):
        # concatenated ELU has no weights, but a place in the published sequence
        first = 1 if block.pre_activation else 0
        layers[f"{2 * j + 1}.net.{first}"] = f"blocks.{j}.conv_in"
        layers[f"{2 * j + 1}.net.{first + 2}"] = f"blocks.{j}.conv_out"
        scale, shift = _PRE_ACTIVATION_NORM if block.pre_activation else _NORM
        names[f"{theirs}.{2 * j + 2}.{scale}"] = f"{ours}.blocks.{j}.norm.weight"
        names[f"{theirs}.{2 * j + 2}.{shift}"] = f"{ours}.blocks.{j}.norm.bias"
    for layer, name in layers.items():
        for parameter in ("weight", "bias"):
            names[f"{theirs}.{layer}.{parameter}"] = f"{ours}.{name}.{parameter}"
    return names


def _mask(coupling: AffineCoupling) -> Tensor:
    """The tutorial's mask: 1 for values that pass through."""
    factor = cast("Tensor", coupling.log_factor)
    if coupling.mask == "checkerboard":
        return coupling.network_input(torch.ones(1, 1, 28, 28, dtype=factor.dtype, device=factor.device))
    c = factor.shape[0]
    return (
        (torch.arange(c, device=factor.device) // (c // 2) == int(coupling.swap_halves))
        .to(factor.dtype)
        .view(1, c, 1, 1)
    )
