"""Determinants and linear systems of batches of matrices, right with any number of threads.

After ``torch.set_num_threads``, torch factors the matrices of a batch on a CPU at the same time. Its library does not
allow that. From about 150 dimensions on, log-dets are wrong by some percent, without an error, and solutions are wrong or
never come (pytorch issues 141358 and 142815). Large matrices are therefore factored one after the other there.
"""

import torch
from torch import Tensor

# torch factors smaller matrices without its blocked algorithm
_SMALL = 64


def _at_once(matrices: Tensor) -> bool:
    small = (
        matrices.shape[-1] <= _SMALL or torch.compiler.is_compiling()
    )  # a graph may have any number of matrices
    return matrices.device.type != "cpu" or small or matrices.shape[:-2].numel() < 2


def log_abs_det(matrices: Tensor) -> Tensor:
    """:math:`\\log |\\det A|` of each matrix; matrices ``[..., D, D]``, result ``[...]``."""
    if _at_once(matrices):
        return torch.linalg.slogdet(matrices).logabsdet
    each = matrices.flatten(0, -3).unbind()
    return torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in each]).view(matrices.shape[:-2])


def solve(matrices: Tensor, columns: Tensor) -> Tensor:
    """:math:`A^{-1} B` of each matrix A and columns B; ``[..., D, D]`` and ``[..., D, M]``, result ``[..., D, M]``.

    Raises ``torch.linalg.LinAlgError`` if a matrix is singular.
    """
    if _at_once(matrices):
        return torch.linalg.solve(matrices, columns)
    each = zip(matrices.flatten(0, -3).unbind(), columns.flatten(0, -3).unbind(), strict=True)
    return torch.stack([torch.linalg.solve(*pair) for pair in each]).view(columns.shape)
