"""Base class of models of images and vectors."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn import AffineCoupling, BatchNorm, Dequantize, Flow, IdentityDequantize, Prior, Split
from fastflow.nn.flow import in_mode
from fastflow.nn.networks.residual_network import WeightNormConv2d
from fastflow.state_from_data import state_from_data


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
        config: constructor arguments of the subclass, stored in checkpoints to rebuild the model.

    Shape: x uint8 ``[N, *shape]`` with values in ``[0, 2 ** n_bits)``, or floating point if the samples are
    continuous; context int64 ``[N]`` with values in ``[0, classes)``, or None.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dequantize: Dequantize | IdentityDequantize,
        flows: list[Flow],
        splits: list[Split],
        prior: Prior,
        classes: int | None,
        config: dict,
    ) -> None:
        super().__init__()
        self.shape, self.n_bits, self.classes, self.config = tuple(shape), dequantize.n_bits, classes, config
        self.dequantize, self.prior = dequantize, prior
        self.flows, self.splits = nn.ModuleList(flows), nn.ModuleList(splits)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata: dict, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        if metadata.get("assign_to_params_buffers"):
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
        for i, flow in enumerate(self.flows):
            y, log_det = flow(y)
            log_prob = log_prob + log_det
            if i < len(self.splits):
                y, _, log_prob_z = self.splits[i](y)
                log_prob = log_prob + log_prob_z
        return log_prob + self.prior.log_prob(y, context)

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
            if isinstance(module, AffineCoupling):
                module.net.compile(**{"dynamic": False} | options)

    @torch.no_grad()
    def encode(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Latents of x, from the finest level to the coarsest; ``decode(encode(x))`` is x.

        Discrete samples are dequantized at the bin center. With a ``seed``, they are dequantized with noise
        computed from ``(seed, sample, element)``, as in training. The latents are then distributed as in
        training; latents of bin centers need not be. Decoded values may differ by 1 if the noise is
        within rounding error of a bin edge. In training mode as well, this initializes no ActNorm and moves
        no running statistics.
        """
        self._check_samples(x)
        self._check_context(context, x.shape[0])
        latents = []
        with state_from_data(False):
            y = self.dequantize.bin_center(x) if seed is None else self.dequantize(x, seed=seed)[0]
            for i, flow in enumerate(self.flows):
                y, _ = flow(y)
                if i < len(self.splits):
                    y, z, _ = self.splits[i](y)
                    latents.append(z)
        return *latents, y

    def decode(self, latents: tuple[Tensor, ...], context: Tensor | None = None) -> Tensor:
        """Samples from latents, which :meth:`encode` returns; uint8 if the model's samples are.

        Raises ValueError for latents of other shapes or dtypes, and for NaN.
        """
        self._check_latents(latents)
        self._check_context(context, latents[-1].shape[0])
        with torch.inference_mode(), state_from_data(False):
            *latents, y = latents
            for i in reversed(range(len(self.flows))):
                if i < len(self.splits):
                    y = self.splits[i].inverse(y, latents[i])
                y, _ = self.flows[i].inverse(y)
            x = self.dequantize.inverse(y)[0]
        return x.clone()  # not an inference tensor

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        latents: tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:
        """Draw ``n`` samples; an uninitialized ActNorm is the identity.

        In training mode as well, sampling changes no state of the model except torch's generators.

        Args:
            n: number of samples.
            temperature: factor of the noise of every latent.
            context: classes of the samples, int64 ``[n]``, for a class-conditional model.
            generator: generator that seeds the noise; None: torch's default generator.
            latents: latents to use, in the order of :meth:`encode`. None in place of a latent draws it, given
                the coarser latents.

        Shape: ``[n, *shape]``, uint8 if the model's samples are.
        Raises ValueError for a negative ``n`` or temperature, and for a context or latents of other shapes or
        dtypes.
        """
        if not isinstance(n, int) or n < 0:
            raise validation.argument_error("n", n, "0 or more")
        validation.number("temperature", temperature, "0 or more", lambda v: 0 <= v < math.inf)
        self._check_context(context, n)
        if latents is None:
            latents = (None,) * len(self.flows)
        self._check_latents(latents, n)
        # skips the autograd part of each op, a tenth of the sampling time on the CPU
        with torch.inference_mode(), state_from_data(False):
            y = latents[-1]
            if y is None:
                y = self.prior.sample(n, self.dequantize.like, temperature, context, generator)
            for i in reversed(range(len(self.flows))):
                if i < len(self.splits):
                    z, split = latents[i], self.splits[i]
                    y = split.sample(y, temperature, generator) if z is None else split.inverse(y, z)
                y, _ = self.flows[i].inverse(y)
            x = self.dequantize.inverse(y)[0]
        return x.clone()

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one sample's latents, from the finest level to the coarsest."""
        shapes, shape = [], self.shape
        for _ in self.splits:  # a split follows a squeeze and keeps half the channels
            shape = (2 * shape[0], shape[1] // 2, shape[2] // 2)
            shapes.append(shape)
        return [*shapes, self.prior.shape]

    def _check_samples(self, x: Tensor) -> None:
        dtype = self.dequantize.like.dtype if self.n_bits is None else torch.uint8
        kind = "images" if len(self.shape) == 3 else "vectors"
        values = f"{str(dtype).removeprefix('torch.')} {kind} [N, {', '.join(map(str, self.shape))}]"
        values += "" if self.n_bits is None else f" with values in [0, {2**self.n_bits})"
        if x.dtype != dtype:
            raise validation.argument_error("x", f"dtype {x.dtype}", values)
        if tuple(x.shape[1:]) != self.shape or x.ndim != 1 + len(self.shape):
            raise validation.argument_error("x", validation.shape_of(x), values)
        self._check_device("x", x)
        if self.n_bits is None:
            if _values_are_free(x) and not x.isfinite().all():
                raise validation.argument_error("x", "inf or NaN", values)
        elif (
            self.n_bits < 8
            and _values_are_free(x)
            and x.numel()
            and (largest := int(x.max())) >= 2**self.n_bits
        ):
            raise validation.argument_error("x", f"a value of {largest}", values)

    def _check_context(self, context: Tensor | None, n: int) -> None:
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
            _values_are_free(context)
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
        like = self.dequantize.like
        for i, (z, shape) in enumerate(zip(latents, shapes, strict=True)):
            if z is None and n is not None:  # sample draws it
                continue
            if z is None:
                raise validation.argument_error(f"latents[{i}]", "None", "a tensor")
            if tuple(z.shape) != (len(latents[-1]) if n is None else n, *shape):
                samples = "N" if n is None else n
                raise validation.argument_error(
                    f"latents[{i}]", validation.shape_of(z), f"[{samples}, {', '.join(map(str, shape))}]"
                )
            self._check_device(f"latents[{i}]", z)
            if z.dtype != like.dtype:
                raise validation.argument_error(
                    f"latents[{i}]", f"dtype {z.dtype}", f"{like.dtype}, the model's dtype"
                )
            if _values_are_free(z) and z.isnan().any():
                raise validation.argument_error(f"latents[{i}]", "NaN", "numbers")

    def _check_device(self, argument: str, t: Tensor) -> None:
        if t.device != self.dequantize.like.device:
            raise validation.argument_error(
                argument, f"device {t.device}", f"{self.dequantize.like.device}, the device of the model"
            )


def _values_are_free(t: Tensor) -> bool:
    """Whether reading values of t neither synchronizes with a device nor breaks a graph."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()
