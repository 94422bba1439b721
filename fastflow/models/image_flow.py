"""A multi-scale model of one's own levels."""

from collections.abc import Sequence
from typing import TypeVar

from torch.distributions import Distribution

from fastflow import validation
from fastflow.models.levels import latent_shapes
from fastflow.models.model import Model
from fastflow.nn import Dequantize, DistributionPrior, Flow, GaussianPrior, IdentityDequantize, Prior, Split

T = TypeVar("T")


class ImageFlow(Model):
    r"""A multi-scale model of one's own levels: dequantization, then flow and split per level, then a prior.

    Source: RealNVP, arXiv:1605.08803, section 3.6. A level is any flow, usually a
    :class:`~fastflow.nn.Sequential`, with any number of squeezes. Construction passes one sample without values
    through all levels in both directions, to find the shapes of the latents.

    Args:
        shape: shape of one sample, ``(C, H, W)`` for an image.
        flows: one flow per level.
        splits: the splits between the levels, one fewer than ``flows``. Each keeps any number of channels.
        prior: prior of the last latent, a :class:`~fastflow.nn.Prior` or a distribution of torch.distributions;
            None: a standard Gaussian.
        dequantize: dequantization of uint8 samples; :class:`~fastflow.nn.IdentityDequantize` for continuous
            samples; None: ``Dequantize(8)``.
        context_shape: shape of one context of the flows, ``(C,)`` or ``(C, H, W)``; None: flows have none.
        standardize: standardize continuous samples before the first flow, see :meth:`Model.standardize_by`.
            ``fastflow.fit`` with ``standardize=True`` adds it.

    With a class-conditional prior, the context is the class of each sample. Checkpoints cannot rebuild the model:
    build it again, and save and load its ``state_dict()`` with torch.

    Shape: x uint8 ``[N, *shape]`` with values in ``[0, 2 ** n_bits)``, or floating point if the samples are
    continuous; context int64 ``[N]``, or floating point ``[N, *context_shape]``, or None; log_prob ``[N]``, nats.
    Raises ValueError for any other argument, for a level whose shapes do not fit, with its name, and for a prior
    of another shape than the last latent.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> from fastflow.models import ImageFlow
        >>> first = fnn.Sequential(fnn.Squeeze(), fnn.ActNorm(12), fnn.InvertibleConv1x1(12))
        >>> second = fnn.Sequential(*(fnn.GlowStep(3, hidden=8) for _ in range(2)))
        >>> model = ImageFlow((3, 8, 8), [first, second], [fnn.Split(12, kept=0.25)])
        >>> model.latent_shapes()
        [(9, 4, 4), (3, 4, 4)]
        >>> model(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)).mean().backward()
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        flows: Sequence[Flow],
        splits: Sequence[Split] = (),
        prior: Prior | Distribution | None = None,
        *,
        dequantize: Dequantize | IdentityDequantize | None = None,
        context_shape: tuple[int, ...] | None = None,
        standardize: bool = False,
    ) -> None:
        validation.sample_shape("shape", shape)
        if context_shape is not None:
            validation.sample_shape("context_shape", context_shape)
        flows, splits = _listed("flows", flows, Flow), _listed("splits", splits, Split)
        if not flows or len(splits) != len(flows) - 1:
            got = f"{len(splits)} for {len(flows)} flows"
            raise validation.argument_error("splits", got, "one split between each two flows")
        dequantize = Dequantize() if dequantize is None else dequantize
        if not isinstance(dequantize, (Dequantize, IdentityDequantize)):
            expected = "a Dequantize or an IdentityDequantize"
            raise validation.argument_error("dequantize", type(dequantize).__name__, expected)
        if standardize and dequantize.n_bits is not None:
            raise validation.argument_error("standardize", standardize, "False for uint8 samples")
        shapes = latent_shapes(tuple(shape), flows, splits, dequantize.like, context_shape)
        prior = prior_of(prior, shapes[-1])
        classes = getattr(prior, "classes", None)
        if classes is not None and context_shape is not None:
            raise validation.argument_error("context_shape", context_shape, "None, as the prior has classes")
        super().__init__(shape, dequantize, flows, splits, prior, classes, None, context_shape, standardize)
        self._latent_shapes = shapes

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one sample's latents, from the finest level to the coarsest."""
        return list(self._latent_shapes)


def _listed(argument: str, modules: Sequence[T], kind: type[T]) -> list[T]:
    if not isinstance(modules, Sequence):
        raise validation.argument_error(argument, type(modules).__name__, f"a list of {kind.__name__}s")
    for i, module in enumerate(modules):
        if not isinstance(module, kind):
            raise validation.argument_error(f"{argument}[{i}]", type(module).__name__, f"a {kind.__name__}")
    return list(modules)


def prior_of(prior: Prior | Distribution | None, shape: tuple[int, ...]) -> Prior:
    """The prior of a latent of this shape; None: a standard Gaussian. Raises ValueError for any other prior."""
    if prior is None:
        return GaussianPrior(shape)
    if isinstance(prior, Distribution):
        prior = DistributionPrior(prior)
    if not isinstance(prior, Prior):
        expected = "a fastflow.nn.Prior or a torch.distributions.Distribution"
        raise validation.argument_error("prior", type(prior).__name__, expected)
    if prior.shape != shape:
        raise validation.argument_error(
            "prior", f"shape {list(prior.shape)}", f"{list(shape)}, the shape of the last latent"
        )
    return prior
