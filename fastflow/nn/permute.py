"""Fixed permutations of channels."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastflow import validation
from fastflow.nn.flow import Flow, check_channels
from fastflow.reversible import Gradients, zero_log_det


def permutation_of(num_features: int, order: str | Sequence[int], argument: str = "order") -> Tensor:
    """The indices of an order, see :class:`Permute`."""
    index = torch.arange(num_features)
    if isinstance(order, str):
        validation.one_of(argument, order, ("reverse", "random", "interleaved"))
        if order == "random":
            return torch.randperm(num_features)
        return index.flip(0) if order == "reverse" else torch.cat([index[::2], index[1::2]])
    numbers = list(order) if isinstance(order, Iterable) else [order]
    if not all(isinstance(i, int) for i in numbers) or sorted(numbers) != list(range(num_features)):
        got = numbers if isinstance(order, Iterable) else order
        raise validation.argument_error(argument, got, f"each of 0 to {num_features - 1} once")
    return torch.tensor(order)


class Permute(Flow):
    """A fixed permutation of the channels, ``y[:, i] = x[:, perm[i]]``; its log-det is 0.

    Args:
        num_features: number of channels C.
        order: the permutation: ``"reverse"``; ``"random"``, drawn once from torch's generator;
            ``"interleaved"``, the even channels before the odd ones, which gives the partition of NICE
            (arXiv:1410.8516, section 5.1); or a sequence with each of 0 to C - 1 once. A buffer holds it.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, zeros.
    Raises ValueError if C differs from ``num_features``, and for another order.
    """

    perm: Tensor

    def __init__(self, num_features: int, order: str | Sequence[int] = "reverse") -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        self.num_features, self.order = num_features, order
        self.register_buffer("perm", permutation_of(num_features, order))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix of the permutation, its inverse, and log|det| = 0; see :meth:`InvertibleConv1x1.weights`."""
        dtype = torch.get_default_dtype()
        weight = torch.eye(self.num_features, dtype=dtype, device=self.perm.device)[self.perm]
        return weight, weight.mT, weight.new_zeros(())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        return x.index_select(1, self.perm), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        return z.index_select(1, torch.argsort(self.perm)), zero_log_det(z)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        return self.inverse(z)[0], self.inverse(dz)[0], {}

    def extra_repr(self) -> str:
        return f"{self.num_features}, order={self.order!r}"
