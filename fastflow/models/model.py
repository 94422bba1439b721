"""What every model can do."""

import math

import torch
from torch import Tensor, nn

from fastflow import check
from fastflow.nn import AffineCoupling, BatchNorm, Continuous, Dequantize, Flow, Prior, Split
from fastflow.nn.networks.residual_network import WeightNormConv2d


class Model(nn.Module):
    """A flow with its priors: dequantize, then flow and split level by level, then a prior over what is left.

    Args:
        shape: of one sample, ``(C, H, W)`` of an image or ``(D,)`` of a vector.
        dequantize: uint8 samples to continuous ones; :class:`~fastflow.nn.Continuous` where they are continuous.
        flows: one for each level.
        splits: between the levels, so one fewer.
        prior: of the last latent.
        classes: number of classes that the context names, None for an unconditional model.
        config: the arguments that build this model again, kept in checkpoints.

    Values of uint8 samples lie in ``[0, 2 ** n_bits)``. The context of a class-conditional model is int64 ``[N]``. Shapes and dtypes are
    checked always; values (bit depth, class, NaN) in eager mode on the CPU only, so that nothing waits for a device or breaks a graph.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dequantize: Dequantize | Continuous,
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

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """Log-probability of the samples, ``[N]`` nats; of discrete ones a lower bound of it, by one draw of the dequantization noise.

        The noise comes from torch's generator, or is a function of ``(seed, offset + sample, element)``.
        """
        self._check_samples(x)
        self._check_context(context, x.shape[0])
        y, log_prob = self.dequantize(x, seed=seed, offset=offset)
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
        """Negative log-probability in bits for each of a sample's values, ``[N]``."""
        return self.log_prob(x, context, seed=seed, offset=offset) / (-math.log(2) * math.prod(self.shape))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """:meth:`bits_per_dim`, so that DDP and torch.compile wrap training."""
        return self.bits_per_dim(x, context, seed=seed, offset=offset)

    def initialize(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> None:
        """Initialises every ActNorm that has not been, from a batch, as the first forward pass in training mode does.

        Where torch.distributed is initialised every rank has to, each with its own share of a batch: see :class:`fastflow.nn.ActNorm`.
        """
        training = self.training
        self.train()
        with torch.no_grad():
            self.log_prob(x, context, seed=seed, offset=offset)
        self.train(training)

    def running_statistics(self) -> list[Tensor]:
        """The buffers that a pass in training mode moves: means, variances and counts of batch normalizations."""
        layers = (m for m in self.modules() if isinstance(m, (BatchNorm, nn.modules.batchnorm._BatchNorm)))
        return [b for m in layers for b in m.buffers()]

    def weight_scales(self) -> list[nn.Parameter]:
        """The scales g of weight-normalised convolutions, which RealNVP penalises."""
        return [m.g for m in self.modules() if isinstance(m, WeightNormConv2d)]

    def compile_networks(self, **options) -> None:
        """Compiles every coupling network where it is (``torch.compile`` with ``options``), which the reversible chains around them allow.

        Networks of one level are compiled once for all of them, anew for each batch size and for training, evaluation and sampling, when
        these first come.
        """
        # torch would give up after 8 of these kinds
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(self.flows))
        for module in self.modules():
            if isinstance(module, AffineCoupling):
                module.net.compile(**{"dynamic": False} | options)

    @torch.no_grad()
    def encode(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Latents, fine to coarse, of x, if discrete dequantized at the bin centre: ``decode(encode(x))`` is x.

        With a ``seed`` it is dequantized by noise, a function of ``(seed, sample, element)``, as in training: what comes back may differ
        by 1 where noise falls within rounding of a bin's edge, but latents are such as the prior draws, which those of the centre need
        not be.
        """
        self._check_samples(x)
        self._check_context(context, x.shape[0])
        y, latents = self.dequantize.centre(x) if seed is None else self.dequantize(x, seed=seed)[0], []
        for i, flow in enumerate(self.flows):
            y, _ = flow(y)
            if i < len(self.splits):
                y, z, _ = self.splits[i](y)
                latents.append(z)
        return *latents, y

    def decode(self, latents: tuple[Tensor, ...], context: Tensor | None = None) -> Tensor:
        """Samples, uint8 where the model's are, from latents as :meth:`encode` gives. Raises ValueError for other shapes, and for NaN."""
        self._check_latents(latents)
        self._check_context(context, latents[-1].shape[0])
        with torch.inference_mode():
            *latents, y = latents
            for i in reversed(range(len(self.flows))):
                if i < len(self.splits):
                    y = self.splits[i].inverse(y, latents[i])
                y, _ = self.flows[i].inverse(y)
            x = self.dequantize.inverse(y)[0]
        return x.clone()  # a tensor like others

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        latents: tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:
        """``n`` samples ``[n, *shape]``, uint8 where the model's are; every latent's noise is scaled by ``temperature``.

        ``latents``, as :meth:`encode` gives them for ``n`` samples, are kept; those that are None are drawn, each given the coarser ones.
        Noise is seeded from ``generator`` or torch's own. An ActNorm that was never initialised is the identity here.
        """
        if n < 0:
            raise check.error("n", n, "0 or more")
        if temperature < 0:
            raise check.error("temperature", temperature, "0 or more")
        self._check_context(context, n)
        if latents is None:
            latents = (None,) * len(self.flows)
        self._check_latents(latents, n)
        with (
            torch.inference_mode()
        ):  # past autograd's part of each op, which costs the CPU a tenth of a sample's time
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
        """Shapes of a sample's latents, fine to coarse."""
        shapes, shape = [], self.shape
        for _ in self.splits:  # after a squeeze half the channels leave
            shape = (2 * shape[0], shape[1] // 2, shape[2] // 2)
            shapes.append(shape)
        return [*shapes, self.prior.shape]

    def _check_samples(self, x: Tensor) -> None:
        dtype = self.dequantize.like.dtype if self.n_bits is None else torch.uint8
        kind = "images" if len(self.shape) == 3 else "vectors"
        values = f"{str(dtype).removeprefix('torch.')} {kind} [N, {', '.join(map(str, self.shape))}]"
        values += "" if self.n_bits is None else f" with values in [0, {2**self.n_bits})"
        if x.dtype != dtype:
            raise check.error("x", f"dtype {x.dtype}", values)
        if tuple(x.shape[1:]) != self.shape or x.ndim != 1 + len(self.shape):
            raise check.error("x", check.shape_of(x), values)
        self._check_device("x", x)
        if self.n_bits is None:
            if _values_are_free(x) and not x.isfinite().all():
                raise check.error("x", "inf or NaN", values)
        elif (
            self.n_bits < 8
            and _values_are_free(x)
            and x.numel()
            and (largest := int(x.max())) >= 2**self.n_bits
        ):
            raise check.error("x", f"a value of {largest}", values)

    def _check_context(self, context: Tensor | None, n: int) -> None:
        if self.classes is None:
            if context is not None:
                raise check.error(
                    "context", f"a tensor of {check.shape_of(context)}", "None, the model has no classes"
                )
            return
        expected = f"int64 classes [{n}] in [0, {self.classes})"
        if context is None:
            raise check.error("context", "None", expected)
        if context.dtype != torch.int64 or tuple(context.shape) != (n,):
            raise check.error("context", f"{context.dtype} of {check.shape_of(context)}", expected)
        self._check_device("context", context)
        if (
            _values_are_free(context)
            and n
            and not (0 <= int(context.min()) and int(context.max()) < self.classes)
        ):
            raise check.error(
                "context", f"values from {int(context.min())} to {int(context.max())}", expected
            )

    def _check_latents(self, latents: tuple[Tensor | None, ...], n: int | None = None) -> None:
        shapes = self.latent_shapes()
        if len(latents) != len(shapes):
            raise check.error("latents", f"{len(latents)} tensors", f"{len(shapes)}, as encode gives them")
        like = self.dequantize.like
        for i, (z, shape) in enumerate(zip(latents, shapes, strict=True)):
            if z is None and n is not None:  # it will be drawn
                continue
            if z is None:
                raise check.error(f"latents[{i}]", "None", "a tensor")
            if tuple(z.shape) != (len(latents[-1]) if n is None else n, *shape):
                samples = "N" if n is None else n
                raise check.error(
                    f"latents[{i}]", check.shape_of(z), f"[{samples}, {', '.join(map(str, shape))}]"
                )
            self._check_device(f"latents[{i}]", z)
            if z.dtype != like.dtype:
                raise check.error(f"latents[{i}]", f"dtype {z.dtype}", f"{like.dtype}, the model's")
            if _values_are_free(z) and z.isnan().any():
                raise check.error(f"latents[{i}]", "NaN", "numbers")

    def _check_device(self, argument: str, t: Tensor) -> None:
        if t.device != self.dequantize.like.device:
            raise check.error(
                argument, f"device {t.device}", f"{self.dequantize.like.device}, where the model is"
            )


def _values_are_free(t: Tensor) -> bool:
    return t.device.type == "cpu" and not torch.compiler.is_compiling()
