"""Another naming of the two directions."""

from torch import Tensor, nn

from fastflow import check
from fastflow.nn.flow import Flow, FlowReport


class EncoderDecoder(nn.Module):
    """A flow under the names of the encoder (data to latent) and the decoder (latent to data), as some exercises on flows have them.

    Args:
        flow: any :class:`Flow`.

    Both directions return ``(output, log_det)``, log_det ``[N]`` in nats, of that direction. Raises ValueError for what is no Flow.

    Example:
        >>> import torch
        >>> from fastflow.nn import ActNorm, EncoderDecoder
        >>> layer = EncoderDecoder(ActNorm(2))
        >>> z, log_det = layer.encoder(torch.randn(8, 2))
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise check.error("flow", type(flow).__name__, "a Flow")
        self.flow = flow

    def encoder(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow(x, context)

    def decoder(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(z, context)

    def check(self, x: Tensor, context: Tensor | None = None, **tolerances: float) -> FlowReport:
        """:meth:`Flow.check`."""
        return self.flow.check(x, context, **tolerances)
