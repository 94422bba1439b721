"""Periodic convolution, inverted in the Fourier domain."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.batched_linalg import log_abs_det, solve
from fastflow.nn.flow import Flow, check_channels
from fastflow.nn.lu_linear import without_autocast
from fastflow.ops import acc_dtype


class PeriodicConv(Flow):
    r"""Invertible convolution with periodic padding, :math:`y_p = b + \sum_t W_t x_{p + t}`, for images.

    Source: emerging convolutions, arXiv:1901.11137, section on periodic convolutions. Opposite edges of the image are
    neighbors. The discrete Fourier transform turns the convolution into a product at each frequency,
    :math:`\hat y_f = \hat W_f \hat x_f` with :math:`\hat W_f = \sum_t W_t e^{2 \pi i f \cdot t}`.
    The inverse solves these systems of C equations, and the log-det is the sum of theirs. The kernel is not constrained:
    it may become singular at a frequency, as any matrix may.

    The layer starts as :class:`InvertibleConv1x1` does, with a random orthogonal matrix as the middle tap and zeros
    around it.

    Args:
        num_features: number of channels C.
        kernel_size: number of taps in each direction, odd.

    Shape: x, y ``[N, C, H, W]`` with H and W at least ``kernel_size // 2``;
    log_det ``[N]``, nats,
    :math:`\sum_f \log|\det \hat W_f|` over the H W frequencies.
    Raises ValueError for x of another shape, another precision or another device, for an even ``kernel_size``, and for
    arguments that are no positive integers. The inverse raises ``torch.linalg.LinAlgError`` if a frequency is singular.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.PeriodicConv(3)
        >>> z, log_det = layer(torch.randn(8, 3, 6, 6))
    """

    def __init__(self, num_features: int, kernel_size: int = 3) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        check_kernel_size(kernel_size)
        self.num_features, self.kernel_size = num_features, kernel_size
        weight = torch.zeros(num_features, num_features, kernel_size, kernel_size)
        drawn = torch.randn(num_features, num_features, dtype=torch.float64)
        weight[:, :, kernel_size // 2, kernel_size // 2] = torch.linalg.qr(drawn).Q.to(weight)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(num_features))

    def _check(self, argument: str, x: Tensor) -> None:
        check_images(argument, x, self.num_features, self.weight)
        if min(x.shape[2:]) < self.kernel_size // 2:
            expected = f"images of at least {self.kernel_size // 2} pixels each way, half the kernel"
            raise validation.argument_error(argument, validation.shape_of(x), expected)

    def _spectrum(self, x: Tensor) -> Tensor:
        """The matrices ``[H, W // 2 + 1, C, C]`` of half the frequencies; those of the others are their conjugates."""
        weight, (height, width) = self.weight.to(acc_dtype(x.dtype)), x.shape[2:]
        taps = torch.arange(self.kernel_size, device=x.device) - self.kernel_size // 2
        waves = [
            # whole turns are left out before the products are rounded
            torch.exp(2j * math.pi / size * (frequencies[:, None] * taps % size).to(weight.dtype))
            for size, frequencies in (
                (height, torch.arange(height, device=x.device)),
                (width, torch.arange(width // 2 + 1, device=x.device)),
            )
        ]
        return torch.einsum("ockl,hk,wl->hwoc", weight.to(waves[0].dtype), *waves)

    def _log_det(self, spectrum: Tensor, x: Tensor) -> Tensor:
        logs = log_abs_det(spectrum)
        own_conjugate = torch.arange(logs.shape[1], device=x.device) * 2 % x.shape[3] == 0
        return torch.where(own_conjugate, logs, 2 * logs).sum().expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        with without_autocast(x.device):
            dtype, middle = acc_dtype(x.dtype), self.kernel_size // 2
            around = F.pad(x.to(dtype), (middle,) * 4, mode="circular") if middle else x.to(dtype)
            y = F.conv2d(around, self.weight.to(dtype), self.bias.to(dtype))
            return y.to(x.dtype), self._log_det(self._spectrum(x), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("z", z)
        with without_autocast(z.device):
            spectrum = self._spectrum(z)
            shifted = z.to(acc_dtype(z.dtype)) - self.bias.to(acc_dtype(z.dtype)).view(1, -1, 1, 1)
            if z.numel():
                columns = torch.fft.rfft2(shifted).permute(2, 3, 1, 0)
                solved = solve(spectrum, columns).permute(3, 2, 0, 1)
                shifted = torch.fft.irfft2(solved, s=z.shape[2:])
            return shifted.to(z.dtype), -self._log_det(spectrum, z)

    def extra_repr(self) -> str:
        return f"{self.num_features}, kernel_size={self.kernel_size}"


def check_kernel_size(kernel_size: int) -> None:
    """Raise ValueError unless ``kernel_size`` is a positive odd integer."""
    validation.positive_int("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise validation.argument_error("kernel_size", kernel_size, "an odd number")


def check_images(argument: str, x: Tensor, num_features: int, parameter: Tensor) -> None:
    """Raise ValueError unless x is ``[N, num_features, H, W]``, on the device and in the precision of ``parameter``."""
    validation.floating_point(argument, x)
    check_channels(x, num_features)
    if x.ndim != 4:
        raise validation.argument_error(argument, validation.shape_of(x), f"images [N, {num_features}, H, W]")
    validation.same_device_and_precision(argument, x, "the layer's parameters", parameter)
