"""Invertible 1x1 convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.flow import Flow, check_channels
from fastflow.nn.permute import Permute
from fastflow.ops import acc_dtype, positions
from fastflow.reversible import Gradients, vjp


class InvertibleConv1x1(Flow):
    r"""Invertible 1x1 convolution :math:`y = W x` at every position (Glow, arXiv:1807.03039, section 3.2).

    W is initialized to a random orthogonal matrix, the factor Q of the QR decomposition of a Gaussian matrix, as in
    openai/glow. It is a rotation or a reflection: with LAPACK, :math:`\det W = (-1)^{C - 1}`. Q is not uniformly
    distributed (Haar), since the signs of the diagonal of R are not normalized.

    With ``lu=True``, :math:`W = P L (U + \operatorname{diag}(s))` (eq. 10), where P and the signs of s are fixed:
    :math:`\log|\det W|` is then a sum, and :math:`W^{-1}` follows from triangular solves. With ``lu=False``, W is
    an unconstrained matrix, and each pass computes its determinant and its inverse. The inverse direction multiplies
    by :math:`W^{-1}`; docs/precision.md compares its accuracy with two triangular solves.

    Args:
        num_features: number of channels C.
        lu: parameterize W by its LU decomposition.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`P \log|\det W|` with P the number of positions
    of a sample.
    Raises ValueError if C differs from ``num_features``, and for a ``num_features`` that is no positive
    integer.
    """

    perm: Tensor
    sign_s: Tensor

    def __init__(self, num_features: int, lu: bool = True) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        validation.boolean("lu", lu)
        self.num_features, self.lu = num_features, lu
        dtype = torch.get_default_dtype()
        orthogonal = torch.linalg.qr(torch.randn(num_features, num_features, dtype=torch.float64)).Q
        if lu:
            P, L, U = torch.linalg.lu(orthogonal)
            s = U.diagonal()
            self.register_buffer("perm", P.argmax(dim=1))  # P[i, perm[i]] = 1
            self.register_buffer("sign_s", s.sign().to(dtype))
            self.lower = nn.Parameter(L.tril(-1).to(dtype))
            self.upper = nn.Parameter(U.triu(1).to(dtype))
            self.log_s = nn.Parameter(s.abs().log().to(dtype))
        else:
            self.weight = nn.Parameter(orthogonal.to(dtype))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """W and its inverse, ``[C, C]`` each, and the scalar log|det W| in nats; float32 if parameters are half."""
        if self.lu:
            weight, inverse, log_det = stacked_weights([self])
            return weight[0], inverse[0], log_det[0]
        weight = self.weight.to(acc_dtype(self.weight.dtype))
        return weight, torch.linalg.inv(weight), torch.linalg.slogdet(weight).logabsdet

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        weight, _, log_det = self.weights()
        return ops.conv1x1(x, weight), _per_sample(log_det, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        _, weight_inverse, log_det = self.weights()
        return ops.conv1x1(z, weight_inverse), -_per_sample(log_det, z)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        with torch.enable_grad():
            weight, weight_inverse, log_det = self.weights()
        x, dx, dweight, _ = ops.conv1x1_inverse_backward(
            z, weight.detach(), weight_inverse.detach(), None, dz
        )
        dlog_det = (positions(z) * dlog_det.sum()).to(log_det.dtype)
        return x, dx, vjp((weight, log_det), (dweight, dlog_det), wanted)

    def extra_repr(self) -> str:
        return f"{self.num_features}, lu={self.lu}"


def _per_sample(log_det: Tensor, x: Tensor) -> Tensor:
    return (positions(x) * log_det).to(acc_dtype(x.dtype)).expand(x.shape[0])


def stacked_weights(layers: Sequence[InvertibleConv1x1 | Permute]) -> tuple[Tensor, Tensor, Tensor]:
    """W and its inverse, ``[K, C, C]`` each, and log|det W| ``[K]`` of several layers; one op if all use LU.

    ``layers`` have one class: :class:`InvertibleConv1x1` or :class:`~fastflow.nn.Permute`.
    """
    if all(isinstance(layer, InvertibleConv1x1) and layer.lu for layer in layers):
        names = ("perm", "lower", "upper", "log_s", "sign_s")
        perm, *rest = (torch.stack([getattr(layer, name) for layer in layers]) for name in names)
        return ops.lu_weight(perm, *(v.to(acc_dtype(v.dtype)) for v in rest))
    weight, inverse, log_det = (
        torch.stack(v) for v in zip(*(layer.weights() for layer in layers), strict=True)
    )
    return weight, inverse, log_det
