"""Emerging convolution: two autoregressive convolutions in opposite orders."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.flow import Flow
from fastflow.nn.lu_linear import without_autocast
from fastflow.nn.periodic_conv import check_images, check_kernel_size
from fastflow.ops import acc_dtype, positions


class EmergingConv(Flow):
    r"""Invertible convolution of two autoregressive convolutions, :math:`y = K_2 * (K_1 * x) + b`, for images.

    Source: emerging convolutions, arXiv:1901.11137. With m = (k + 1) / 2 for a ``kernel_size`` of k, :math:`K_1` reads
    the m x m pixels up to its own, above and to the left, and :math:`K_2` those below and to the right. Together they read
    the k x k pixels of a convolution with zero padding. The tap of a pixel itself is a lower triangular
    matrix in :math:`K_1` and an upper triangular one in :math:`K_2`. Their diagonals are
    :math:`\operatorname{softplus}(u) + \epsilon > 0`. So the Jacobian of each is triangular in the order of the pixels.

    The inverse solves both systems by diagonals of the image: all pixels with the same i + j are independent given the
    diagonals before. An image of H x W takes H + W - 1 steps for each of the two, not H W. A step is a small convolution
    along the diagonal.

    The parameter ``kernels`` ``[2, C, C, m, m]`` holds both; entry ``[0, :, :, a, c]`` is the tap of the pixel a rows
    above and c columns to the left, and entry ``[1, :, :, a, c]`` that of the pixel below and to the right. The
    other triangle of the taps ``[:, :, :, 0, 0]`` is not read. The layer starts as the identity. It mixes channels in
    both triangles, but does not permute them: use it with an :class:`InvertibleConv1x1`, as the paper does.

    Args:
        num_features: number of channels C.
        kernel_size: number of taps k in each direction, odd.
        eps: :math:`\epsilon`, the lower bound of the diagonals.

    Shape: x, y ``[N, C, H, W]``; log_det ``[N]``, nats, :math:`H W` times the sum of the logarithms of both diagonals.
    Raises ValueError for x of another shape, another precision or another device, for an even ``kernel_size``, for an
    ``eps`` outside [0, 1), and for arguments that are no positive integers. The inverse raises
    :class:`~fastflow.validation.SingularError` if a diagonal is 0, inf or NaN.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> flow = fnn.Sequential(fnn.InvertibleConv1x1(3), fnn.EmergingConv(3))
        >>> z, log_det = flow(torch.randn(8, 3, 6, 6))
    """

    def __init__(self, num_features: int, kernel_size: int = 3, eps: float = 1e-3) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        check_kernel_size(kernel_size)
        validation.number("eps", eps, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        self.num_features, self.kernel_size, self.eps = num_features, kernel_size, eps
        m = (kernel_size + 1) // 2
        kernels = torch.zeros(2, num_features, num_features, m, m)
        kernels[:, :, :, 0, 0] = math.log(math.expm1(1 - eps)) * torch.eye(num_features)
        self.kernels = nn.Parameter(kernels)
        self.bias = nn.Parameter(torch.zeros(num_features))

    def _masked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both kernels with triangular taps of the pixel itself, and the logarithms of the diagonals; at least float32."""
        kernels = self.kernels.to(acc_dtype(x.dtype))
        own = kernels[:, :, :, 0, 0]
        diagonal = F.softplus(own.diagonal(dim1=1, dim2=2)) + self.eps
        triangles = torch.stack([own[0].tril(-1), own[1].triu(1)]) + torch.diag_embed(diagonal)
        first = torch.zeros(kernels.shape[3:], dtype=torch.bool, device=kernels.device)
        first[0, 0] = True
        kernels = torch.where(first, triangles[..., None, None], kernels)
        return kernels[0], kernels[1], diagonal.log()

    def _log_det(self, log_diagonal: Tensor, x: Tensor) -> Tensor:
        return (positions(x) * log_diagonal.sum()).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images("x", x, self.num_features, self.kernels)
        with without_autocast(x.device):
            before, after, log_diagonal = self._masked(x)
            reach = self.kernel_size // 2
            y = F.conv2d(F.pad(x.to(before.dtype), (reach, 0, reach, 0)), before.flip(2, 3))
            y = F.conv2d(F.pad(y, (0, reach, 0, reach)), after, self.bias.to(before.dtype))
            return y.to(x.dtype), self._log_det(log_diagonal, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images("z", z, self.num_features, self.kernels)
        with without_autocast(z.device):
            before, after, log_diagonal = self._masked(z)
            x = z.to(before.dtype) - self.bias.to(before.dtype).view(1, -1, 1, 1)
            if x.numel():
                x = _solve_by_diagonals(x.flip(2, 3), after, upper=True).flip(2, 3)
                x = _solve_by_diagonals(x, before, upper=False)
            return x.to(z.dtype), -self._log_det(log_diagonal, z)

    def extra_repr(self) -> str:
        return f"{self.num_features}, kernel_size={self.kernel_size}, eps={self.eps}"


def _solve_by_diagonals(y: Tensor, kernel: Tensor, upper: bool) -> Tensor:
    """x with ``sum_ac kernel[:, :, a, c] x[:, :, i - a, j - c] = y[:, :, i, j]``; the tap 0, 0 is triangular."""
    n, channels, height, width = y.shape
    taps = kernel.shape[2]
    # both divided by the tap of the pixel itself, at once
    columns = torch.cat([y.transpose(0, 1).flatten(1), kernel.flatten(1)], dim=1)
    columns = ops.triangular_solve(kernel[:, :, 0, 0][None], columns[None], upper=upper)[0]
    y = columns[:, : y.numel() // channels].unflatten(1, (n, height, width)).transpose(0, 1)
    kernel = columns[:, n * height * width :].unflatten(1, kernel.shape[1:])
    # of the diagonal d - e, the tap of the row a above is kernel[:, :, a, e - a]; as a convolution along the rows
    zero = torch.zeros_like(kernel[:, :, 0, 0])
    rows = [
        [kernel[:, :, a, e - a] if 0 <= e - a < taps else zero for a in reversed(range(taps))]
        for e in range(1, 2 * taps - 1)
    ]
    along = torch.cat([torch.stack(row, dim=2) for row in rows], dim=1) if rows else None
    diagonals = _skewed(y).unbind(3)
    solved = [torch.zeros_like(diagonals[0])] * len(rows)  # before the image
    for right in diagonals:
        if along is not None:
            known = torch.cat([solved[-e] for e in range(1, len(rows) + 1)], dim=1)
            right = right - F.conv1d(F.pad(known, (taps - 1, 0)), along)
        solved.append(right)
    return _straight(torch.stack(solved[len(rows) :], dim=3), width)


def _skewed(x: Tensor) -> Tensor:
    """``[N, C, H, H + W - 1]``: row i moved by i to the right, so that a column has the pixels of one i + j."""
    height, width = x.shape[2:]
    length = height + width - 1
    return F.pad(x, (0, height)).flatten(2)[:, :, : height * length].unflatten(2, (height, length))


def _straight(x: Tensor, width: int) -> Tensor:
    """The image of :func:`_skewed`."""
    height = x.shape[2]
    return F.pad(x.flatten(2), (0, height)).unflatten(2, (height, height + width))[..., :width]
