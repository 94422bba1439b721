"""Coupling with the CDFs of mixtures of logistics."""

from typing import Any

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.elementwise_coupling import ElementwiseCoupling
from fastflow.ops.mixture_cdf import mixture_cdf, mixture_cdf_inverse_backward, mixture_cdf_parameters


class MixtureCDFCoupling(ElementwiseCoupling):
    r"""Coupling with CDFs of mixtures of K logistics, :math:`y_a = x_a,\; y_b = e^{\tanh a} \operatorname{logit} F(x_b) + b`.

    The scale a, the shift b and the mixture F of each element are the output of ``net(x_a)``, see
    :func:`fastflow.ops.mixture_cdf`. Source: Flow++, arXiv:1902.00275, section 3.2.

    Args:
        net: coupling network, any module. It is called as ``net(x_a)``, or ``net(x_a, context)`` if a context
            is given. Its output has ``MixtureCDFCoupling.params_per_element(components)`` channels for each channel of
            its part, see below; zeros are the identity.
        mask, swap_halves, split: as for :class:`AffineCoupling`.
        components: number of components K.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats. With ``"halves"`` or a mask ``[C]``, the network maps the k
    channels that pass through, ``[N, k, ...]``, to ``[N, (C - k) P, ...]``: the P parameters of the first transformed
    channel, then those of the second. With C = 1 its input is empty, and the coupling depends on the context only.
    With ``"checkerboard"`` or a mask of a sample's shape, its input ``[N, C, ...]`` is zero where x is transformed, and
    its output is ``[N, C P, ...]``.
    Raises ValueError for other shapes and arguments, as :class:`AffineCoupling` and
    :func:`fastflow.ops.mixture_cdf` do.

    Equal components receive equal gradients and stay equal, so a network whose last layer is zero needs
    :meth:`initial_bias`. The log-scale of y is between -1 and 1, and those of components are between
    -7 and 7.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> net = fnn.MLP(2, 2 * fnn.MixtureCDFCoupling.params_per_element(components=4))
        >>> net.net[-1].bias.data.copy_(fnn.MixtureCDFCoupling.initial_bias(2, components=4))  # doctest: +ELLIPSIS
        tensor(...)
        >>> y, log_det = fnn.MixtureCDFCoupling(net, components=4)(torch.randn(16, 4))
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        components: int = 8,
        mask: str | Tensor = "halves",
        swap_halves: bool = False,
        split: float | None = None,
    ) -> None:
        super().__init__(net, mask, swap_halves, split)
        validation.positive_int("components", components)
        self.components = components

    @staticmethod
    def params_per_element(components: int = 8) -> int:
        """Number P of parameters of one element, 3 ``components`` + 2."""
        return mixture_cdf_parameters(components)

    @staticmethod
    def initial_bias(channels: int, components: int = 8, spread: float = 1.0) -> Tensor:
        """Bias ``[channels P]`` of a network's last layer: means at equal distances from -spread to spread, else 0.

        With a ``spread`` of 1, the coupling is close to the identity, and training separates the components.
        """
        validation.positive_ints(channels=channels, components=components)
        bias = torch.zeros(channels, mixture_cdf_parameters(components))
        bias[:, 2 + components : 2 + 2 * components] = torch.linspace(-spread, spread, components)
        return bias.flatten()

    @property
    def each(self) -> int:
        return mixture_cdf_parameters(self.components)

    def _transform(
        self, v: Tensor, params: Tensor, channels: dict[str, Any], inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        return mixture_cdf(v, params, **channels, components=self.components, inverse=inverse)

    def _transform_inverse_backward(
        self, y: Tensor, params: Tensor, dy: Tensor, dlog_det: Tensor, channels: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        given: dict[str, Any] = {"channel_order": None} | channels
        return mixture_cdf_inverse_backward(
            y, params, dy=dy, dlog_det=dlog_det, **given, components=self.components
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, components={self.components}"
