"""Shapes of the latents of a model, from a pass without values through its levels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastflow import validation
from fastflow.nn import Flow, Split
from fastflow.nn.flow import in_mode
from fastflow.state_from_data import state_from_data

Shape = tuple[int, ...]


def latent_shapes(
    shape: Shape,
    flows: Sequence[Flow],
    splits: Sequence[Split],
    like: Tensor,
    context_shape: Shape | None = None,
) -> list[Shape]:
    """Shapes of one sample's latents, from the finest level to the coarsest.

    Every flow and split runs on the meta device, in both directions. One that cannot, for instance because it
    reads values, runs on zeros instead. No layer is initialized.

    Args:
        shape: shape of one sample.
        flows, splits: the levels, as :class:`~fastflow.models.ImageFlow` takes them.
        like: tensor with the dtype and device of the samples.
        context_shape: shape of one context of the flows, or None.

    Raises ValueError that names the level whose shapes do not fit.
    """
    shapes = []
    for i, flow in enumerate(flows):
        name = f"flows[{i}]"
        z, log_det, back = _ran(name, _BothDirections(flow), shape, like, context_shape)
        validation.same_shape(f"log_det of {name}", log_det, (1,), "[N], one value per sample")
        if z.numel() != back.numel() or tuple(back.shape[1:]) != shape:
            got = f"samples {list(shape)}, latents {list(z.shape[1:])}, and from them samples {list(back.shape[1:])}"
            raise validation.argument_error(name, got, "an invertible flow")
        shape = tuple(z.shape[1:])
        if i < len(splits):
            kept, z, _ = _ran(f"splits[{i}]", splits[i], shape, like, None)
            shapes.append(tuple(z.shape[1:]))
            shape = tuple(kept.shape[1:])
    return [*shapes, shape]


def latent_shape(flow: Flow, shape: Shape, like: Tensor) -> Shape | None:
    """Shape of one latent of a flow; None if it runs only with values or with a context.

    Raises ValueError if a layer of the flow takes no samples of this shape.
    """
    try:
        z, _, _ = _without_values(_BothDirections(flow), shape, like, None)
    except Exception as error:  # of any kind: the missing context can be the reason
        if isinstance(error, ValueError) and str(error).startswith("x: got shape"):
            raise
        return None
    return tuple(z.shape[1:])


class _BothDirections(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        z, log_det = self.flow(x, context)
        return z, log_det, self.flow.inverse(z, context)[0]


def _ran(
    name: str, level: nn.Module, shape: Shape, like: Tensor, context_shape: Shape | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a level for one sample, on the meta device or from zeros."""
    try:
        return _without_values(level, shape, like, context_shape)
    except Exception:  # whatever a module raises that needs values; if shapes do not fit, it raises again
        try:
            with in_mode(level, training=False), state_from_data(False), torch.no_grad():
                return level(*_zeros(shape, like, context_shape))
        except Exception as error:
            got, why = f"samples of shape {list(shape)}", f"{type(error).__name__}: {error}"
            raise validation.argument_error(name, got, f"a shape that fits ({why})") from error


def _without_values(
    level: nn.Module, shape: Shape, like: Tensor, context_shape: Shape | None
) -> tuple[Tensor, Tensor, Tensor]:
    with in_mode(level, training=False), state_from_data(False), torch.no_grad():
        tensors = {**dict(level.named_parameters()), **dict(level.named_buffers())}
        tensors = {key: torch.empty_like(t, device="meta") for key, t in tensors.items()}
        return functional_call(level, tensors, _zeros(shape, like.to("meta"), context_shape))


def _zeros(shape: Shape, like: Tensor, context_shape: Shape | None) -> tuple[Tensor, ...]:
    x = like.new_zeros((1, *shape))
    return (x,) if context_shape is None else (x, like.new_zeros((1, *context_shape)))
