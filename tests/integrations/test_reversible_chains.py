"""Chains of nflows, normflows and FrEIA that recompute their activations: the same gradients from less memory."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from tests.support.libraries import assert_recomputes, assert_trains_the_same, randomized

CONTEXT = 2


class Nflows:
    """Flows of nflows: couplings and linear maps in chains within a chain."""

    def __init__(self):
        pytest.importorskip("nflows")
        self.ff = importlib.import_module("fastflow.integrations.nflows")
        self.transforms, self.flows, self.distributions, self.nets = (
            importlib.import_module(f"nflows.{name}")
            for name in ("transforms", "flows", "distributions", "nn.nets")
        )

    def coupling(self, features, start, **options):
        def net(inputs, outputs):
            options_of_net = {"hidden_features": 8, "context_features": CONTEXT, "num_blocks": 2}
            return self.nets.ResidualNet(inputs, outputs, **options_of_net | options)

        mask = [(i + start) % 2 for i in range(features)]
        return self.transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask, net, num_bins=4, tails="linear", tail_bound=2.0
        )

    def flow(self, features=4, steps=6, more=(), **options):
        t = self.transforms
        parts = []
        for i in range(steps):
            linear = t.CompositeTransform([t.RandomPermutation(features), t.LULinear(features)])
            parts.append(t.CompositeTransform([linear, self.coupling(features, i, **options)]))
        chain = t.CompositeTransform([*parts, *more, t.LULinear(features)])
        return self.flows.Flow(chain, self.distributions.StandardNormal([features]))


@pytest.fixture
def nflows():
    return Nflows()


def log_prob(m, x, c):
    return (m.log_prob(x, c),)


@pytest.mark.parametrize("options", [{}, {"use_batch_norm": True}, {"dropout_probability": 0.3}])
def test_flows_of_nflows(nflows, options):
    model = randomized(nflows.flow(**options))
    x, c = torch.randn(40, 4), torch.randn(40, CONTEXT)
    report = assert_recomputes(nflows.ff, model, log_prob, x, c)
    assert report.recomputing == {"_transform": "CompositeTransform"} and not report.storing
    assert "   1 CompositeTransform: recomputes activations" in str(report)


def test_other_layers_of_nflows(nflows):
    t = nflows.transforms
    spline = {"num_bins": 3, "tails": "linear", "tail_bound": 2.0}
    own = {"hidden_features": 8, "context_features": CONTEXT}
    more = [
        t.ActNorm(4),
        t.MaskedAffineAutoregressiveTransform(4, **own),
        t.InverseTransform(t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, **own, **spline)),
        t.PiecewiseRationalQuadraticCDF([4], **spline),
        t.AffineCouplingTransform([0, 1, 1, 0], lambda i, o: nflows.nets.ResidualNet(i, o, **own)),
        t.QRLinear(4, 2),
        t.ReversePermutation(4),
    ]
    model = randomized(nflows.flow(steps=2, more=more))
    with torch.no_grad():
        model.log_prob(torch.randn(40, 4), torch.randn(40, CONTEXT))
    report = assert_recomputes(nflows.ff, model, log_prob, torch.randn(40, 4), torch.randn(40, CONTEXT))
    assert report.recomputing == {"_transform": "CompositeTransform"}


def test_a_chain_initializes_itself(nflows):
    models = [nflows.transforms.CompositeTransform([nflows.transforms.ActNorm(3)] * 1) for _ in range(2)]
    nflows.ff.accelerate(models[1], reversible=True)
    x, gradients = 1 + 2 * torch.randn(8, 3), []
    for m in models:
        z, log_det = m(x)
        gradients.append(torch.autograd.grad((z.square().sum(1) - log_det).sum(), list(m.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


def test_training_coincides(nflows):
    torch.manual_seed(0)
    x, c = torch.randn(32, 3).double(), torch.randn(32, CONTEXT).double()

    class Reversible:
        @staticmethod
        def accelerate(model):
            return nflows.ff.accelerate(model, reversible=True)

    model = nflows.flow(3, steps=2, use_batch_norm=True)
    assert_trains_the_same(Reversible, model, lambda m: -m.log_prob(x, c).mean(), steps=10)


def test_copies_pickles_and_another_call(nflows):
    model = nflows.flow(steps=2)
    report = nflows.ff.accelerate(model, reversible=True)
    assert nflows.ff.accelerate(model, reversible=True) == report
    chain = type(model._transform)
    assert chain.__name__ == "ReversibleCompositeTransform"
    assert type(pickle.loads(pickle.dumps(model))._transform) is chain
    assert type(copy.deepcopy(model)._transform) is chain
    stored = nflows.ff.accelerate(model)
    assert not stored.recomputing and type(model._transform) is not chain
    assert stored.replaced == report.replaced


def test_hooks_of_inner_chains_run(nflows):
    model, seen = nflows.flow(steps=2), []
    model._transform._transforms[0].register_forward_hook(lambda *args: seen.append("chain"))
    nflows.ff.accelerate(model, reversible=True)
    model.log_prob(torch.randn(3, 4), torch.randn(3, CONTEXT)).sum().backward()
    assert seen == ["chain"] * 2  # forward, and again in backward


def test_chains_of_nflows_that_store_their_activations_are_named(nflows):
    t = nflows.transforms

    class Own(t.LULinear):
        pass

    model = nn.ModuleList(
        [
            nflows.flow(steps=2, more=[t.BatchNorm(4)]),
            nflows.flow(steps=1, more=[t.InverseTransform(t.Sigmoid())]),
            nflows.flow(steps=1, more=[Own(4)]),
        ]
    )
    report = nflows.ff.accelerate(model, reversible=True)
    reasons = {
        "0._transform": "BatchNorm in it has no exact inverse in training",
        "1._transform": "Sigmoid in it has no exact inverse in training",
        "2._transform": "Own in it has no exact inverse in training",
    }
    assert report.storing == {name: ("CompositeTransform", reason) for name, reason in reasons.items()}
    # the chains within it have no batch norm
    assert [name for name in report.recomputing if name.startswith("0")] == [
        "0._transform._transforms.0",
        "0._transform._transforms.1",
    ]
    assert "CompositeTransform: stores activations, BatchNorm in it" in str(report)


def freia():
    framework, modules = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")
    return importlib.import_module("fastflow.integrations.freia"), framework, modules


def linears(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def convolutions(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, outputs, 1))


@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_sequences_of_freia(images, rev):
    ff, framework, modules = freia()
    shape = (4, 2, 2) if images else (4,)
    model = framework.SequenceINN(*shape, force_tuple_output=images)
    own = {"subnet_constructor": convolutions if images else linears}
    condition = {"cond": 0, "cond_shape": (CONTEXT, *shape[1:])}
    for _ in range(2):
        for kind in (modules.GLOWCouplingBlock, modules.RNVPCouplingBlock, modules.NICECouplingBlock):
            model.append(kind, **own, **condition)
        model.append(modules.PermuteRandom)
        model.append(modules.AllInOneBlock, **own)  # a soft permutation is orthogonal to float32 only
        model.append(modules.ActNorm)
    if images:
        model.append(modules.IRevNetDownsampling)
        model.append(modules.Flatten)
    with torch.no_grad():
        model(torch.randn(20, *shape), c=[torch.randn(20, CONTEXT, *shape[1:])])
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)

    def call(m, x, c):
        z, log_det = m(x, c=[c], rev=rev)
        return z[0] if images else z, log_det

    x = torch.randn(20, 16) if images and rev else torch.randn(20, *shape)
    report = assert_recomputes(ff, model, call, x, torch.randn(20, CONTEXT, *shape[1:]))
    assert report.recomputing == {"": "SequenceINN"}


def test_networks_of_freia_that_store_their_activations_are_named():
    ff, framework, modules = freia()
    model = framework.SequenceINN(4)
    for i in range(2):
        model.append(modules.NICECouplingBlock, cond=i, cond_shape=(1,), subnet_constructor=linears)
    nodes = [framework.InputNode(4)]
    nodes.append(framework.Node(nodes[-1], modules.NICECouplingBlock, {"subnet_constructor": linears}))
    graph = framework.GraphINN([*nodes, framework.OutputNode(nodes[-1])])
    searched = framework.SequenceINN(4)
    searched.append(modules.InvAutoAct)
    report = ff.accelerate(nn.ModuleList([model, graph, searched]), reversible=True)
    assert {name: reason for name, (_, reason) in report.storing.items()} == {
        "0": "several conditions",
        "1": "a graph, of which SequenceINN is the chain",
        "2": "InvAutoAct in it has no exact inverse in training",
    }
    assert not report.recomputing and not report.replaced


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_flows_of_normflows(context):
    nf = pytest.importorskip("normflows")
    ff = importlib.import_module("fastflow.integrations.normflows")
    layers, flows = [], nf.flows
    for _ in range(3):
        layers.append(flows.CoupledRationalQuadraticSpline(4, 2, 8, num_context_channels=context))
        layers.append(flows.LULinearPermute(4))
    layers.append(flows.AutoregressiveRationalQuadraticSpline(4, 1, 9, num_context_channels=context))
    layers.append(flows.MaskedAffineAutoregressive(4, 9, context_features=context))
    if context is None:
        layers += [
            flows.ActNorm(4),
            flows.MaskedAffineFlow(torch.tensor([1.0, 0, 1, 0]), nf.nets.MLP([4, 8, 4])),
        ]
    kind = nf.NormalizingFlow if context is None else nf.ConditionalNormalizingFlow
    model = kind(nf.distributions.DiagGaussian(4), layers)
    x, c = torch.randn(40, 4), None if context is None else torch.randn(40, context)
    given = () if context is None else (c,)
    with torch.no_grad():
        model.log_prob(x, *given)
    model = randomized(model)

    def call(m, x, c):
        return (m.log_prob(x) if c is None else m.log_prob(x, c),)

    report = assert_recomputes(ff, model, call, x, c)
    assert report.recomputing == {"": kind.__name__}
    x, given = x.double(), [t.double() for t in given]
    wanted = model.forward_kld(x, *given), *model.inverse_and_log_det(x, *given)
    ff.accelerate(model, reversible=True)
    found = model.forward_kld(x, *given), *model.inverse_and_log_det(x, *given)
    for a, b in zip(found, wanted, strict=True):  # the library adds to float32
        torch.testing.assert_close(a.float(), b.float())


def test_flows_of_normflows_that_store_their_activations_are_named():
    nf = pytest.importorskip("normflows")
    ff = importlib.import_module("fastflow.integrations.normflows")
    planar = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [nf.flows.Planar((2,))])
    report = ff.accelerate(planar, reversible=True)
    assert report.storing == {"": ("NormalizingFlow", "Planar in it has no exact inverse in training")}
    base = nf.distributions.DiagGaussian((2, 1, 1))
    scales = nf.MultiscaleFlow([base], [[nf.flows.ActNorm((2, 1, 1))]], [])
    assert ff.accelerate(scales, reversible=True).storing == {"": ("MultiscaleFlow", "several scales")}
