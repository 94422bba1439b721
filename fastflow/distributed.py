"""Statistics over the ranks of torch.distributed."""

import torch
import torch.distributed as dist
from torch import Tensor


def merge_statistics(
    count: int, mean: Tensor, var: Tensor, group: "dist.ProcessGroup | None" = None
) -> tuple[int, Tensor, Tensor]:
    r"""Merge count, mean and biased variance of all ranks; the result is bit-identical on every rank.

    With :math:`n = \sum_r n_r`, the mean is :math:`\mu = \sum_r n_r \mu_r / n` and the variance
    :math:`\sum_r n_r (v_r + (\mu_r - \mu)^2) / n`. If torch.distributed is not initialized, returns the
    arguments.

    Args:
        count: number of values per channel on this rank, may be 0.
        mean, var: their mean and biased variance, ``[C]`` each.
        group: ranks to merge; None: all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return count, mean, var
    mine = torch.cat([mean.new_tensor([count]), mean, var]).double()
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, mine, group=group)
    counts, means, variances = torch.stack(each).split([1, len(mean), len(var)], dim=1)
    total = counts.sum().clamp(min=1)
    whole = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - whole) ** 2)).sum(0) / total  # within ranks, and between them
    return int(counts.sum()), whole.to(mean.dtype), spread.to(var.dtype)
