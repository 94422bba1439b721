"""Published weights, converted to models of this package."""

import os

import torch
from torch import Tensor, nn

from fastflow import archive
from fastflow.archive import CheckpointError
from fastflow.models.mnist_flow import VARIANTS, MNISTFlow, mnist_flow
from fastflow.nn import AffineCoupling


def load_published(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MNISTFlow:
    """Load a published checkpoint as a model in eval mode, without running code from the file.

    Supported are the three MNIST flows of P. Lippe's tutorial (phlippe/saved_models,
    ``tutorial11/MNISTFlow_*.ckpt``), as PyTorch Lightning checkpoints or as plain state dicts. The names of
    the weights decide which of the three it is.

    Args:
        path: the file.
        device: device of the model.

    Raises CheckpointError, a ValueError with a one-line message, if the file is missing or damaged, if its
    names match no supported model, if a weight has another shape, or if its masks differ from the
    tutorial's.
    """
    contents = archive.read(path, device)
    state = contents.get("state_dict", contents) if isinstance(contents, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: holds no state_dict of tensors")
    with torch.random.fork_rng([]):  # unused initial weights must not advance the default generator
        models = {variant: mnist_flow(variant).to(device) for variant in VARIANTS}
    names = {variant: _names(model) for variant, model in models.items()}
    variant = min(VARIANTS, key=lambda v: len(state.keys() ^ names[v].keys()))
    missing, unexpected = names[variant].keys() - state.keys(), state.keys() - names[variant].keys()
    if missing or unexpected:
        such_as = ", such as " + min(missing or unexpected)
        counts = f"{len(missing)} names are missing and {len(unexpected)} unexpected{such_as}"
        raise CheckpointError(
            f"{path}: not a supported published model; in the nearest, MNISTFlow_{variant}, {counts}"
        )
    model, expected = models[variant], models[variant].state_dict()
    for theirs, ours in names[variant].items():
        wanted = ours if isinstance(ours, Tensor) else expected[ours]
        if state[theirs].shape != wanted.shape:
            raise CheckpointError(
                f"{path}: {theirs} is {tuple(state[theirs].shape)}, expected {tuple(wanted.shape)}"
            )
        if isinstance(ours, Tensor) and not torch.equal(state[theirs], ours):
            raise CheckpointError(f"{path}: {theirs} differs from the mask of MNISTFlow_{variant}")
    model.load_state_dict(
        {ours: state[theirs] for theirs, ours in names[variant].items() if isinstance(ours, str)}
    )
    return model.eval()


def _names(model: MNISTFlow) -> dict[str, str | Tensor]:
    """Map names in the published file to names here, and names of masks to their expected values."""
    names: dict[str, str | Tensor] = {}
    # the published list of flows has an entry for the split between levels
    flows = [m for flow in model.flows for m in (*flow, None)][:-1]
    places = [(f"flows.{1 + i}", m) for i, m in enumerate(flows)]
    if hasattr(model.dequantize, "flow"):
        places += [(f"flows.0.flows.{i}", m) for i, m in enumerate(model.dequantize.flow)]
    prefixes = {m: name for name, m in model.named_modules()}
    for theirs, coupling in places:
        if not isinstance(coupling, AffineCoupling):
            continue
        ours, net = prefixes[coupling], coupling.net
        names[f"{theirs}.scaling_factor"] = f"{ours}.log_factor"
        names[f"{theirs}.mask"] = _mask(coupling)
        net_prefix = f"{ours}.net" if coupling.mask == "checkerboard" else f"{ours}.net.net"
        gated = net if coupling.mask == "checkerboard" else net.net
        last = 2 * len(gated.blocks) + 2
        layers = {"0": "conv_in", str(last): "conv_out"}
        for j in range(len(gated.blocks)):
            layers |= {
                f"{1 + 2 * j}.net.0": f"blocks.{j}.conv_in",
                f"{1 + 2 * j}.net.2": f"blocks.{j}.conv_out",
            }
            layers |= {f"{2 + 2 * j}.layer_norm": f"blocks.{j}.norm"}
        for layer, name in layers.items():
            for parameter in ("weight", "bias"):
                names[f"{theirs}.network.nn.{layer}.{parameter}"] = f"{net_prefix}.{name}.{parameter}"
    return names


def _mask(coupling: nn.Module) -> Tensor:
    """The tutorial's mask: 1 for values that pass through."""
    factor = coupling.log_factor
    if coupling.mask == "checkerboard":
        return coupling.network_input(torch.ones(1, 1, 28, 28, dtype=factor.dtype, device=factor.device))
    c = factor.shape[0]
    return (
        (torch.arange(c, device=factor.device) // (c // 2) == int(coupling.swap_halves))
        .to(factor.dtype)
        .view(1, c, 1, 1)
    )
