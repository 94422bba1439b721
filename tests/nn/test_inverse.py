"""Inverse: the two directions of a flow, its context, and state that neither of them sets; FLOWS has the rest."""

import copy

import pytest
import torch

from fastflow import nn as fnn
from tests.support.cases import randomize
from tests.support.flows import VECTOR, WithContext, batch, trained
from tests.support.gradients import assert_as_stored


def test_directions_are_swapped_and_pass_the_context():
    flow = trained(lambda: fnn.AffineCoupling(WithContext(2, 4)))
    layer, x, context = fnn.Inverse(flow), batch(VECTOR), batch((3,))
    for found, expected in ((layer, flow.inverse), (layer.inverse, flow), (fnn.Inverse(layer), flow)):
        torch.testing.assert_close(found(x, context), expected(x, context), rtol=0, atol=0)
    assert not torch.equal(layer(x, context)[0], layer(x, context + 1)[0])
    assert "context" in layer.check(x, context).gradient_errors


def test_gradients_in_reversible_chains():
    """With a context, as one step of several layers, and as several steps."""
    flows = [
        trained(lambda: fnn.AffineCoupling(WithContext(2, 4))),
        trained(lambda: fnn.InvertibleConv1x1(4)),
    ]
    x, context = batch(VECTOR).requires_grad_(), batch((3,)).requires_grad_()
    assert_as_stored([fnn.Inverse(fnn.Sequential(*flows)), trained(lambda: fnn.ActNorm(4))], x, context)
    assert_as_stored([fnn.Inverse(flow) for flow in reversed(flows)], x, context)


@pytest.mark.parametrize("run", ["forward", "inverse", "initialize", "reversible", "reversible inverse"])
def test_no_pass_sets_state(run):
    flow = fnn.Sequential(fnn.ActNorm(4), fnn.BatchNorm(4), fnn.AffineCoupling(fnn.MLP(2, 4))).double()
    layer, z = fnn.Inverse(randomize(flow)).train(), 3 + batch(VECTOR).requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    chain = fnn.Sequential(layer, fnn.Permute(4))
    calls = {
        "forward": layer,
        "inverse": layer.inverse,
        "initialize": layer.initialize,
        "reversible": lambda z: chain(z)[0].sum().backward(),
        "reversible inverse": lambda z: chain.inverse(z)[0].sum().backward(),
    }
    calls[run](z)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.flow.initialize(z)
    assert flow[0].initialized and flow[1].batches == 1
    torch.testing.assert_close(
        layer.inverse(z)[0].mean(0)[:2], torch.zeros(2, dtype=z.dtype), rtol=0, atol=1e-9
    )
