"""Log of absolute determinants, right with any number of threads."""

import torch
from torch import Tensor

# torch factors smaller matrices without its blocked algorithm
_SMALL = 64


def log_abs_det(matrices: Tensor) -> Tensor:
    """:math:`\\log |\\det A|` of each matrix; matrices ``[..., D, D]``, result ``[...]``.

    After ``torch.set_num_threads``, torch factors the matrices of a batch on a CPU at the same time. Its library does not
    allow that, and log-dets of 160 and more dimensions come out wrong by some percent, without an error (pytorch issues
    141358 and 142815). Large matrices are therefore factored one after the other there.
    """
    size, batch = matrices.shape[-1], matrices.shape[:-2]
    small = size <= _SMALL or torch.compiler.is_compiling()  # a graph may have any number of matrices
    if matrices.device.type != "cpu" or small or batch.numel() < 2:
        return torch.linalg.slogdet(matrices).logabsdet
    each = matrices.reshape(-1, size, size).unbind()
    return torch.stack([torch.linalg.slogdet(matrix).logabsdet for matrix in each]).view(batch)
