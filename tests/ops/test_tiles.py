"""How a batch is cut for a sum over programs, and offsets that need more than 32 bits."""

import mmap

import pytest
import torch

pytest.importorskip("triton")

import fastflow  # noqa: E402
from fastflow import ops  # noqa: E402
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


FAR = 2**30  # elements between two channels or positions of four; memory between them is never touched
STRIDES = ((16, FAR, 1), (16, 1, FAR))


def test_offsets_have_64_bits_only_where_they_need_them():
    near = torch.empty(2**16, 8, 2**12, device="meta", dtype=torch.float16)  # 2^31 elements, 2^15 in a sample
    assert not tiles(8, near).constants["WIDE"]
    assert tiles(8, near[:, :1].expand(-1, 8, -1), near.view(1, 8, -1)).constants["WIDE"]
    assert all(tiles(4, near.as_strided((2, 4, 4), stride)).constants["WIDE"] for stride in STRIDES)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("stride", STRIDES, ids=["channels apart", "positions apart"])
def test_offsets_past_32_bits_in_a_sample(stride):
    near = torch.randn(2, 4, 4).half()
    memory = mmap.mmap(-1, 2 * (3 * FAR + 64))  # unlike torch.empty, which tests fill
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided(near.shape, stride).copy_(near)
    channel = torch.randn(4)
    with fastflow.backend("triton"):
        for f in (
            lambda x: ops.actnorm(x, channel, channel)[0],
            lambda x: ops.actnorm_statistics(x)[0],
            lambda x: ops.affine_coupling(near, x)[0],
            lambda x: ops.affine_coupling_inverse_backward(near, x, None, near, torch.zeros(2))[2],
            lambda x: ops.bias_relu(x, channel),
            lambda x: ops.gaussian_log_prob(x),
        ):
            assert torch.equal(f(far), f(near))


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")
def test_the_sum_of_slots_takes_every_slot_once_in_at_most_four_rounds():
    assert PROGRAMS <= 4 * SLOTS_AT_ONCE
    for slots in (1, SLOTS_AT_ONCE, SLOTS_AT_ONCE + 1):  # one round, and two
        values = torch.randint(-8, 9, (slots, 2, SLOT_COLUMNS + 1)).float()  # sums of integers are exact
        first, second = torch.empty(2, SLOT_COLUMNS + 1)
        sum_slots(values, first, second)
        assert torch.equal(torch.stack((first, second)), values.sum(0))
