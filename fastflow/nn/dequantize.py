"""Dequantization of uint8 samples."""

from typing import Any

import torch
from torch import Tensor

from fastflow import ops, validation
from fastflow.deprecation import renamed_attributes, renamed_method
from fastflow.nn.flow import Flow
from fastflow.ops.noise import random_seed
from fastflow.reversible import zero_log_det


class _Likeness(Flow):
    """A flow with a buffer ``like``, without elements, that has the dtype and device of its outputs."""

    like: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers") and self.like.is_meta:
            # the buffer is not in the state dict, and no other tensor of the layer tells its device
            self.like = torch.empty(0, dtype=self.like.dtype, device="cpu")


class Dequantize(_Likeness):
    r"""Uniform dequantization to :math:`[-\tfrac12, \tfrac12)`: :math:`y = (x + u) / 2^n - \tfrac12`.

    Source: arXiv:1511.01844, section 3.1.

    ``forward`` draws the noise u from torch's generator, computes it from
    ``(seed, offset + sample, element)``, or takes it as ``noise``. The inverse takes the floor:
    ``inverse(forward(x)[0])[0] == x``. y is float32, or float64 after ``.double()``.

    Args:
        n_bits: bits per value n; values of x are in ``[0, 2 ** n_bits)``.

    Shape: x uint8 ``[N, ...]``; y like x; log_det ``[N]``, nats, :math:`-D \log 2^n` with D the number of
    values of a sample.
    Raises ValueError for another ``n_bits``, and if x is not uint8.
    """

    scale, shift, logit = 1.0, -0.5, False

    def __init__(self, n_bits: int = 8) -> None:
        super().__init__()
        if not isinstance(n_bits, int) or isinstance(n_bits, bool) or not 1 <= n_bits <= 8:
            raise validation.argument_error("n_bits", repr(n_bits), "1 to 8, the bit depth of uint8 images")
        self.n_bits = n_bits

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        if noise is None and seed is None:
            seed = random_seed(x.device)
        return ops.dequantize(x, noise=noise, seed=seed, offset=offset, dtype=self.like.dtype, **self._map())

    def bin_center(self, x: Tensor) -> Tensor:
        """y at the center of each bin, where rounding cannot reach a neighboring bin."""
        noise = torch.full((), 0.5, dtype=self.like.dtype, device=x.device).expand(x.shape)
        return self(x, noise=noise)[0]

    centre = renamed_method("centre", "bin_center")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.dequantize_inverse(z, **self._map())

    def _map(self) -> dict[str, Any]:
        return {"n_bits": self.n_bits, "scale": self.scale, "shift": self.shift, "logit": self.logit}

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}"


class LogitDequantize(Dequantize):
    r"""Logit dequantization, :math:`y = \operatorname{logit}(\alpha_0 + \alpha_1 (x + u) / 2^n)`.

    Source: RealNVP, arXiv:1605.08803, section 4.1.

    Noise and dtypes are as in :class:`Dequantize`. In float32 the inverse is exact at bin centers
    (:meth:`Dequantize.bin_center`). With random noise, 3 to 4 pixels per million come back off by one: their noise is
    within the logit's rounding error of a bin edge.

    Args:
        n_bits: bits per value n; values of x are in ``[0, 2 ** n_bits)``.
        alpha: :math:`\alpha`, which keeps the logit finite.
        preset: ``"realnvp"``: :math:`\alpha_1 = 1 - \alpha`, :math:`\alpha_0 = \alpha`; ``"tutorial"``:
            :math:`\alpha_1 = 1 - \alpha`, :math:`\alpha_0 = \alpha / 2`, symmetric.

    Shape: x uint8 ``[N, ...]``; y like x; log_det ``[N]``, nats.
    Raises ValueError for an alpha outside (0, 1), for another preset, and if x is not uint8.
    """

    logit = True

    def __init__(self, n_bits: int = 8, alpha: float = 0.05, preset: str = "realnvp") -> None:
        super().__init__(n_bits)
        validation.one_of("preset", preset, ("realnvp", "tutorial"))
        validation.number("alpha", alpha, "a number between 0 and 1", lambda v: 0 < v < 1)
        self.alpha, self.preset = alpha, preset
        self.scale = 1 - alpha
        self.shift = alpha if preset == "realnvp" else alpha / 2

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, alpha={self.alpha}, preset={self.preset!r}"


class IdentityDequantize(_Likeness):
    """Identity in place of a dequantization, for samples that are already continuous; its log-det is 0.

    Shape: x, y ``[N, ...]``, floating point; log_det ``[N]``, zeros.
    """

    n_bits = None

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        return x, zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self(z)

    def bin_center(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    centre = renamed_method("centre", "bin_center")


__getattr__ = renamed_attributes(__name__, Continuous=IdentityDequantize)
