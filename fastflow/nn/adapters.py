"""Layers of other code as flows, and flows as such layers."""

from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.reversible import zero_log_det


class FromReverse(Flow):
    """A layer ``z, ldj = layer(z, ldj, reverse=False)`` as a flow.

    The layer adds its log-det to ``ldj``, and with ``reverse=True`` the log-det of the inverse, as in the UvA
    tutorial on image flows. Its splits, which change the number of values, are no flows: use
    :class:`~fastflow.nn.Split`.

    Args:
        layer: the layer, any module.
        context_name: keyword by which the layer takes the context.

    Shape: as the layer's; log_det ``[N]``, nats.
    Raises ValueError if ``layer`` is no module.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> class Double(torch.nn.Module):
        ...     def forward(self, z, ldj, reverse=False):
        ...         log_two = 0.6931471805599453 * z[0].numel()
        ...         return (z / 2, ldj - log_two) if reverse else (2 * z, ldj + log_two)
        >>> flow = fnn.Sequential(fnn.ActNorm(4), fnn.FromReverse(Double()))
        >>> z, log_det = flow(torch.randn(8, 4))
    """

    def __init__(self, layer: nn.Module, *, context_name: str = "orig_img") -> None:
        super().__init__()
        _check_module("layer", layer)
        self.layer, self.context_name = layer, context_name

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._called(x, context, reverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._called(z, context, reverse=True)

    def _called(self, x: Tensor, context: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        given = {} if context is None else {self.context_name: context}
        return self.layer(x, zero_log_det(x), reverse=reverse, **given)


class WithReverse(nn.Module):
    """A flow as a layer ``z, ldj = layer(z, ldj, reverse=False)``, as :class:`FromReverse` describes it.

    Args:
        flow: any flow.

    Shape: as the flow's; ldj ``[N]``, nats, or None for 0.
    Raises ValueError if ``flow`` is not a Flow.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.WithReverse(fnn.ActNorm(4))
        >>> z, ldj = layer(torch.randn(8, 4), torch.zeros(8))
        >>> x, ldj = layer(z, ldj, reverse=True)
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        _check_flow(flow)
        self.flow = flow

    def forward(
        self, z: Tensor, ldj: Tensor | None, reverse: bool = False, orig_img: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and the sum of ``ldj`` and the log-det; ``orig_img`` is the flow's context."""
        z, log_det = self.flow.inverse(z, orig_img) if reverse else self.flow(z, orig_img)
        return z, log_det if ldj is None else ldj + log_det


class WithoutLogDet(nn.Module):
    """A flow as a layer ``y = layer(x)`` of an ordinary network, without its log-det.

    A chain of additive couplings is then a reversible residual network (RevNet, arXiv:1707.04585; iRevNet,
    arXiv:1802.07088): with ``reversible=True``, the default of :class:`Sequential`, memory does not grow with the number of
    blocks (docs/memory.md).

    Args:
        flow: any flow.

    Shape: as the flow's.
    Raises ValueError if ``flow`` is not a Flow.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastflow import nn as fnn
        >>> block = fnn.AdditiveCoupling(fnn.MLP(8, 8), swap_halves=True), fnn.AdditiveCoupling(fnn.MLP(8, 8))
        >>> net = nn.Sequential(fnn.WithoutLogDet(fnn.Sequential(*block)), nn.Linear(16, 10))
        >>> logits = net(torch.randn(32, 16))
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        _check_flow(flow)
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow(x, context)[0]


class FromEncoderDecoder(Flow):
    """A module with methods ``encoder`` and ``decoder`` as a flow; :class:`EncoderDecoder` is the other way round.

    Both methods return ``(output, log_det)`` of their direction. A log-det without dimensions holds for every
    sample.

    Args:
        module: the module.

    Shape: as the module's; log_det ``[N]``, nats.
    Raises ValueError if ``module`` is no module, or has no such methods.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> flow = fnn.FromEncoderDecoder(fnn.EncoderDecoder(fnn.ActNorm(4)))
        >>> z, log_det = flow(torch.randn(8, 4))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        _check_module("module", module)
        if not all(callable(getattr(module, name, None)) for name in ("encoder", "decoder")):
            got = type(module).__name__
            raise validation.argument_error("module", got, "a module with methods encoder and decoder")
        self.module = module

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _called(self.module, "encoder", x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _called(self.module, "decoder", z, context)


def _called(module: nn.Module, name: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    direction = getattr(module, name)
    y, log_det = direction(x) if context is None else direction(x, context)
    return y, log_det.expand(x.shape[0]) if log_det.ndim == 0 else log_det


def _check_module(argument: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise validation.argument_error(argument, repr(module), "a torch.nn.Module")


def _check_flow(flow: object) -> None:
    if not isinstance(flow, Flow):
        raise validation.argument_error("flow", type(flow).__name__, "a Flow")
