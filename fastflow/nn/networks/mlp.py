"""The coupling network of vectors."""

from torch import Tensor, nn

from fastflow import check


class MLP(nn.Module):
    """Linear layers with ReLU between, the last one zero-initialised, so that a coupling starts as the identity.

    Args:
        in_features, out_features: of vectors ``[N, in_features]``.
        hidden: width of the hidden layers.
        layers: number of hidden layers.

    Raises ValueError for numbers below 1.
    """

    def __init__(self, in_features: int, out_features: int, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        for name, value in {
            "in_features": in_features,
            "out_features": out_features,
            "hidden": hidden,
            "layers": layers,
        }.items():
            check.count(name, value)
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
