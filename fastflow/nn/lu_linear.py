"""Linear map of vectors, learned as a product of triangular matrices."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.flow import Flow
from fastflow.nn.permute import permutation_of
from fastflow.ops import acc_dtype
from fastflow.reversible import Gradients, vjp


class LULinear(Flow):
    r"""Linear map of vectors, :math:`y = L U P x + b`, of a unit lower and an upper triangular matrix and a permutation.

    Source: neural spline flows, arXiv:1906.04032, section 3.2. The permutation P is fixed, by default the identity. It
    permutes the columns of the matrix, so it costs no pass over x. The diagonal of U is
    :math:`\operatorname{softplus}(u) + \epsilon > 0`. One parameter ``factors`` ``[D, D]`` holds the entries of L below
    its diagonal, those of U above it, and u on its diagonal.

    The layer is its permutation at initialization. :class:`InvertibleConv1x1` starts from a random orthogonal matrix
    instead, and takes images.

    The inverse solves two triangular systems. Products and solves are at least float32, also under autocast.

    Args:
        features: number of features D.
        identity_init: start as the permutation. False: the entries of L and U off their diagonals start uniform in
            :math:`\pm 1 / \sqrt D`, with a diagonal of 1, so that the log-det is 0.
        eps: :math:`\epsilon`, the lower bound of the diagonal of U.
        permutation: None, or an order as :class:`~fastflow.nn.Permute` takes it: feature i of P x is feature
            ``perm[i]`` of x. A buffer ``perm`` holds it.

    Shape: x, y ``[N, D]``; log_det ``[N]``, nats, :math:`\sum_d \log U_{dd}`.
    Raises ValueError for x of another shape, another precision or another device, for an ``eps`` outside [0, 1), for
    another permutation, and for ``features`` that are no positive integer. The inverse raises
    :class:`~fastflow.validation.SingularError` if a diagonal is 0, inf or NaN, see
    :func:`fastflow.ops.triangular_solve`.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> flow = fnn.Sequential(fnn.LULinear(4, permutation="random"), fnn.LULinear(4, permutation="random"))
        >>> z, log_det = flow(torch.randn(8, 4))
    """

    perm: Tensor | None

    def __init__(
        self,
        features: int,
        identity_init: bool = True,
        eps: float = 1e-3,
        permutation: str | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        validation.positive_int("features", features)
        validation.boolean("identity_init", identity_init)
        validation.number("eps", eps, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        self.features, self.identity_init, self.eps, self.permutation = (
            features,
            identity_init,
            eps,
            permutation,
        )
        perm = None if permutation is None else permutation_of(features, permutation, "permutation")
        self.register_buffer("perm", perm)
        self.factors = nn.Parameter(torch.zeros(features, features))
        self.bias = nn.Parameter(torch.zeros(features))
        with torch.no_grad():
            if not identity_init:
                self.factors.uniform_(-1, 1).mul_(features**-0.5)
            self.factors.diagonal().fill_(math.log(math.expm1(1 - eps)))

    def weight(self) -> Tensor:
        """The matrix L U P, ``[D, D]``; float32 if the parameters are half."""
        with without_autocast(self.factors.device):
            return self._matrices()[0]

    def _matrices(self) -> tuple[Tensor, ...]:
        """See :func:`matrices_of`."""
        perm = None if self.perm is None else self.perm[None]
        return tuple(m[0] for m in matrices_of(self.factors[None], self.eps, perm))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.features:
            expected = f"[N, {self.features}], vectors with the layer's number of features"
            raise validation.argument_error("x", validation.shape_of(x), expected)
        validation.same_device_and_precision("x", x, "the layer's parameters", self.factors)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *shared_args: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``; ``shared_args`` is the layer's entry of ``shared_matrices`` if it is computed."""
        self._check(x)
        with without_autocast(x.device):
            weight, _, _, log_det = shared_args or self._matrices()
            y = F.linear(x.to(weight.dtype), weight, self.bias.to(weight.dtype))
        return y.to(x.dtype), log_det.expand(x.shape[0])

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *shared_args: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``; ``shared_args`` is the layer's entry of ``shared_matrices`` or ``shared_inverses``."""
        self._check(z)
        with without_autocast(z.device):
            if len(shared_args) == len(("weight_inverse", "log_det")):
                weight_inverse, log_det = shared_args
                x = F.linear(z.to(weight_inverse.dtype) - self.bias, weight_inverse).to(z.dtype)
            else:
                _, lower, upper, log_det = shared_args or self._matrices()
                x = self._solved(z, lower, upper, self.bias)
        return x, -log_det.expand(z.shape[0])

    def _solved(self, z: Tensor, lower: Tensor, upper: Tensor, bias: Tensor) -> Tensor:
        columns = (z.to(upper.dtype) - bias).mT[None]
        columns = ops.triangular_solve(lower[None], columns, upper=False, unit_diagonal=True)
        x = ops.triangular_solve(upper[None], columns, upper=True)[0].mT.to(z.dtype)
        return x.contiguous() if self.perm is None else x.index_select(1, self.perm.argsort())

    def inverse_backward(
        self,
        z: Tensor,
        dz: Tensor,
        dlog_det: Tensor,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        *shared_args: Tensor,
    ) -> tuple[Tensor, Tensor, Gradients]:
        with without_autocast(z.device):
            with torch.enable_grad():
                weight, lower, upper, log_det = shared_args or self._matrices()
                bias = self.bias
            x = self._solved(z, lower.detach(), upper.detach(), bias.detach())
            dy = dz.to(weight.dtype)
            dx, dweight, dbias = dy @ weight.detach(), dy.mT @ x.to(weight.dtype), dy.sum(0).to(bias.dtype)
            gradients = vjp(
                (weight, log_det, bias), (dweight, dlog_det.sum().to(log_det.dtype), dbias), wanted
            )
        return x, dx.to(z.dtype), gradients

    def extra_repr(self) -> str:
        permutation = "" if self.permutation is None else f", permutation={self.permutation!r}"
        return f"{self.features}, identity_init={self.identity_init}, eps={self.eps}{permutation}"


def matrices_of(factors: Tensor, eps: float, perm: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L U P, L without its diagonal, U and log|det| of a stack of factors ``[K, D, D]`` and permutations ``[K, D]``."""
    factors = factors.to(acc_dtype(factors.dtype))
    diagonal = F.softplus(factors.diagonal(dim1=1, dim2=2)) + eps
    lower, upper = factors.tril(-1), factors.triu(1) + diagonal.diag_embed()
    weight = torch.baddbmm(upper, lower, upper)
    if perm is not None:
        weight = weight.gather(2, perm.argsort(1)[:, None].expand_as(weight))
    return weight, lower, upper, diagonal.log().sum(1)


def shared_matrices(flows: Sequence[Flow]) -> list[tuple[Tensor, ...]]:
    """Arguments of the flows' methods that follow ``context``: matrices of all :class:`LULinear` at once, none of others.

    Small matrices take the time of the calls: those of ten layers take as long as those of one.
    """
    return _shared(flows, matrices_of)


def shared_inverses(flows: Sequence[Flow]) -> list[tuple[Tensor, ...]]:
    """The same for ``inverse``: inverse matrices, by which a layer is one product instead of two solves."""
    return _shared(flows, _inverse_of)


def _inverse_of(factors: Tensor, eps: float, perm: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inverse of L U P, and log|det L U|, of a stack of factors."""
    _, lower, upper, log_det = matrices_of(factors, eps, None)
    columns = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    columns = ops.triangular_solve(lower, columns, upper=False, unit_diagonal=True)
    inverse = ops.triangular_solve(upper, columns, upper=True)
    if perm is not None:
        inverse = inverse.gather(1, perm.argsort(1)[..., None].expand_as(inverse))
    return inverse, log_det


def _shared(
    flows: Sequence[Flow], matrices_of: Callable[..., tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    shared: list[tuple[Tensor, ...]] = [()] * len(flows)
    layers: dict[int, LULinear] = {}
    kinds: dict[tuple[int, float, bool, torch.dtype, torch.device], list[int]] = {}
    for i, flow in enumerate(flows):
        if type(flow) is LULinear:
            layers[i] = flow
            kind = flow.features, flow.eps, flow.perm is None, flow.factors.dtype, flow.factors.device
            kinds.setdefault(kind, []).append(i)
    for (_, eps, in_order, _, device), places in kinds.items():
        if len(places) > 1:
            perm = (
                None
                if in_order
                else torch.stack([perm for i in places if (perm := layers[i].perm) is not None])
            )
            with without_autocast(device):
                found = matrices_of(torch.stack([layers[i].factors for i in places]), eps, perm)
            for i, matrices in zip(places, zip(*(m.unbind() for m in found), strict=True), strict=True):
                shared[i] = matrices
    return shared


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast, which would compute the products in half precision."""
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # "meta" has none
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()
