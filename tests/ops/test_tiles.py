"""How a batch is cut for a sum over programs."""

import pytest
import torch

pytest.importorskip("triton")

from fastflow.triton_kernels.tiles import (  # noqa: E402
    INTERPRETED,
    PROGRAMS,
    SLOT_COLUMNS,
    SLOTS_AT_ONCE,
    sum_slots,
    tiles,
)


@pytest.mark.parametrize(
    "shape", [(1, 3, 4), (1024, 1, 4), (1025, 1, 4), (2049, 40, 4), (87, 12, 2048), (50000, 7)], ids=str
)
def test_a_sum_takes_every_block_once(shape):
    t = tiles(shape[1], torch.empty(shape, device="meta"))
    slots, blocks = t.reduction_grid()
    assert (slots - 1) * blocks < t.position_blocks <= slots * blocks
    assert slots * t.k_blocks <= PROGRAMS


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")
def test_the_sum_of_slots_takes_every_slot_once_in_at_most_four_rounds():
    assert PROGRAMS <= 4 * SLOTS_AT_ONCE
    for slots in (1, SLOTS_AT_ONCE, SLOTS_AT_ONCE + 1):  # one round, and two
        values = torch.randint(-8, 9, (slots, 2, SLOT_COLUMNS + 1)).float()  # sums of integers are exact
        first, second = torch.empty(2, SLOT_COLUMNS + 1)
        sum_slots(values, first, second)
        assert torch.equal(torch.stack((first, second)), values.sum(0))
