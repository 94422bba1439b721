"""Sylvester flow layer."""

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.nn.linear import KINDS, orthogonal_matrix
from fastflow.nn.lu_linear import without_autocast
from fastflow.nn.planar import activated, check_vectors
from fastflow.nn.root import root
from fastflow.ops import acc_dtype


class Sylvester(Flow):
    r"""Sylvester flow, :math:`y = x + Q R \tanh(\tilde R Q^\top x + b)`: a planar flow with M hidden units instead of one.

    Source: arXiv:1803.05649, eq. 13. Q ``[D, M]`` has orthonormal columns: the first M of an orthogonal matrix, see
    :class:`OrthogonalLinear`. R and :math:`\tilde R` ``[M, M]`` are upper triangular, with tanh of a parameter on
    their diagonals, so that :math:`R_{ii} \tilde R_{ii} > -1`: theorem 2 of the paper makes the layer invertible.

    The inverse is :math:`x = y + Q (v - Q^\top y)`, where :math:`v + R \tanh(\tilde R v + b) = Q^\top y`. Element i of this
    system depends on elements from i on, so back substitution solves it: M increasing functions of one variable, one
    after the other, each by Newton's method in a bracket. The forward direction is the fast one.
    ``Inverse(Sylvester(D, M))`` has it from latents to data, as the paper has.

    The parameter ``factors`` ``[M, M]`` holds R, and ``hidden_factors`` ``[M, M]`` holds :math:`\tilde R`; entries below
    their diagonals are not read. The layer starts with entries of variance 1 / M.

    Args:
        features: number of features D.
        hidden: number M of hidden units, from 1 to D. None: D.
        kind: the form of Q, ``"householder"``, ``"cayley"`` or ``"exponential"``, see :class:`OrthogonalLinear`.
        reflections: number of reflections, of ``"householder"`` only. None: D.

    Shape: x, y ``[N, D]``; log_det ``[N]``, nats,
    :math:`\sum_i \log(1 + \tanh'(t_i) R_{ii} \tilde R_{ii})` with :math:`t = \tilde R Q^\top x + b`.
    Raises ValueError for x of another shape, another precision or another device, and for other arguments.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.Sylvester(4, hidden=2)
        >>> z, log_det = layer(torch.randn(8, 4))
        >>> x, _ = layer.inverse(z)
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        kind: str = "householder",
        reflections: int | None = None,
    ) -> None:
        super().__init__()
        validation.positive_int("features", features)
        validation.positive_int("hidden", hidden, optional=True)
        if hidden is not None and hidden > features:
            raise validation.argument_error("hidden", hidden, f"1 to {features}, the number of features")
        validation.one_of("kind", kind, KINDS)
        validation.positive_int("reflections", reflections, optional=True)
        if reflections is not None and kind != "householder":
            raise validation.argument_error("reflections", reflections, f"None with kind={kind!r}")
        self.features, self.hidden, self.kind, self.reflections = features, hidden, kind, reflections
        m = hidden or features
        if kind == "householder":
            self.vectors = nn.Parameter(torch.randn(reflections or features, features))
        else:
            self.entries = nn.Parameter(torch.randn(features, features) * features**-0.5)
        self.factors = nn.Parameter(torch.randn(m, m) * m**-0.5)
        self.hidden_factors = nn.Parameter(torch.randn(m, m) * m**-0.5)
        self.bias = nn.Parameter(torch.zeros(m))

    def _parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q, R, R-tilde, 1 plus the products of their diagonals, which is positive, and b; at least float32."""
        dtype = acc_dtype(x.dtype)
        given = self.vectors if self.kind == "householder" else self.entries
        basis = orthogonal_matrix(given, self.kind)[:, : self.bias.shape[0]]
        factors, hidden_factors = self.factors.to(dtype), self.hidden_factors.to(dtype)
        outer, inner = (f.triu(1) + torch.diag(torch.tanh(f.diagonal())) for f in (factors, hidden_factors))
        a, b = 2 * factors.diagonal(), 2 * hidden_factors.diagonal()
        one_plus = 2 * (torch.sigmoid(a) * torch.sigmoid(b) + torch.sigmoid(-a) * torch.sigmoid(-b))
        return basis.to(dtype), outer, inner, one_plus, self.bias.to(dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors("x", x, self.features, self.bias)
        with without_autocast(x.device):
            basis, outer, inner, one_plus, bias = self._parameters_of(x)
            value, slope, rest = activated(x.to(bias.dtype) @ basis @ inner.mT + bias, "tanh")
            y = x.to(bias.dtype) + value @ outer.mT @ basis.mT
            return y.to(x.dtype), (rest + slope * one_plus).log().sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors("z", z, self.features, self.bias)
        with without_autocast(z.device):
            basis, outer, inner, one_plus, bias = self._parameters_of(z)
            target = z.to(bias.dtype) @ basis
            v, values = target[:, :0], target[:, :0]  # of the elements after i
            for i in reversed(range(bias.shape[0])):
                rest = target[:, i] - values @ outer[i, i + 1 :]
                shift = bias[i] + v @ inner[i, i + 1 :]
                a, c, positive = (p.expand_as(rest) for p in (outer[i, i], inner[i, i], one_plus[i]))
                found = root(_unit, rest, rest - a.abs(), rest + a.abs(), a, c, positive, shift)
                v = torch.cat([found[:, None], v], dim=1)
                values = torch.cat([torch.tanh(c * found + shift)[:, None], values], dim=1)
            x = z.to(bias.dtype) + (v - target) @ basis.mT
            _, slope, rest = activated(v @ inner.mT + bias, "tanh")
            return x.to(z.dtype), -(rest + slope * one_plus).log().sum(1)

    def extra_repr(self) -> str:
        reflections = "" if self.reflections is None else f", reflections={self.reflections}"
        return f"{self.features}, hidden={self.hidden}, kind={self.kind!r}{reflections}"


def _unit(v: Tensor, outer: Tensor, inner: Tensor, one_plus: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    value, slope, rest = activated(inner * v + shift, "tanh")
    return v + outer * value, rest + slope * one_plus
