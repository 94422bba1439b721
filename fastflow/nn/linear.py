"""Linear maps of channels with a structured matrix: triangular, orthogonal, and the product of both."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.batched_linalg import solve
from fastflow.nn.flow import Flow, check_channels
from fastflow.nn.lu_linear import without_autocast
from fastflow.ops import acc_dtype, positions
from fastflow.reversible import Gradients, vjp

KINDS = ("householder", "cayley", "exponential")


class _Linear(Flow):
    """Base class of y = W x + b at each position: ``_matrix`` returns W, ``_solve`` divides by it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        self.num_features = num_features
        self.bias = nn.Parameter(torch.zeros(num_features))

    @abstractmethod
    def _matrix(self) -> tuple[Tensor, ...]:
        """W, and the factors that :meth:`_solve` needs; at least float32."""
        raise NotImplementedError(f"{type(self).__name__} has no _matrix")

    @abstractmethod
    def _solve(self, columns: Tensor, *factors: Tensor) -> Tensor:
        """W^-1 times ``columns`` ``[C, M]``."""
        raise NotImplementedError(f"{type(self).__name__} has no _solve")

    def _log_diagonal(self) -> Tensor | None:
        """The logarithms whose sum is log|det W|; None: W is orthogonal."""
        return None

    def weight(self) -> Tensor:
        """The matrix W, ``[C, C]``; float32 if the parameters are half."""
        with without_autocast(self.bias.device):
            return self._matrix()[0]

    def _log_det(self, x: Tensor) -> Tensor:
        log_diagonal, dtype = self._log_diagonal(), acc_dtype(x.dtype)
        if log_diagonal is None:
            return torch.zeros(x.shape[0], dtype=dtype, device=x.device)
        return (positions(x) * log_diagonal.sum()).to(dtype).expand(x.shape[0])

    def _divided(self, z: Tensor, bias: Tensor, factors: Sequence[Tensor]) -> Tensor:
        columns = z.movedim(1, 0)
        shifted = columns.flatten(1).to(bias.dtype) - bias[:, None]
        x = self._solve(shifted, *factors).view(columns.shape).movedim(0, 1)
        return x.to(z.dtype).contiguous()

    def _check(self, argument: str, x: Tensor) -> None:
        validation.floating_point(argument, x)
        check_channels(x, self.num_features)
        validation.same_device_and_precision(argument, x, "the layer's parameters", self.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        with without_autocast(x.device):
            weight = self._matrix()[0]
            return ops.conv1x1(x, weight, self.bias.to(weight.dtype)), self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("z", z)
        with without_autocast(z.device):
            weight, *factors = self._matrix()
            return self._divided(z, self.bias.to(weight.dtype), factors), -self._log_det(z)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        with without_autocast(z.device):
            with torch.enable_grad():
                weight, *factors = self._matrix()
                bias, log_diagonal = self.bias.to(weight.dtype), self._log_diagonal()
            x = self._divided(z, bias.detach(), [v.detach() for v in factors])
            dx = ops.conv1x1(dz, weight.detach().mT)
            columns, dcolumns = (v.movedim(1, 0).flatten(1).to(weight.dtype) for v in (x, dz))
            outputs, cotangents = [weight, bias], [dcolumns @ columns.mT, dcolumns.sum(1)]
            if log_diagonal is not None:
                of_each = (positions(z) * dlog_det.sum()).to(log_diagonal.dtype)
                outputs.append(log_diagonal)
                cotangents.append(of_each.expand_as(log_diagonal))
            return x, dx, vjp(outputs, cotangents, wanted)


class TriangularLinear(_Linear):
    r"""Linear map :math:`y = W x + b` with a triangular matrix W, of vectors or at each position of an image.

    Source: Prince, *Understanding Deep Learning*, section 16.3.1. The diagonal of W is
    :math:`\operatorname{softplus}(u) + \epsilon > 0`. The parameter ``factors`` ``[C, C]`` holds u on its diagonal and
    the other entries of W in its triangle; the other triangle is not read. The layer starts as the identity.

    The inverse is one triangular solve. Channel i of y depends on channels up to i of x, with ``upper`` on those from i
    on. A lower and an upper layer make an LU decomposition, which :class:`LULinear` computes as one product for vectors.

    Args:
        num_features: number of channels C.
        upper: an upper triangular matrix instead of a lower one.
        eps: :math:`\epsilon`, the lower bound of the diagonal.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`P \sum_c \log W_{cc}` with P the number of positions of a
    sample.
    Raises ValueError for x of other channels, another precision or another device, for an ``eps`` outside [0, 1), and
    for ``num_features`` that are no positive integer. The inverse raises
    :class:`~fastflow.validation.SingularError` if a diagonal is 0, inf or NaN.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> flow = fnn.Sequential(fnn.TriangularLinear(3), fnn.TriangularLinear(3, upper=True))
        >>> z, log_det = flow(torch.randn(8, 3, 4, 4))
    """

    def __init__(self, num_features: int, upper: bool = False, eps: float = 1e-3) -> None:
        super().__init__(num_features)
        validation.boolean("upper", upper)
        validation.number("eps", eps, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        self.upper, self.eps = upper, eps
        self.factors = nn.Parameter(math.log(math.expm1(1 - eps)) * torch.eye(num_features))

    def _matrix(self) -> tuple[Tensor, ...]:
        weight = _triangle(self.factors, self.upper, self.eps)
        return weight, weight

    def _solve(self, columns: Tensor, *factors: Tensor) -> Tensor:
        (weight,) = factors
        return ops.triangular_solve(weight[None], columns[None], upper=self.upper)[0]

    def _log_diagonal(self) -> Tensor:
        return _diagonal(self.factors, self.eps).log()

    def extra_repr(self) -> str:
        return f"{self.num_features}, upper={self.upper}, eps={self.eps}"


class OrthogonalLinear(_Linear):
    r"""Linear map :math:`y = Q x + b` with an orthogonal matrix Q, of vectors or at each position of an image.

    The log-det is 0, and the inverse is the product with :math:`Q^\top`. Three ways to parameterize Q:

    - ``"householder"``: the product of K reflections, :math:`Q = H_1 \cdots H_K` with
      :math:`H_k = I - 2 v_k v_k^\top / |v_k|^2` (arXiv:1611.09630). The parameter ``vectors`` ``[K, C]`` holds
      the :math:`v_k`. The product is one triangular solve (docs/maths.md), not K steps. :math:`\det Q = (-1)^K`. With
      K = C, every orthogonal matrix of that determinant is such a product.
    - ``"cayley"``: :math:`Q = (I + A)^{-1} (I - A)` with a skew-symmetric A: the rotations without an eigenvalue of -1.
    - ``"exponential"``: :math:`Q = e^A`: every rotation.

    For the last two, the parameter ``entries`` ``[C, C]`` holds the entries of A above its diagonal; the others are not
    read. The layer starts as a random orthogonal matrix: Gaussian vectors, or entries of variance 1 / C.

    Args:
        num_features: number of channels C.
        kind: ``"householder"``, ``"cayley"`` or ``"exponential"``.
        reflections: number K of reflections, of ``"householder"`` only. None: C.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, zeros.
    Raises ValueError for x of other channels, another precision or another device, for another kind, and for
    ``num_features`` and ``reflections`` that are no positive integers. A vector :math:`v_k` of zeros is no reflection,
    and raises :class:`~fastflow.validation.SingularError`.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.OrthogonalLinear(3, "cayley")
        >>> z, log_det = layer(torch.randn(8, 3, 4, 4))
        >>> bool(torch.allclose(layer.weight() @ layer.weight().T, torch.eye(3), atol=1e-5))
        True
    """

    def __init__(self, num_features: int, kind: str = "householder", reflections: int | None = None) -> None:
        super().__init__(num_features)
        validation.one_of("kind", kind, KINDS)
        validation.positive_int("reflections", reflections, optional=True)
        if reflections is not None and kind != "householder":
            raise validation.argument_error("reflections", reflections, f"None with kind={kind!r}")
        self.kind, self.reflections = kind, reflections
        if kind == "householder":
            self.vectors = nn.Parameter(torch.randn(reflections or num_features, num_features))
        else:
            self.entries = nn.Parameter(torch.randn(num_features, num_features) * num_features**-0.5)

    def _matrix(self) -> tuple[Tensor, ...]:
        given = self.vectors if self.kind == "householder" else self.entries
        weight = orthogonal_matrix(given, self.kind)
        return weight, weight

    def _solve(self, columns: Tensor, *factors: Tensor) -> Tensor:
        (weight,) = factors
        return weight.mT @ columns

    def extra_repr(self) -> str:
        reflections = "" if self.reflections is None else f", reflections={self.reflections}"
        return f"{self.num_features}, {self.kind!r}{reflections}"


class QRLinear(_Linear):
    r"""Linear map :math:`y = Q R x + b` of an orthogonal and an upper triangular matrix.

    Source: emerging convolutions, arXiv:1901.11137. Q is a product of K reflections, as in
    :class:`OrthogonalLinear`, with the parameter ``vectors`` ``[K, C]``. The diagonal of R is
    :math:`\operatorname{softplus}(u) + \epsilon > 0`; the parameter ``factors`` ``[C, C]`` holds u on its diagonal and R
    above it. With K = C, every matrix whose determinant has the sign of :math:`(-1)^C` is such a product. No
    permutation is chosen beforehand, as it is for LU. The layer starts as a random orthogonal matrix.

    The inverse is a product and a triangular solve.

    Args:
        num_features: number of channels C.
        reflections: number K of reflections. None: C.
        eps: :math:`\epsilon`, the lower bound of the diagonal of R.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`P \sum_c \log R_{cc}` with P the number of positions of a
    sample.
    Raises ValueError for x of other channels, another precision or another device, for an ``eps`` outside [0, 1), and
    for ``num_features`` and ``reflections`` that are no positive integers; and
    :class:`~fastflow.validation.SingularError` for a vector of zeros, and in the inverse for a diagonal of R with 0, inf
    or NaN.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> z, log_det = fnn.QRLinear(4)(torch.randn(8, 4))
    """

    def __init__(self, num_features: int, reflections: int | None = None, eps: float = 1e-3) -> None:
        super().__init__(num_features)
        validation.positive_int("reflections", reflections, optional=True)
        validation.number("eps", eps, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        self.reflections, self.eps = reflections, eps
        self.vectors = nn.Parameter(torch.randn(reflections or num_features, num_features))
        self.factors = nn.Parameter(math.log(math.expm1(1 - eps)) * torch.eye(num_features))

    def _matrix(self) -> tuple[Tensor, ...]:
        orthogonal = orthogonal_matrix(self.vectors, "householder")
        upper = _triangle(self.factors, True, self.eps)
        return orthogonal @ upper, orthogonal, upper

    def _solve(self, columns: Tensor, *factors: Tensor) -> Tensor:
        orthogonal, upper = factors
        return ops.triangular_solve(upper[None], (orthogonal.mT @ columns)[None], upper=True)[0]

    def _log_diagonal(self) -> Tensor:
        return _diagonal(self.factors, self.eps).log()

    def extra_repr(self) -> str:
        reflections = "" if self.reflections is None else f"reflections={self.reflections}, "
        return f"{self.num_features}, {reflections}eps={self.eps}"


def orthogonal_matrix(given: Tensor, kind: str, columns: int | None = None) -> Tensor:
    """The orthogonal matrix of vectors ``[..., K, C]`` or of skew-symmetric entries ``[..., C, C]``; at least float32.

    With ``columns``, only so many of its first columns.
    """
    given = given.to(acc_dtype(given.dtype))
    identity = torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)
    if kind == "householder" and torch.onnx.is_in_onnx_export():  # ONNX solves no equations
        product = identity[:, :columns]
        for v in reversed(given.unbind(-2)):
            part = (v.unsqueeze(-2) @ product) / v.square().sum(-1)[..., None, None]
            product = product - 2 * v.unsqueeze(-1) * part
        return product
    if kind == "householder":
        products = given @ given.mT
        factor = products.triu(1) + torch.diag_embed(products.diagonal(dim1=-2, dim2=-1) / 2)
        first = given[..., :columns]
        stacks = (v.reshape(-1, *v.shape[-2:]) for v in (factor, first))
        return identity[:, :columns] - given.mT @ ops.triangular_solve(*stacks, upper=True).view_as(first)
    skew = given.triu(1) - given.triu(1).mT
    if kind == "cayley":
        return solve(identity + skew, (identity - skew)[..., :columns])
    return torch.linalg.matrix_exp(skew)[..., :columns]


def _diagonal(factors: Tensor, eps: float) -> Tensor:
    return F.softplus(factors.to(acc_dtype(factors.dtype)).diagonal()) + eps


def _triangle(factors: Tensor, upper: bool, eps: float) -> Tensor:
    """The triangular matrix whose diagonal is softplus of that of ``factors``, plus ``eps``."""
    entries = factors.to(acc_dtype(factors.dtype))
    off = entries.triu(1) if upper else entries.tril(-1)
    return off + torch.diag(_diagonal(factors, eps))
