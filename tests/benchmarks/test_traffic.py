"""Bytes that operators read and write, compared with counts by hand."""

import pytest
import torch

from benchmarks.tools.traffic import Traffic


def test_bytes_are_those_of_a_hand_count():
    x, weight, shift = (
        torch.randn(2, 3, 8, 8),
        torch.randn(5, 3, 1, 1, requires_grad=True),
        torch.randn(5, 1, 1),
    )
    upstream = torch.randn(2, 5, 8, 8)
    with Traffic() as traffic:
        (torch.nn.functional.conv2d(x, weight) + shift).backward(upstream)
    elements = {
        "aten::convolution": 384 + 15 + 640,
        "aten::add": 640 + 5 + 640,
        "aten::convolution_backward": 640 + 384 + 15 + 15,
    }
    assert traffic.bytes == {name: 4 * n for name, n in elements.items()}
    assert traffic.calls == dict.fromkeys(elements, 1)


@pytest.mark.parametrize(
    "run, elements",
    [
        (lambda x: x.view(6, 2)[1:].detach(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.new_empty(5), 0),
        (lambda x: x * x, 24),  # the same twice is read once
        (lambda x: x.mul_(2), 24),
        (lambda x: x.copy_(torch.ones(())), 1 + 12 + 1),  # and what ones() writes
        (lambda x: torch.neg(x, out=x), 24),
        (lambda x: x[0].expand(3, 4) + 1, 4 + 12),
        (lambda x: torch._foreach_add_([x, x[0].clone()], 1), 24 + 8 + 8),
    ],
    ids=["views", "empty", "new", "squared", "in place", "copied over", "out", "expanded", "a list"],
)
def test_bytes_of_operators(run, elements):
    x = torch.randn(3, 4)
    with Traffic() as traffic:
        run(x)
    assert traffic.bytes.total() == 4 * elements, traffic.bytes
