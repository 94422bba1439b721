"""How a batch is cut for a sum over programs."""

import pytest
import torch

pytest.importorskip("triton")

from fastflow.triton_kernels.tiles import PROGRAMS, tiles  # noqa: E402


@pytest.mark.parametrize(
    "shape", [(1, 3, 4), (1024, 1, 4), (1025, 1, 4), (2049, 40, 4), (87, 12, 2048), (50000, 7)], ids=str
)
def test_a_sum_takes_every_block_once(shape):
    t = tiles(shape[1], torch.empty(shape, device="meta"))
    slots, blocks = t.reduction_grid()
    assert (slots - 1) * blocks < t.position_blocks <= slots * blocks
    assert slots * t.k_blocks <= PROGRAMS
