"""Glow's coupling network as one node of the graph, beside its layers one after another."""

import copy

import pytest
import torch
from cases import LAYOUTS, lay_out, leaf, randomize
from torch import nn
from torch.autograd import gradcheck

from fastflow.nn import ActNorm, GlowNetwork


def network(dtype=torch.float64):
    made = GlowNetwork(3, 4, hidden=5)
    for layer in made.modules():
        if isinstance(layer, ActNorm):
            layer.initialized.fill_(True)
    return randomize(made, std=0.2).to(dtype)


def evaluate(net, x, forward, wanted=None):
    x = leaf(x)
    y = forward(net, x)
    wanted = [x, *net.parameters()] if wanted is None else wanted
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, [v for v in wanted if v.requires_grad], dy)


def layer_by_layer(net, x):
    return nn.Sequential.forward(net, x)


def is_one_node(y):
    return type(y.grad_fn).__name__ == "_NetworkBackward"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_its_layers(dtype, layout):
    net, x = network(dtype), lay_out(torch.randn(2, 3, 4, 6, dtype=dtype), layout)
    found, expected = (evaluate(net, x, f) for f in (GlowNetwork.__call__, layer_by_layer))
    assert is_one_node(found[0]) and not is_one_node(expected[0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(net(x), found[0])


def test_gradients():
    net = network()
    names = dict(net.named_parameters())
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64)
    inputs = [leaf(v) for v in (x, *names.values())]
    assert gradcheck(lambda x, *p: torch.func.functional_call(net, dict(zip(names, p, strict=True)), (x,)), inputs)
    (gradient,) = torch.autograd.grad(net(leaf(x)).square().sum(), net[4].bias, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_half_precision_is_that_of_autocast():
    net, x = network(torch.float32), torch.randn(4, 3, 8, 8)
    exact = [v.double() for v in evaluate(copy.deepcopy(net).double(), x.double(), layer_by_layer)]
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = (evaluate(net, x, f) for f in (GlowNetwork.__call__, layer_by_layer))
    assert found[0].dtype == torch.bfloat16 and [v.dtype for v in found] == [v.dtype for v in theirs]
    for ours, other, truth in zip(found, theirs, exact, strict=True):
        assert (ours.double() - truth).norm() <= max(2 * (other.double() - truth).norm(), 1e-6 * truth.norm())
    double = copy.deepcopy(net).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert double(x.double()).dtype == torch.float64


@pytest.mark.parametrize("frozen", ["x", "0.conv.weight", "2.actnorm.bias", "4.logs", "2", "0", "all"])
def test_what_is_frozen_gets_no_gradient(frozen):
    net, x = network(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for name, p in net.named_parameters():
        p.requires_grad_(not (name.startswith(frozen) or frozen == "all"))
    given = x if frozen == "x" else leaf(x)
    found, expected = net(given), layer_by_layer(net, given)
    wanted = [v for v in (given, *net.parameters()) if v.requires_grad]
    gradients = [torch.autograd.grad(y.square().sum(), wanted) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    found = net(given)
    found.square().sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in net.parameters())


def changed(how):
    net = network()
    if how == "a hook":
        net.seen = []
        net[1].register_forward_hook(lambda *_: net.seen.append(1))
    elif how == "another layer":
        net[3] = nn.Tanh()
    elif how == "a layer more":
        net.append(nn.Tanh())
    elif how == "a patched forward":
        net[4].forward = lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1)
    return net


@pytest.mark.parametrize("how", ["a hook", "another layer", "a layer more", "a patched forward"])
def test_a_network_that_is_listened_to_or_changed_runs_layer_by_layer(how):
    net, x = changed(how), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = net(leaf(x))
    assert not is_one_node(y) and torch.equal(y, layer_by_layer(net, x))
    assert how != "a hook" or len(net.seen) == 4


def test_initialises_itself_once():
    net, x = GlowNetwork(3, 4, hidden=5), torch.randn(8, 3, 4, 4)
    net(x)
    assert all(net[i].actnorm.initialized for i in (0, 2))
    before = copy.deepcopy(net.state_dict())
    assert is_one_node(net(5 * x))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_parametrized_weights():
    net, x = network(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(net[0].conv)
    found, expected = (evaluate(net, x, f) for f in (GlowNetwork.__call__, layer_by_layer))
    assert is_one_node(found[0]) and len(found) == 12
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_kept_for_backward_is_what_layers_keep():
    """Inputs and scaled weights of the layers, and parameters: no activation twice."""
    net, x = network(torch.float32), torch.randn(4, 3, 16, 16)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    activations = x.nbytes + 2 * 4 * 5 * 16 * 16 * 4
    weights = sum(p.nbytes for p in net.parameters() if p.ndim == 4)
    assert sum(kept.values()) <= activations + 2 * weights + 16 * 4 * 8
