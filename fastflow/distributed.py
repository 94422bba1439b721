"""Statistics of tensors that are spread over the ranks of torch.distributed."""

import torch
import torch.distributed as dist
from torch import Tensor


def merge_statistics(
    count: int, mean: Tensor, var: Tensor, group: "dist.ProcessGroup | None" = None
) -> tuple[int, Tensor, Tensor]:
    """``(count, mean, biased var)`` of the values of all ranks of ``group`` (None: of all), from those of each; the same bits on each.

    Where torch.distributed is not initialised they come back as they are.
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
