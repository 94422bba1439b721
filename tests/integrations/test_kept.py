"""What faster layers keep of a module: found again after every change that matters."""

import copy
import gc
import importlib
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastflow.integrations.kept import found_in, value_of
from tests.support.libraries import randomized


def network():
    made = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3))
    made.tails, made[1].sizes = ["linear", "circular"], [1, 2]
    return made


def replace_parameter(m):
    m[0].weight = nn.Parameter(torch.ones(4, 3))


def replace_data(m):
    m[0].weight.data = m[0].weight.data.double()


CHANGES = {
    "hook": lambda m: m[0].register_forward_hook(lambda *args: None),
    "pre-hook of the whole": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "backward hook": lambda m: m[3].register_full_backward_hook(lambda *args: None),
    "module replaced": lambda m: m.__setitem__(1, nn.ReLU()),
    "module added": lambda m: m.append(nn.ReLU()),
    "module removed": lambda m: m.__delitem__(1),
    "parametrization": lambda m: parametrizations.weight_norm(m[3]),
    "probability of dropout": lambda m: setattr(m[2], "p", 0.1),
    "evaluation": lambda m: m.eval(),
    "evaluation of a child": lambda m: m[2].eval(),
    "dtype": lambda m: m.double(),
    "dtype of the data": replace_data,
    "device": lambda m: m.to("meta"),
    "parameter replaced": replace_parameter,
    "parameter removed": lambda m: setattr(m[0], "bias", None),
    "buffer": lambda m: m[0].register_buffer("mask", torch.ones(4, 3)),
    "element of a list": lambda m: m.tails.__setitem__(0, "circular"),
    "order of a list": lambda m: m[1].sizes.reverse(),
    "longer list": lambda m: m[1].sizes.append(3),
    "longer and shorter list": lambda m: m[1].sizes.insert(0, m.tails.pop()),
    "class": lambda m: setattr(m[1], "__class__", nn.Tanh),
    "own forward": lambda m: setattr(m[0], "forward", torch.tanh),
}


@pytest.mark.parametrize("change", CHANGES)
def test_found_again_after(change):
    model, calls = network(), []

    def find(module, *args):
        calls.append(args)
        return len(calls)

    assert found_in(model, find) == found_in(model, find) == 1
    assert found_in(model, find, "other") == 2 and found_in(model, find) == 1
    model(torch.zeros(2, 3))
    with torch.no_grad():  # values do not count
        model[0].weight.add_(1)
    assert found_in(model, find) == 1
    CHANGES[change](model)
    assert found_in(model, find) == found_in(model, find) == 3
    assert found_in(model, find, "other") == 4


def test_copies_share_nothing_and_nothing_outlives_its_module():
    model = network()
    assert found_in(model, id) == id(model) and value_of(model[0], "weight", id) == id(model[0].weight)
    other = copy.deepcopy(model)
    assert found_in(other, id) == id(other) and value_of(other[0], "weight", id) == id(other[0].weight)
    alive = weakref.ref(model), weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert [r() for r in alive] == [None, None]


def zuko_layer():
    ff = importlib.import_module("fastflow.integrations.zuko")
    zuko = pytest.importorskip("zuko")
    model = zuko.flows.MaskedAutoregressiveTransform(4, 2, hidden_features=(9, 9))
    return (
        ff,
        model,
        model.hyper,
        [model.hyper[0], model.hyper[2], model.hyper[4]],
        lambda m, x, c: m(c).inv(x),
    )


def nflows_layer():
    ff = importlib.import_module("fastflow.integrations.nflows")
    transforms = pytest.importorskip("nflows.transforms")
    model = transforms.MaskedAffineAutoregressiveTransform(4, 9, context_features=2, num_blocks=1)
    net = model.autoregressive_net
    linears = [net.initial_layer, *net.blocks[0].linear_layers, net.final_layer]
    return ff, model, net, linears, lambda m, x, c: m.inverse(x, c)[0]


def scale_output(linear):
    linear.register_forward_hook(lambda m, args, output: 1.5 * output)


def no_connections(linear):
    linear.mask.zero_()


def another_parameter(linear):
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))


def written_in_place(linear):
    with torch.no_grad():
        linear.weight.mul_(2)


def written_data(linear):
    linear.bias.data.add_(1)


def another_mask(linear):
    linear.mask = linear.mask * (torch.rand(linear.mask.shape) < 0.5)


def own_forward(linear):
    linear.forward = lambda x: 0.5 * type(linear).forward(linear, x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Doubled())


def other_activation(net):
    if isinstance(net, nn.Sequential):
        net[1] = net[3] = nn.Tanh()
    else:
        net.activation = net.blocks[0].activation = torch.tanh


OF_LINEARS = (
    scale_output,
    no_connections,
    another_parameter,
    written_in_place,
    written_data,
    another_mask,
    own_forward,
    parametrized,
)
OF_NETWORKS = (other_activation, nn.Module.eval, nn.Module.double)


@pytest.mark.parametrize("make", [zuko_layer, nflows_layer])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_an_inverse_follows_every_change_of_its_network(make, place):
    torch.manual_seed(0)
    ff, model, net, linears, inverse = make()
    randomized(model)
    ff.accelerate(model)
    for change in (*OF_LINEARS, *OF_NETWORKS):
        changed, x, c = copy.deepcopy(model).train(), torch.randn(5, 4), torch.randn(5, 2)
        names = {m: name for name, m in model.named_modules()}
        linear, network = (changed.get_submodule(names[m]) for m in (linears[place], net))
        before = inverse(changed, x, c)
        change(linear if change in OF_LINEARS else network)
        dtype = next(network.parameters()).dtype
        x, c = x.to(dtype), c.to(dtype)
        found = inverse(changed, x, c)
        assert ff.revert(changed) == 1
        torch.testing.assert_close(found, inverse(changed, x, c), rtol=1e-4, atol=1e-4)
        assert torch.equal(found, before) == (change is nn.Module.eval)


def test_an_inverse_follows_linear_layers_that_become_a_residual_block():
    """The same linear layers in the same order; the sum of the block makes its units depend on more features."""
    torch.manual_seed(0)
    ff = importlib.import_module("fastflow.integrations.zuko")
    zuko = pytest.importorskip("zuko")
    layer = zuko.flows.MaskedAutoregressiveTransform
    model = randomized(layer(4, hidden_features=(9,), residual=True))
    ff.accelerate(model)
    first, block, *others = model.hyper
    degrees = first.mask.sum(1)
    for linear in (block[0], block[2]):
        linear.mask.copy_(degrees[:, None] > degrees)
    x, results = torch.randn(5, 4), []
    for parts in ([first, nn.ReLU(), *block, *others], [first, block, *others]):
        model.hyper._modules.clear()
        for i, part in enumerate(parts):
            model.hyper.add_module(str(i), part)
        results.append(model().inv(x))
    ff.revert(model)
    torch.testing.assert_close(results[1], model().inv(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(*results)
