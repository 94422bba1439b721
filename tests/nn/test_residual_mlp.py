"""ResidualMLP: its formula, its start, context, dropout in reversible chains, and errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastflow
from fastflow.nn import AffineCoupling, ResidualMLP, Sequential
from tests.support.cases import randomize
from tests.support.copies import COPIES

F64 = torch.float64


def trained(*args, **options):
    return randomize(ResidualMLP(*args, **options), std=0.3).double().eval()


@pytest.mark.parametrize("context_features", [None, 3])
@pytest.mark.parametrize("activation", [F.relu, nn.Tanh()])
@pytest.mark.parametrize("samples", [7, 40])
def test_the_formula(context_features, activation, samples):
    net = trained(2, 5, hidden=6, blocks=3, context_features=context_features, activation=activation)
    x = torch.randn(samples, 2, dtype=F64)
    context = None if context_features is None else torch.randn(samples, 3, dtype=F64)
    h = net.linear_in(x if context is None else torch.cat([x, context], dim=1))
    for block in net.blocks:
        t = block.linear_out(activation(block.linear_in(activation(h))))
        if context is not None:
            t = F.glu(torch.cat([t, block.gate(context)], dim=1), dim=1)
        h = h + t
    torch.testing.assert_close(net(x, context), net.linear_out(h), rtol=1e-13, atol=1e-13)
    for copied in COPIES:
        assert torch.equal(copied(net)(x, context), net(x, context))


def _gradients(net, *inputs):
    return torch.autograd.grad((net(*inputs) ** 2).sum(), [*inputs, *net.parameters()])


def test_the_op_and_pytorch_are_equal():
    net, (x, context) = trained(0, 5, hidden=6, context_features=3), torch.randn(2, 20, 3, dtype=F64)
    inputs = x[:, :0].requires_grad_(), context.requires_grad_()
    found = _gradients(net, *inputs)
    with fastflow.backend("reference"):
        torch.testing.assert_close(found, _gradients(net, *inputs), rtol=1e-11, atol=1e-11)


def _hook(net):
    net.blocks[1].linear_in.register_forward_hook(lambda m, args, out: 2 * out)


def _block(net):
    net.blocks[0] = nn.Identity()
    net.blocks[0].forward = lambda h, context: h


def _last(net):
    net.linear_out = nn.Sequential(nn.Tanh(), net.linear_out)


def _activation(net):
    net.blocks[0].activation = F.gelu


def _bias(net):
    net.linear_in.bias = None


def _dropout(net):
    net.blocks[0].dropout.forward = lambda h: 3 * h


@pytest.mark.parametrize("change", [_hook, _block, _last, _activation, _bias, _dropout])
def test_a_changed_network_is_left_to_pytorch(change):
    net, x = trained(2, 5, hidden=6), torch.randn(20, 2, dtype=F64)
    before = net(x)
    change(net)
    few = torch.cat([net(part) for part in x.split(10)])
    assert (few - before).abs().max() > 1e-3
    torch.testing.assert_close(net(x), few)


def test_a_coupling_starts_as_the_identity():
    layer, x = AffineCoupling(ResidualMLP(2, 4, hidden=8)), torch.randn(5, 4)
    y, log_det = layer(x)
    assert torch.equal(y, x) and not log_det.any()
    h = torch.randn(5, 8)
    block = layer.net.blocks[0]
    assert 0 < (block(h) - h).abs().max() < 0.02
    assert (ResidualMLP(2, 4, blocks=1, context_features=1)(x[:, :2], x[:, :1]) == 0).all()


def test_the_context_alone():
    net = trained(0, 4, hidden=5, context_features=3)
    x, context = torch.randn(6, 0, dtype=F64), torch.randn(6, 3, dtype=F64)
    assert net(x, context).shape == (6, 4)
    assert (net(x, context) - net(x, context + 1)).abs().min() > 0


@pytest.mark.parametrize("context_features", [None, 3])
def test_a_coupling_with_it(context_features):
    layer = AffineCoupling(trained(2, 4, hidden=5, context_features=context_features, activation=F.elu))
    x = torch.randn(4, 4, dtype=F64)
    context = None if context_features is None else torch.randn(4, 3, dtype=F64)
    errors = layer.check(x, context).gradient_errors
    assert "net.blocks.1.linear_in.weight" in errors
    assert ("net.blocks.1.gate.weight" in errors) == (context is not None)


def test_dropout_is_the_same_in_backward():
    """A reversible chain draws the zeros of forward again."""
    net = trained(2, 4, hidden=32, dropout=0.5).train()
    x = torch.randn(4, 4, dtype=F64, requires_grad=True)
    assert (net(x[:, :2]) - net(x[:, :2])).abs().max() > 1e-3
    layer, results = AffineCoupling(net).double(), []
    for reversible in (True, False):
        torch.manual_seed(0)
        z, log_det = Sequential(layer, reversible=reversible)(x)
        results.append(torch.autograd.grad((z**2).sum() + log_det.sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dropout", [-0.1, 1, 2.5])
def test_dropout_is_a_probability(dropout):
    with pytest.raises(ValueError, match="dropout: got .*, expected a number from 0 to below 1"):
        ResidualMLP(2, 2, dropout=dropout)


@pytest.mark.parametrize("activation", ["relu", nn.ReLU, None])
def test_an_activation_is_a_function(activation):
    with pytest.raises(ValueError, match="activation: got .*, expected a function of a tensor"):
        ResidualMLP(2, 2, activation=activation)
