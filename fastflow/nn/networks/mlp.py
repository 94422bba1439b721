"""Coupling network for vectors."""

from torch import Tensor, nn

from fastflow import validation


class MLP(nn.Module):
    """Coupling network for vectors: linear layers with ReLU in between.

    The last layer is zero-initialized, so a coupling starts as the identity.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        hidden: number of units per hidden layer.
        layers: number of hidden layers.

    Shape: ``[N, in_features]`` to ``[N, out_features]``.
    Raises ValueError unless all arguments are positive integers.
    """

    def __init__(self, in_features: int, out_features: int, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "hidden": hidden, "layers": layers}
        validation.positive_ints(**sizes)
        widths = [in_features, *[hidden] * layers]
        body = [
            m
            for a, b in zip(widths, widths[1:], strict=False)
            for m in (nn.Linear(a, b), nn.ReLU(inplace=True))
        ]
        self.net = nn.Sequential(*body, nn.Linear(hidden, out_features))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
