"""Base class of models of images and vectors."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.models.distribution import FlowDistribution, distribution_class
from fastflow.nn import (
    AffineCoupling,
    BatchNorm,
    Coupling,
    Dequantize,
    Flow,
    IdentityDequantize,
    Prior,
    Split,
    Standardize,
)
from fastflow.nn.flow import in_mode
from fastflow.nn.networks.context import tiled
from fastflow.nn.networks.residual_network import WeightNormConv2d
from fastflow.state_from_data import state_from_data
from fastflow.transforms import in_transform


class Model(nn.Module):
    """Base class of models: dequantization, then flow and split per level, then a prior over the last latent.

    The log-density is the sum of the log-dets of all layers, of the log-densities of the splits' latents and
    of the last latent's. Shapes and dtypes of arguments are always checked. Values (bit depth, class, NaN)
    are checked only in eager mode on the CPU, where the check neither synchronizes nor breaks a graph.

    Args:
        shape: shape of one sample, ``(C, H, W)`` for an image or ``(D,)`` for a vector.
        dequantize: dequantization of uint8 samples; :class:`~fastflow.nn.IdentityDequantize` for continuous
            samples.
        flows: one flow per level.
        splits: the splits between the levels, one fewer than ``flows``.
        prior: prior of the last latent.
        classes: number of classes of a class-conditional model, None for an unconditional one.
        config: constructor arguments of the subclass, stored in checkpoints to rebuild the model; None if
            checkpoints cannot rebuild it.
        context_shape: shape of one context of the flows, ``(C,)`` or ``(C, H, W)``; None: flows have none.
        standardize: standardize continuous samples before the first flow, see :meth:`standardize_by`.

    Shape: x uint8 ``[N, *shape]`` with values in ``[0, 2 ** n_bits)``, or floating point if the samples are
    continuous; context int64 ``[N]`` with values in ``[0, classes)``, or floating point
    ``[N, *context_shape]``, or None.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dequantize: Dequantize | IdentityDequantize,
        flows: list[Flow],
        splits: list[Split],
        prior: Prior,
        classes: int | None,
        config: dict[str, Any] | None,
        context_shape: tuple[int, ...] | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.n_bits, self.classes, self.config = tuple(shape), dequantize.n_bits, classes, config
        self.context_shape = context_shape
        self.dequantize, self.prior = dequantize, prior
        self.flows = cast("Sequence[Flow]", nn.ModuleList(flows))
        self.splits = cast("Sequence[Split]", nn.ModuleList(splits))
        validation.boolean("standardize", standardize)
        self.standardize = Standardize(self.shape[0]) if standardize else None
        self.standardize_context = self._layer_of_context() if standardize else None

    def _layer_of_context(self) -> Standardize | None:
        """A layer that standardizes contexts, if they are vectors."""
        shape = self.context_shape
        return Standardize(shape[0]) if shape is not None and len(shape) == 1 else None

    def standardize_by(self, x: Tensor, context: Tensor | None = None) -> None:
        """Standardize continuous samples before the first flow, by the mean and the deviation of ``x`` per feature.

        ``standardize``, a :class:`~fastflow.nn.Standardize`, then is a part of the model: log-densities and
        samples are those of x as given, and state dicts and checkpoints hold mean and scale. If the model has
        the layer already, its values change. With ``context``, ``standardize_context`` does the same for contexts
        ``[N, C]``.

        Shape: x ``[N, *shape]``. Raises ValueError for a model of uint8 samples, for an x of another shape or
        dtype, and for constant features.
        """
        if self.n_bits is not None:
            raise validation.argument_error(
                "standardize", "a model of uint8 samples", "one of continuous samples"
            )
        self._check_samples(x)
        layer = self.standardize or Standardize(self.shape[0]).to(self.dequantize.like)
        of_context = self.standardize_context or self._layer_of_context()
        if of_context is not None and context is not None:
            self._check_context(context, len(context))
            try:
                of_context.to(self.dequantize.like).fit(context)
            except ValueError as error:
                raise ValueError(f"context{str(error).removeprefix('x')}") from None
        layer.fit(x)
        self.standardize, self.standardize_context = layer, of_context
        if self.config is not None:
            self.config = {**self.config, "standardize": True}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers"):
            # parameters become the given tensors, whose device and dtype may differ (meta, float64)
            given = (v for k, v in state_dict.items() if k.startswith(prefix) and v.is_floating_point())
            self.dequantize.like = next(given, self.dequantize.like).new_empty(0)

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """Log-density of continuous samples, ``[N]``, nats; a lower bound of log p(x) for discrete samples.

        The bound is estimated with one draw of the dequantization noise. The noise is drawn from torch's
        generator, or computed from ``(seed, offset + sample, element)``.
        """
        return self._log_prob_dequantized(*self._dequantize(x, context, seed, offset), context)

    def _dequantize(
        self, x: Tensor, context: Tensor | None, seed: int | Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor]:
        """The part of :meth:`log_prob` that depends on the number ``offset``, and the checks."""
        self._check_samples(x)
        self._check_context(context, x.shape[0])
        return self.dequantize(x, seed=seed, offset=offset)

    def _log_prob_dequantized(self, y: Tensor, log_prob: Tensor, context: Tensor | None = None) -> Tensor:
        """The other part, which depends on tensors only: a CUDA graph can replay it on another batch."""
        of_flows, of_prior = self._contexts(context, y.shape[0])
        if self.standardize is not None:
            y, log_det = self.standardize(y)
            log_prob = log_prob + log_det
        for i, flow in enumerate(self.flows):
            y, log_det = flow(y, of_flows)
            log_prob = log_prob + log_det
            if i < len(self.splits):
                y, _, log_prob_z = self.splits[i](y)
                log_prob = log_prob + log_prob_z
        return log_prob + self.prior.log_prob(y, of_prior)

    def _contexts(self, context: Tensor | None, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Context of the flows and context of the prior for ``n`` samples: classes are the prior's only."""
        if context is None:
            return None, None
        if self.context_shape is None:
            return None, tiled(context, n)
        given = context if self.standardize_context is None else self.standardize_context(context)[0]
        given = tiled(given, n)
        return given, given

    def bits_per_dim(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """Negative :meth:`log_prob` in bits per dimension, ``[N]``; may be negative if x is continuous."""
        return self.log_prob(x, context, seed=seed, offset=offset) / (-math.log(2) * math.prod(self.shape))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """:meth:`bits_per_dim`, so that DistributedDataParallel and torch.compile wrap training."""
        return self.bits_per_dim(x, context, seed=seed, offset=offset)

    def initialize(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> None:
        """Initialize every uninitialized ActNorm from a batch, like the first forward pass in training mode.

        Running statistics of batch norms move as well. Gradients need not be enabled.
        If torch.distributed is initialized, every rank must call it with its own part of the batch, see
        :class:`fastflow.nn.ActNorm`.
        """
        with in_mode(self, training=True), state_from_data(True), torch.no_grad():
            self.log_prob(x, context, seed=seed, offset=offset)

    def running_statistics(self) -> list[Tensor]:
        """Buffers that forward updates in training mode: means, variances and counts of batch norms."""
        layers = (m for m in self.modules() if isinstance(m, (BatchNorm, nn.modules.batchnorm._BatchNorm)))
        return [b for m in layers for b in m.buffers()]

    def weight_scales(self) -> list[nn.Parameter]:
        """Scales g of the weight-normalized convolutions, which the RealNVP paper penalizes."""
        return [m.g for m in self.modules() if isinstance(m, WeightNormConv2d)]

    def compile_networks(self, **options: Any) -> None:
        """Compile every coupling network in place with torch.compile, which takes ``options``.

        All networks of a level share one compiled program. It is compiled again for every new batch size, and
        for training, evaluation and sampling.
        """
        # torch would otherwise stop compiling after 8 of these variants
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(self.flows))
        for module in self.modules():
            if isinstance(module, (AffineCoupling, Coupling)):
                module.net.compile(**{"dynamic": False} | options)

    def encode(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        normalized: bool = False,
        differentiable: bool = False,
    ) -> tuple[Tensor, ...]:
        r"""Latents of x, from the finest level to the coarsest; ``decode(encode(x))`` is x.

        Discrete samples are dequantized at the bin center. With a ``seed``, they are dequantized with noise
        computed from ``(seed, sample, element)``, as in training. The latents are then distributed as in
        training; latents of bin centers need not be. Decoded values may differ by 1 if the noise is
        within rounding error of a bin edge. In training mode as well, this initializes no ActNorm and moves
        no running statistics.

        ``normalized`` latents are :math:`(z - \mu) / \sigma`, with the mean and scale that a learned split
        computes from the coarser latents, or that a Gaussian prior has per channel or class. They follow a
        standard Gaussian as far as the model fits the data. Latents of other priors stay as they are.

        ``differentiable`` keeps the graph, for continuous samples; uint8 samples raise ValueError.
        """
        if differentiable:
            self._check_continuous("differentiable")
        self._check_samples(x)
        self._check_context(context, x.shape[0])
        latents = []
        with nullcontext() if differentiable else torch.no_grad(), state_from_data(False):
            y = self.dequantize.bin_center(x) if seed is None else self.dequantize(x, seed=seed)[0]
            of_flows, of_prior = self._contexts(context, x.shape[0])
            if self.standardize is not None:
                y, _ = self.standardize(y)
            for i, flow in enumerate(self.flows):
                y, _ = flow(y, of_flows)
                if i < len(self.splits):
                    y, z, _ = self.splits[i](y)
                    latents.append(self.splits[i].normalize(y, z)[0] if normalized else z)
            return *latents, self.prior.normalize(y, of_prior)[0] if normalized else y

    def decode(
        self,
        latents: tuple[Tensor, ...],
        context: Tensor | None = None,
        *,
        normalized: bool = False,
        differentiable: bool = False,
    ) -> Tensor:
        """Samples from latents, which :meth:`encode` returns; uint8 if the model's samples are.

        ``normalized`` must be as for :meth:`encode`. With it and a Gaussian prior, draws from a standard
        Gaussian are decoded to samples of the model.

        ``differentiable`` keeps the graph, for continuous samples. Raises ValueError for latents of other
        shapes or dtypes, for NaN, and for ``differentiable`` with uint8 samples.
        """
        if differentiable:
            self._check_continuous("differentiable")
        self._check_latents(latents)
        n = latents[-1].shape[0]
        self._check_context(context, n)
        with nullcontext() if differentiable else torch.inference_mode():
            x, _ = self._generate(latents, n, context, normalized=normalized)
        return x if differentiable else x.clone()  # not an inference tensor

    def sample(
        self,
        n: int | tuple[int, ...],
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        latents: tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:
        """Draw ``n`` samples without a graph; an uninitialized ActNorm is the identity.

        In training mode as well, sampling changes no state of the model except torch's generators.

        Args:
            n: number of samples. A tuple is a sample shape as in torch.distributions: so many samples for
                every row of the context.
            temperature: factor of the noise of every latent.
            context: context of the samples. For a class-conditional model: int64 ``[n]``, or ``[N]`` if n is
                a tuple.
            generator: generator that seeds the noise; None: torch's default generator.
            latents: latents to use, in the order of :meth:`encode`. None in place of a latent draws it, given
                the coarser latents.

        Shape: ``[n, *shape]``, or ``[*n, N, *shape]`` if n is a tuple, without N if there is no context; uint8
        if the model's samples are.
        Raises ValueError for a negative ``n`` or temperature, and for a context or latents of other shapes or
        dtypes.
        """
        if isinstance(temperature, Tensor) and temperature.ndim:
            raise validation.argument_error("temperature", "a tensor", "a number, or context=... by name")
        leading = self._leading(n, context)
        # skips the autograd part of each op, a tenth of the sampling time on the CPU
        with torch.inference_mode():
            x, _ = self._draw(math.prod(leading), context, temperature, generator, latents)
        return x.clone().view(*leading, *x.shape[1:])

    def rsample(
        self,
        n: int | tuple[int, ...],
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """:meth:`sample` of continuous samples, differentiable in parameters and context (reparameterized).

        The graph stores the activations of the inverse. Raises ValueError for the arguments that
        :meth:`sample` rejects, for a model of uint8 samples, and for a prior without ``has_rsample``.
        """
        self._check_reparameterized("rsample")
        leading = self._leading(n, context)
        x, _ = self._draw(math.prod(leading), context, temperature, generator)
        return x.view(*leading, *x.shape[1:])

    def sample_and_log_prob(
        self,
        n: int | tuple[int, ...],
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continuous samples and their log-densities in nats, without a graph, from one pass of the inverse.

        Shape: x as :meth:`sample`'s; log_prob ``[n]``, or ``[*n, N]`` if n is a tuple. Raises ValueError for the
        arguments that :meth:`sample` rejects, and for a model of uint8 samples.
        """
        self._check_continuous("sample_and_log_prob")
        leading = self._leading(n, context)
        with torch.inference_mode():
            drawn: tuple[Tensor, Any] = self._draw(math.prod(leading), context, 1.0, generator, density=True)
        x, log_prob = drawn
        return x.clone().view(*leading, *x.shape[1:]), log_prob.clone().view(leading)

    def rsample_and_log_prob(
        self,
        n: int | tuple[int, ...],
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`rsample` and the log-densities of the samples, both differentiable, from one pass of the inverse.

        The gradient of the log-density includes its dependence on x. It is the estimator of reverse KL:
        ``(log_prob - target(x)).mean()``. Shapes as :meth:`sample_and_log_prob`'s, errors as :meth:`rsample`'s.
        """
        self._check_reparameterized("rsample_and_log_prob")
        leading = self._leading(n, context)
        drawn: tuple[Tensor, Any] = self._draw(math.prod(leading), context, 1.0, generator, density=True)
        x, log_prob = drawn
        return x.view(*leading, *x.shape[1:]), log_prob.view(leading)

    def distribution(
        self, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """The model of continuous samples as a ``torch.distributions.Distribution``.

        Shape: ``event_shape`` is the shape of one sample, ``batch_shape`` the number of rows of the context; see
        :class:`~fastflow.models.distribution.FlowDistribution`. Raises ValueError for a model of uint8 samples.
        """
        return distribution_class()(self, context, validate_args)

    def _leading(self, n: int | tuple[int, ...], context: Tensor | None) -> tuple[int, ...]:
        """Leading dimensions of the samples, after checks of ``n`` and of the context."""
        several = isinstance(n, (tuple, list))
        sizes = tuple(n) if several else (n,)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise validation.argument_error("n", n, "0 or more")
        if not several or context is None:
            self._check_context(context, math.prod(sizes))
            return sizes
        self._check_context(context, len(context))
        return *sizes, len(context)

    def _draw(
        self,
        n: int,
        context: Tensor | None,
        temperature: float,
        generator: torch.Generator | None,
        latents: tuple[Tensor | None, ...] | None = None,
        density: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        validation.number("temperature", temperature, "0 or more", lambda v: 0 <= v < math.inf)
        if latents is None:
            latents = (None,) * len(self.flows)
        self._check_latents(latents, n)
        return self._generate(latents, n, context, temperature, generator, density)

    def _generate(
        self,
        latents: tuple[Tensor | None, ...],
        n: int,
        context: Tensor | None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        density: bool = False,
        normalized: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Samples from latents, of which None are drawn, and with ``density`` their log-densities."""
        with state_from_data(False):
            of_flows, of_prior = self._contexts(context, n)
            y = latents[-1]
            if y is None:
                y = self.prior.sample(n, self.dequantize.like, temperature, of_prior, generator)
            elif normalized:
                y, _ = self.prior.denormalize(y, of_prior)
            log_prob = self.prior.log_prob(y, of_prior) if density else None
            for i in reversed(range(len(self.flows))):
                if i < len(self.splits):
                    z, split = latents[i], self.splits[i]
                    if z is not None and normalized:
                        z, _ = split.denormalize(y, z)
                    y = split.sample(y, temperature, generator) if z is None else split.inverse(y, z)
                    if log_prob is not None:
                        log_prob = log_prob + split(y)[2]
                y, log_det = self.flows[i].inverse(y, of_flows)
                if log_prob is not None:
                    log_prob = log_prob - log_det
            if self.standardize is not None:
                y, log_det = self.standardize.inverse(y)
                if log_prob is not None:
                    log_prob = log_prob - log_det
            return self.dequantize.inverse(y)[0], log_prob

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one sample's latents, from the finest level to the coarsest."""
        shapes, shape = [], self.shape
        for _ in self.splits:  # a split follows a squeeze and keeps half the channels
            shape = (2 * shape[0], shape[1] // 2, shape[2] // 2)
            shapes.append(shape)
        return [*shapes, self.prior.shape]

    def _check_continuous(self, argument: str) -> None:
        if self.n_bits is not None:
            raise validation.argument_error(
                argument,
                "a model of uint8 samples",
                "one of continuous samples: rounding to integers has no gradient, and log_prob of a uint8 sample "
                "is a bound that draws noise",
            )

    def _check_reparameterized(self, argument: str) -> None:
        self._check_continuous(argument)
        if not self.prior.has_rsample:
            raise validation.argument_error(
                argument,
                f"the prior {type(self.prior).__name__}, whose samples have no gradient in its parameters",
                "a prior with has_rsample, such as GaussianPrior",
            )

    def _check_samples(self, x: Tensor) -> None:
        dtype = self.dequantize.like.dtype if self.n_bits is None else torch.uint8
        kind = "images" if len(self.shape) == 3 else "vectors"
        values = f"{str(dtype).removeprefix('torch.')} {kind} [N, {', '.join(map(str, self.shape))}]"
        values += "" if self.n_bits is None else f" with values in [0, {2**self.n_bits})"
        if x.dtype != dtype:
            if self.n_bits is not None and x.is_floating_point():  # as torchvision's ToTensor makes them
                values += "; floats in [0, 1] become uint8 by (255 * x).round().to(torch.uint8)"
                values += f" >> {8 - self.n_bits}" if self.n_bits < 8 else ""
            raise validation.argument_error("x", f"dtype {x.dtype}", values)
        if tuple(x.shape[1:]) != self.shape or x.ndim != 1 + len(self.shape):
            raise validation.argument_error("x", validation.shape_of(x), values)
        self._check_device("x", x)
        if self.n_bits is None:
            if values_are_free(x) and not x.isfinite().all():
                raise validation.argument_error("x", "inf or NaN", values)
        elif (
            self.n_bits < 8
            and values_are_free(x)
            and x.numel()
            and (largest := int(x.max())) >= 2**self.n_bits
        ):
            raise validation.argument_error("x", f"a value of {largest}", values)

    def _check_context(self, context: Tensor | None, n: int) -> None:
        if self.context_shape is not None:
            sizes = ", ".join(map(str, self.context_shape))
            expected = f"{self.dequantize.like.dtype} of shape [{n}, {sizes}] or [1, {sizes}]"
            check_float_context(context, n, self.dequantize.like, expected, self.context_shape)
            return
        if self.classes is None:
            if context is not None:
                raise validation.argument_error(
                    "context", f"a tensor of {validation.shape_of(context)}", "None, the model has no classes"
                )
            return
        expected = f"int64 classes [{n}] in [0, {self.classes})"
        if context is None:
            raise validation.argument_error("context", "None", expected)
        if context.dtype != torch.int64 or tuple(context.shape) != (n,):
            raise validation.argument_error(
                "context", f"{context.dtype} of {validation.shape_of(context)}", expected
            )
        self._check_device("context", context)
        if (
            values_are_free(context)
            and n
            and not (0 <= int(context.min()) and int(context.max()) < self.classes)
        ):
            raise validation.argument_error(
                "context", f"values from {int(context.min())} to {int(context.max())}", expected
            )

    def _check_latents(self, latents: tuple[Tensor | None, ...], n: int | None = None) -> None:
        shapes = self.latent_shapes()
        if len(latents) != len(shapes):
            raise validation.argument_error(
                "latents", f"{len(latents)} tensors", f"{len(shapes)}, as encode gives them"
            )
        like, last = self.dequantize.like, latents[-1]
        for i, z in enumerate(latents):
            if z is None and n is None:
                raise validation.argument_error(f"latents[{i}]", "None", "a tensor")
        rows = last.shape[0] if n is None and last is not None else n
        for i, (z, shape) in enumerate(zip(latents, shapes, strict=True)):
            if z is None:  # sample draws it
                continue
            if tuple(z.shape) != (rows, *shape):
                samples = "N" if n is None else n
                raise validation.argument_error(
                    f"latents[{i}]", validation.shape_of(z), f"[{samples}, {', '.join(map(str, shape))}]"
                )
            self._check_device(f"latents[{i}]", z)
            if z.dtype != like.dtype:
                raise validation.argument_error(
                    f"latents[{i}]", f"dtype {z.dtype}", f"{like.dtype}, the model's dtype"
                )
            if values_are_free(z) and z.isnan().any():
                raise validation.argument_error(f"latents[{i}]", "NaN", "numbers")

    def _check_device(self, argument: str, t: Tensor) -> None:
        if t.device != self.dequantize.like.device:
            raise validation.argument_error(
                argument, f"device {t.device}", f"{self.dequantize.like.device}, the device of the model"
            )


def values_are_free(t: Tensor) -> bool:
    """Whether values of t can be read, and this neither synchronizes with a device nor breaks a graph."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not in_transform()


def check_float_context(
    context: Tensor | None, n: int, like: Tensor, expected: str, shape: tuple[int, ...] | None = None
) -> None:
    """Raise ValueError unless the context has n rows or one, of the given shape, in the dtype of ``like``."""
    if not isinstance(context, Tensor):
        got = "None" if context is None else type(context).__name__
        raise validation.argument_error("context", got, expected)
    if context.ndim == 0 or context.shape[0] not in (1, n) or shape not in (None, tuple(context.shape[1:])):
        raise validation.argument_error("context", validation.shape_of(context), expected)
    if context.device != like.device:
        raise validation.argument_error("context", f"device {context.device}", f"{like.device}, the model's")
    if context.dtype != like.dtype and (shape is not None or context.is_floating_point()):
        raise validation.argument_error("context", f"dtype {context.dtype}", expected)
    if values_are_free(context) and context.is_floating_point() and not context.isfinite().all():
        raise validation.argument_error("context", "inf or NaN", "finite numbers")
