"""Log-density and decoder of a model as modules for ``torch.onnx.export`` and ``torch.export``.

Example:
    >>> import torch
    >>> from fastflow import export
    >>> from fastflow.models import VectorGlow
    >>> module = export.LogProb(VectorGlow(features=2, steps=1, hidden=4))
    >>> log_prob = module(torch.zeros(3, 2))
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastflow import validation
from fastflow.models.model import Model, check_float_context
from fastflow.nn import InvertibleConv1x1

_ROWS = 2  # samples of the example; the exported batch size is any


class _Exported(nn.Module):
    """A copy of a model in eval mode, with the matrices of its 1x1 convolutions as constants."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        if not isinstance(model, Model):
            raise validation.argument_error("model", type(model).__name__, "a model of fastflow.models")
        self.model = _with_fixed_matrices(copy.deepcopy(model).requires_grad_(False))
        self.eval()

    def _example_of_context(self, context: Tensor | None) -> Tensor | None:
        model, like = self.model, self.model.dequantize.like
        if context is not None:
            check_float_context(context, 1, like, f"one row [1, ...], {like.dtype} or of integers")
            return context.expand(_ROWS, *context.shape[1:]).clone()
        if model.context_shape is not None:
            return like.new_zeros(_ROWS, *model.context_shape)
        return None if model.classes is None else torch.zeros(_ROWS, dtype=torch.int64, device=like.device)


class LogProb(_Exported):
    r"""Log-density of a model, :math:`\log p(x)` or :math:`\log p(x \mid c)`, as a module.

    It is a copy: later changes of the model do not reach it. For a model of uint8 samples, the noise of
    dequantization is an input, so that the graph is deterministic. Uniform noise in ``[0, 1)`` makes the
    result an estimate of the lower bound that :meth:`~fastflow.models.model.Model.log_prob` computes; a
    constant such as 0.5 would not bound :math:`\log p(x)`.

    Args:
        model: a model of fastflow.models.

    Shape: x as the model takes it, ``[N, *shape]``; noise ``[N, *shape]`` in the model's dtype, None for
    continuous samples; context ``[N, ...]`` or None; log_prob ``[N]``, nats.
    Raises ValueError for any other argument.
    """

    def forward(self, x: Tensor, noise: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        model = self.model
        model._check_samples(x)
        model._check_context(context, x.shape[0])
        if model.n_bits is None:
            if noise is not None:
                raise validation.argument_error("noise", "a tensor", "None, samples are continuous")
            y, log_det = model.dequantize(x)
            return model._log_prob_dequantized(y, log_det, context)
        if noise is None:
            expected = f"a tensor {validation.shape_of(x)} of values in [0, 1)"
            raise validation.argument_error("noise", "None", expected)
        y, log_det = model.dequantize(x, noise=noise)
        return model._log_prob_dequantized(y, log_det, context)

    def arguments(self, context: Tensor | None = None, *, names: bool = True) -> dict[str, Any]:
        """Keyword arguments of ``torch.onnx.export``: example inputs, names, and a dynamic batch size.

        Args:
            context: one row of the context of a :class:`~fastflow.models.FlowModel`, ``[1, ...]``. Other models
                know its shape.
            names: with ``input_names`` and ``output_names``. ``torch.export.export`` does not take them.
        """
        model, like = self.model, self.model.dequantize.like
        if model.n_bits is None:
            x, noise = like.new_zeros(_ROWS, *model.shape), None
        else:
            x = torch.zeros(_ROWS, *model.shape, dtype=torch.uint8, device=like.device)
            noise = torch.full(x.shape, 0.5, dtype=like.dtype, device=like.device)
        inputs = {"x": x, "noise": noise, "context": self._example_of_context(context)}
        return _arguments(
            tuple(inputs.values()), [k for k, v in inputs.items() if v is not None], "log_prob", names
        )


class Decoder(_Exported):
    """Samples from latents, :meth:`~fastflow.models.model.Model.decode`, as a module.

    It is a copy: later changes of the model do not reach it. The latents are a tuple as ``model.encode`` returns
    it; with standard normal latents and a standard prior, outputs are samples of the model.

    Args:
        model: a model of fastflow.models.

    Shape: latents ``[N, ...]`` each, see ``model.latent_shapes()``; context ``[N, ...]`` or None; x
    ``[N, *shape]``, uint8 if the model's samples are.
    Raises ValueError for any other argument.
    """

    def forward(self, latents: tuple[Tensor, ...], context: Tensor | None = None) -> Tensor:
        model, n = self.model, latents[-1].shape[0]
        model._check_latents(latents)
        model._check_context(context, n)
        return model._generate(latents, n, context)[0]

    def arguments(self, context: Tensor | None = None, *, names: bool = True) -> dict[str, Any]:
        """Keyword arguments of ``torch.onnx.export``, see :meth:`LogProb.arguments`.

        The inputs of the graph are ``latents_0``, ``latents_1``, ... and, if there is one, ``context``.
        """
        like = self.model.dequantize.like
        latents = tuple(like.new_zeros(_ROWS, *shape) for shape in self.model.latent_shapes())
        context = self._example_of_context(context)
        inputs = [f"latents_{i}" for i in range(len(latents))] + ["context"] * (context is not None)
        return _arguments((latents, context), inputs, "x", names)


def _arguments(args: tuple[Any, ...], inputs: list[str], output: str, names: bool) -> dict[str, Any]:
    batch = torch.export.Dim("batch")
    while args[-1] is None:
        args = args[:-1]
    shapes = tree_map_only(Tensor, lambda _: {0: batch}, args)
    named = {"input_names": inputs, "output_names": [output]} if names else {}
    return {"args": args, "dynamic_shapes": shapes, **named}


class _FixedMatrix(InvertibleConv1x1):
    """A 1x1 convolution of which the matrix, its inverse and the log-det are constants: ONNX inverts none."""

    matrix: Tensor
    matrix_inverse: Tensor
    matrix_log_det: Tensor

    def __init__(self, layer: InvertibleConv1x1) -> None:
        super(InvertibleConv1x1, self).__init__()
        self.num_features, self.lu = layer.num_features, False
        names = "matrix", "matrix_inverse", "matrix_log_det"
        with torch.no_grad():
            for name, v in zip(names, layer.weights(), strict=True):
                self.register_buffer(name, v)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.matrix, self.matrix_inverse, self.matrix_log_det


def _with_fixed_matrices(model: Model) -> Model:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, InvertibleConv1x1):
                setattr(module, name, _FixedMatrix(child))
    return model
