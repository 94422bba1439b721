"""How often a flow step of training reads and writes the hidden activations of its coupling network.

A pass is as many bytes as one hidden activation in bfloat16 has. Counted are those of Triton's kernels, which are
interpreted, and those of PyTorch's operators, which read and write each tensor once.
"""

import pytest
import torch

import fastflow
from fastflow.nn import GlowLevel, GlowStep
from fastflow.ops.dispatch import triton_kernels
from tests.support import interpreter

HIDDEN = 512  # of which some kernels compute a part at once

pytestmark = pytest.mark.skipif(
    not interpreter.RUNS, reason="kernels are compiled here: only the interpreter counts"
)


def passes(network):
    """Passes of forward and of backward, which recomputes the activations."""
    torch.manual_seed(0)
    level = GlowLevel([GlowStep(8, HIDDEN, network=network)]).to(memory_format=torch.channels_last)
    x = torch.randn(2, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    level(x)  # initializes
    hidden = 2 * 4 * 4 * HIDDEN
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), fastflow.backend("triton"):
        with interpreter.traffic(hidden) as forward:
            z, log_det = level(x)
        with interpreter.traffic(hidden) as backward:
            (z.sum() + log_det.sum()).backward()
    return [(found.read + found.written) / (2 * hidden) for found in (forward, backward)]


def test_passes_over_hidden_activations():
    assert passes("plain") == [8, 22]


def test_a_fused_network_keeps_hidden_activations_out_of_memory(monkeypatch):
    """Backward has them there: it computes them again, for the gradients of the weights.

    With many pixels, no program computes a part of the hidden channels; three more passes with few.
    """
    kernels = triton_kernels("glow_network")
    monkeypatch.setattr(kernels, "PROGRAMS", 0)
    kernels.tiles.cache_clear()
    kernels.gradient_tiles.cache_clear()
    try:
        assert passes("fused") == [0, 10]
    finally:
        kernels.tiles.cache_clear()
        kernels.gradient_tiles.cache_clear()
