"""Sylvester flow layer."""

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.nn.linear import KINDS, orthogonal_matrix
from fastflow.nn.lu_linear import without_autocast
from fastflow.nn.per_sample import context_weight, described, of_samples
from fastflow.nn.planar import activated, check_vectors
from fastflow.nn.root import root


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
        context_features: number C of features of the context; None: no context. Otherwise every sample has its own
            Q, R, :math:`\tilde R` and b: a linear map of its context, which starts at zero, is added to the learned
            parameters.

    Shape: x, y ``[N, D]``; context ``[N, C]`` or None; log_det ``[N]``, nats,
    :math:`\sum_i \log(1 + \tanh'(t_i) R_{ii} \tilde R_{ii})` with :math:`t = \tilde R Q^\top x + b`.
    Raises ValueError for x or a context of another shape, another precision or another device, and for other arguments.

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
        context_features: int | None = None,
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
        self.context_weight = context_weight(context_features, *self._learned())

    def _learned(self) -> tuple[Tensor, ...]:
        given = self.vectors if self.kind == "householder" else self.entries
        return given, self.factors, self.hidden_factors, self.bias

    def _parameters_of(
        self, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q, R, R-tilde, 1 plus the products of their diagonals, which is positive, and b; at least float32."""
        given, *factors, bias = of_samples(x, context, self.context_weight, *self._learned())
        basis = orthogonal_matrix(given, self.kind, columns=bias.shape[-1])
        diagonals = [f.diagonal(dim1=-2, dim2=-1) for f in factors]
        outer, inner = (
            f.triu(1) + torch.diag_embed(torch.tanh(d)) for f, d in zip(factors, diagonals, strict=True)
        )
        a, b = (2 * d for d in diagonals)
        one_plus = 2 * (torch.sigmoid(a) * torch.sigmoid(b) + torch.sigmoid(-a) * torch.sigmoid(-b))
        return basis, outer, inner, one_plus, bias

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors("x", x, self.features, self.bias)
        with without_autocast(x.device):
            basis, outer, inner, one_plus, bias = self._parameters_of(x, context)
            value, slope, rest = activated(_rows(x.to(bias.dtype), basis, inner.mT) + bias, "tanh")
            y = x.to(bias.dtype) + _rows(value, outer.mT, basis.mT)
            return y.to(x.dtype), (rest + slope * one_plus).log().sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors("z", z, self.features, self.bias)
        with without_autocast(z.device):
            basis, outer, inner, one_plus, bias = self._parameters_of(z, context)
            target = _rows(z.to(bias.dtype), basis)
            v, values = target[:, :0], target[:, :0]  # of the elements after i
            for i in reversed(range(bias.shape[-1])):
                rest = target[:, i] - (values * outer[..., i, i + 1 :]).sum(1)
                shift = bias[..., i] + (v * inner[..., i, i + 1 :]).sum(1)
                a, c, positive = (
                    p.expand_as(rest) for p in (outer[..., i, i], inner[..., i, i], one_plus[..., i])
                )
                found = root(_unit, rest, rest - a.abs(), rest + a.abs(), a, c, positive, shift)
                v = torch.cat([found[:, None], v], dim=1)
                values = torch.cat([torch.tanh(c * found + shift)[:, None], values], dim=1)
            x = z.to(bias.dtype) + _rows(v - target, basis.mT)
            _, slope, rest = activated(_rows(v, inner.mT) + bias, "tanh")
            return x.to(z.dtype), -(rest + slope * one_plus).log().sum(1)

    def extra_repr(self) -> str:
        reflections = "" if self.reflections is None else f", reflections={self.reflections}"
        given = described(self.context_weight)
        return f"{self.features}, hidden={self.hidden}, kind={self.kind!r}{reflections}{given}"


def _rows(x: Tensor, *matrices: Tensor) -> Tensor:
    """Each row of x times the matrices, which are those of all samples or of each."""
    for m in matrices:
        x = x @ m if m.ndim == 2 else (x[:, None] @ m)[:, 0]
    return x


def _unit(v: Tensor, outer: Tensor, inner: Tensor, one_plus: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    value, slope, rest = activated(inner * v + shift, "tanh")
    return v + outer * value, rest + slope * one_plus
