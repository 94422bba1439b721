"""Residual networks of nflows and its fork as one op: equal in every mode, and PyTorch wherever a network is changed."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from fastflow.integrations import residual_layers
from tests.support.libraries import assert_same, randomized

PACKAGES = {
    "nflows": "nflows.nn.nets",
    "glasflow": "glasflow.nflows.nn.nets",
    "normflows": "normflows.nets.resnet",
}


@pytest.fixture(params=PACKAGES)
def library(request):
    """The integration, and ``ResidualNet`` of the package."""
    pytest.importorskip(PACKAGES[request.param].split(".")[0])
    ff = importlib.import_module(f"fastflow.integrations.{request.param}")
    return ff, importlib.import_module(PACKAGES[request.param]).ResidualNet


@pytest.fixture
def calls(monkeypatch):
    """Calls of the op."""
    found, op = [], residual_layers.residual_network

    def counted(*args, **options):
        found.append(options)
        return op(*args, **options)

    monkeypatch.setattr(residual_layers, "residual_network", counted)
    return found


def network(kind, context=3, **options):
    torch.manual_seed(0)
    options = {"hidden_features": 7, "num_blocks": 2} | options
    return randomized(kind(4, 5, context_features=context, **options))


def inputs(context=3, samples=30):
    x = torch.randn(samples, 4)
    return (x,) if context is None else (x, torch.randn(samples, context))


@pytest.mark.parametrize(
    "context, options",
    [
        (3, {}),
        (None, {"activation": F.elu}),
        (3, {"use_batch_norm": True}),
        (None, {"use_batch_norm": True, "activation": torch.tanh, "num_blocks": 1}),
        (3, {"activation": nn.SiLU(), "dropout_probability": 0.0}),
        (3, {"num_blocks": 0}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics(library, calls, context, options, training):
    ff, kind = library
    model = network(kind, context, **options)
    if options.get("num_blocks") == 0:  # without a block there is no activation to find
        with torch.no_grad():
            assert ff.accelerate(model).replaced and model(*inputs(context)).shape == (30, 5)
        return
    if not training:
        model(*inputs(context))  # running statistics that are not those of a new network
    model.train(training)
    call = {"net": lambda m, x, c: (m(x, *(() if c is None else (c,))),)}
    report = assert_same(ff, model, call, *inputs(context))
    assert report.replaced[""] == "ResidualNet" and len(calls) == 4  # of the model and a copy, in two dtypes


def test_periodic_features(calls):
    nf = pytest.importorskip("normflows")
    ff = importlib.import_module("fastflow.integrations.normflows")
    periodic = nf.utils.nn.PeriodicFeaturesElementwise(4, [1, 2], scale=torch.tensor([1.0, 0.5]))
    model = randomized(nf.nets.resnet.ResidualNet(4, 5, 7, preprocessing=periodic))
    report = assert_same(ff, model, {"net": lambda m, x, c: (m(x),)}, *inputs(None))
    assert report.replaced[""] == "ResidualNet" and len(calls) == 4


@pytest.mark.parametrize("momentum", [0.1, 0.4])
def test_running_statistics_of_steps(library, calls, momentum):
    ff, kind = library
    before = network(kind, use_batch_norm=True).double()
    for m in before.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.momentum = momentum
    after = copy.deepcopy(before)
    ff.accelerate(after)
    for samples in (30, 17, 64):
        given = [v.double() for v in inputs(samples=samples)]
        torch.testing.assert_close(after(*given), before(*given), rtol=1e-10, atol=1e-10)
    assert len(calls) == 3
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=1e-12, atol=1e-12)
    assert after.blocks[0].batch_norm_layers[0].num_batches_tracked == 3
    with torch.no_grad():  # PyTorch moves the statistics here too
        torch.testing.assert_close(after(*given), before(*given), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=1e-12, atol=1e-12)


def _hook(net):
    net.blocks[1].linear_layers[0].register_forward_hook(lambda m, args, out: 2 * out)


def _forward(net):
    net.blocks[0].dropout.forward = lambda h: 3 * h


def _last(net):
    net.final_layer = nn.Sequential(nn.Tanh(), net.final_layer)


def _activation(net):
    net.blocks[0].activation = F.gelu


def _activations(net):
    net.blocks[0].activation = F.elu


def _bias(net):
    net.initial_layer.bias = None


def _block(net):
    net.blocks[0] = type(
        "Own", (residual_layers.own_class(net.blocks[0]),), {"forward": lambda self, h, context=None: h}
    )(7, 3)


@pytest.mark.parametrize("change", [_hook, _forward, _last, _activation, _activations, _bias, _block])
def test_a_changed_network_is_left_to_pytorch(library, calls, change):
    ff, kind = library
    net = network(kind)
    ff.accelerate(net)
    given = inputs()
    with torch.no_grad():
        net(*given)
        assert len(calls) == 1
        change(net)
        plain = copy.deepcopy(net)
        ff.revert(plain)
        torch.testing.assert_close(net(*given), plain(*given))
    assert len(calls) == 1


def test_replaced_parameters_are_read(library, calls):
    ff, kind = library
    net = network(kind)
    ff.accelerate(net)
    given = inputs()
    net(*given)
    net.final_layer.weight = nn.Parameter(torch.ones(5, 7))
    net.blocks[0].linear_layers[0] = nn.Linear(7, 7)
    plain = copy.deepcopy(net)
    ff.revert(plain)
    torch.testing.assert_close(net(*given), plain(*given), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
    net.double()
    given = [v.double() for v in given]
    torch.testing.assert_close(net(*given), plain.double()(*given), rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "context, options", [(3, {"dropout_probability": 0.5}), (None, {"dropout_probability": 0.1})]
)
def test_dropout_in_training_is_left_to_pytorch(library, calls, context, options):
    ff, kind = library
    net, given = network(kind, context, **options), inputs(context)
    plain = copy.deepcopy(net)
    ff.accelerate(net)
    results = []
    for m in (net, plain):
        torch.manual_seed(1)
        results.append(m(*given))
    torch.testing.assert_close(*results)
    assert not calls
    torch.testing.assert_close(net.eval()(*given), plain.eval()(*given), rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def test_norms_that_the_op_does_not_have(library, calls):
    ff, kind = library
    for name, value in (("momentum", None), ("eps", 0.5), ("training", False)):
        net = network(kind, use_batch_norm=True)
        setattr(net.blocks[0].batch_norm_layers[0], name, value)
        plain, given = copy.deepcopy(net), inputs()
        ff.accelerate(net)
        torch.testing.assert_close(net(*given), plain(*given))
        torch.testing.assert_close(net.state_dict(), plain.state_dict())
    assert not calls


def test_autocast_few_samples_transforms_and_graphs_are_left_to_pytorch(library, calls):
    ff, kind = library
    net, (x, c) = network(kind), inputs()
    plain = copy.deepcopy(net)
    ff.accelerate(net)
    parameters = dict(net.named_parameters())

    def loss(m, parameters, x, c):
        return functional_call(m, parameters, (x[None], c[None])).square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = net(x, c), plain(x, c)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)  # bfloat16's rounding
    torch.testing.assert_close(net(x[:9], c[:9]), plain(x[:9], c[:9]))
    torch.testing.assert_close(vmap(net)(x[:, None], c[:, None])[:, 0], plain(x, c))
    found, wanted = (
        vmap(torch.func.grad(lambda p, *v, m=m: loss(m, p, *v)), (None, 0, 0))(parameters, x, c)
        for m in (net, plain)
    )
    torch.testing.assert_close(found, wanted)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, c), plain(x, c))
    assert not calls
    with pytest.raises(RuntimeError):  # as the library does
        net(x, c[:-1])


def test_second_derivatives_and_inputs_without_gradients(library, calls):
    ff, kind = library
    net = network(kind, activation=torch.tanh).double()
    plain = copy.deepcopy(net)
    ff.accelerate(net)
    x, c = (v.double() for v in inputs())
    x.requires_grad_()
    found = []
    for m in (net, plain):
        (g,) = torch.autograd.grad(m(x, c).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [x, *m.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        zero = torch.zeros(()).double()
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-10, atol=1e-10)
    assert len(calls) == 1
