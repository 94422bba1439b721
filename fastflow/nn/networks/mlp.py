"""Coupling network for vectors."""

from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.networks.context import check_features, with_context


class MLP(nn.Module):
    """Coupling network for vectors: linear layers with ReLU in between.

    The last layer is zero-initialized, so a coupling starts as the identity.

    Args:
        in_features: number of input features; 0 with ``context_features``: the output depends on the context only.
        out_features: number of output features.
        hidden: number of units per hidden layer.
        layers: number of hidden layers.
        context_features: number of features of the context, which is concatenated to the input; None: no
            context.

    Shape: x ``[N, in_features]``; context ``[N, context_features]`` or None; output ``[N, out_features]``.
    Raises ValueError unless all arguments are positive integers, and for another context.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 64,
        layers: int = 2,
        context_features: int | None = None,
    ) -> None:
        super().__init__()
        check_features("in_features", in_features, context_features)
        validation.positive_ints(out_features=out_features, hidden=hidden, layers=layers)
        self.context_features = context_features
        widths = [in_features + (context_features or 0), *[hidden] * layers]
        body = [
            m
            for a, b in zip(widths, widths[1:], strict=False)
            for m in (nn.Linear(a, b), nn.ReLU(inplace=True))
        ]
        last = nn.Linear(hidden, out_features)
        self.net = nn.Sequential(*body, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(with_context(x, context, self.context_features))
