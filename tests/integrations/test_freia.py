"""Networks of FrEIA, accelerated in place: the same numbers and gradients."""

import pytest
import torch
from torch import nn

from fastflow.integrations import freia_layers
from tests.support.libraries import assert_same, assert_trains_the_same

framework = pytest.importorskip("FrEIA.framework")
modules = pytest.importorskip("FrEIA.modules")
ff = pytest.importorskip("fastflow.integrations.freia")

CONTEXT = 2


@pytest.fixture(autouse=True)
def small_images_by_ops(monkeypatch):
    monkeypatch.setattr(freia_layers, "FEW_ELEMENTS", 0)


def net(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def images_net(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def randomized(model):
    """Noise on trained parameters; permutations and fixed matrices are parameters too."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.2)
    return model


def called(rev):
    def call(model, x, c):
        z, log_det = model(x, c=None if c is None else [c], rev=rev)
        return z, torch.as_tensor(log_det, dtype=x.dtype).expand(x.shape[0])

    return call


BOTH = {"forward": called(False), "inverse": called(True)}


@pytest.mark.parametrize("by_op", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reverse_permutation", [False, True])
@pytest.mark.parametrize(
    "shape, context",
    [
        ((4,), None),
        ((6,), CONTEXT),
        ((4, 3, 5), None),
        ((2, 2, 2), CONTEXT),
        ((4, 3), None),
        ((2, 1, 2, 3), None),
    ],
)
def test_all_in_one_blocks(shape, context, soft, reverse_permutation, by_op, monkeypatch):
    monkeypatch.setattr(freia_layers, "pays_for_small_ops", lambda z: by_op)
    convolutions = {
        1: net,
        2: lambda i, o: nn.Conv1d(i, o, 1),
        3: images_net,
        4: lambda i, o: nn.Conv3d(i, o, 1),
    }
    model = framework.SequenceINN(*shape)
    options = {"permute_soft": soft, "reverse_permutation": reverse_permutation}
    if context is not None:
        options |= {"cond": 0, "cond_shape": (context, *shape[1:])}
    for kind in ("SOFTPLUS", "EXP"):
        model.append(
            modules.AllInOneBlock,
            subnet_constructor=convolutions[len(shape)],
            global_affine_type=kind,
            affine_clamping=1.5,
            **options,
        )
    randomized(model)
    x = torch.randn(5, *shape)
    c = None if context is None else torch.randn(5, context, *shape[1:])
    report = assert_same(ff, model, BOTH, x, c, pickles=False)  # the library holds a lambda
    assert list(report.replaced.values()) == ["AllInOneBlock"] * 2


def test_a_permutation_that_is_loaded_is_used():
    model = framework.SequenceINN(8, 2, 2)
    model.append(modules.AllInOneBlock, subnet_constructor=images_net)
    other = framework.SequenceINN(8, 2, 2)
    other.append(modules.AllInOneBlock, subnet_constructor=images_net)
    x = torch.randn(3, 8, 2, 2)
    ff.accelerate(model)
    model(x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x))
    soft = framework.SequenceINN(8, 2, 2)
    soft.append(modules.AllInOneBlock, subnet_constructor=images_net, permute_soft=True)
    model.load_state_dict(soft.state_dict())
    torch.testing.assert_close(model(x), soft(x))


def test_images_of_few_elements_keep_the_operators_of_the_library(monkeypatch):
    model = framework.SequenceINN(4, 2, 2)
    model.append(modules.AllInOneBlock, subnet_constructor=images_net)
    ff.accelerate(model)
    monkeypatch.setattr(freia_layers, "affine_coupling", None)
    x = torch.randn(2, 4, 2, 2)
    with pytest.raises(TypeError):
        model(x)
    monkeypatch.setattr(freia_layers, "FEW_ELEMENTS", x.numel() + 1)
    model(x)


@pytest.mark.parametrize("by_op", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 2, 5)])
def test_actnorm(shape, by_op, monkeypatch):
    monkeypatch.setattr(freia_layers, "pays_for_small_ops", lambda z: by_op)
    model = framework.SequenceINN(*shape)
    model.append(modules.ActNorm)
    x = 1 + 2 * torch.randn(6, *shape)
    model(x)
    assert_same(ff, randomized(model), BOTH, x, pickles=False)
    ff.accelerate(model)
    model[0].init_on_next_batch = True
    z, _ = model(x)
    torch.testing.assert_close(z.transpose(0, 1).flatten(1).mean(1), torch.zeros(shape[0]), atol=1e-5, rtol=0)


def test_fixed_convolutions_and_downsampling():
    model = framework.SequenceINN(2, 4, 6)
    model.append(modules.IRevNetDownsampling)
    model.append(modules.Fixed1x1Conv, M=torch.randn(8, 8))
    model.append(modules.AllInOneBlock, subnet_constructor=images_net)
    x, z = torch.randn(3, 2, 4, 6), torch.randn(3, 8, 2, 3)
    report = assert_same(ff, randomized(model), {"forward": BOTH["forward"]}, x, pickles=False)
    assert [*report.replaced.values()] == ["IRevNetDownsampling", "Fixed1x1Conv", "AllInOneBlock"]
    assert_same(ff, model, {"inverse": BOTH["inverse"]}, z, pickles=False)


def softsign(u):
    return u / (1 + u.abs())


@pytest.mark.parametrize(
    "name, shape, context, options",
    [
        ("GLOWCouplingBlock", (4,), None, {}),
        ("GLOWCouplingBlock", (6, 2, 3), CONTEXT, {"clamp_activation": "TANH", "clamp": 1.3}),
        ("GLOWCouplingBlock", (2,), CONTEXT, {"clamp_activation": "SIGMOID"}),
        ("GLOWCouplingBlock", (5,), None, {"clamp_activation": softsign, "split_len": 0.6}),
        ("RNVPCouplingBlock", (6,), CONTEXT, {"clamp": 0.7}),
        ("RNVPCouplingBlock", (4, 2, 3), None, {"clamp_activation": softsign}),
        ("RNVPCouplingBlock", (4,), None, {"split_len": 1}),
    ],
)
def test_couplings(name, shape, context, options, monkeypatch):
    monkeypatch.setattr(freia_layers, "pays_for_small_ops", lambda z: True)
    model = framework.SequenceINN(*shape)
    given = {} if context is None else {"cond": 0, "cond_shape": (context, *shape[1:])}
    for _ in range(2):
        make = net if len(shape) == 1 else images_net
        model.append(getattr(modules, name), subnet_constructor=make, **given, **options)
    randomized(model)
    x = torch.randn(5, *shape)
    c = None if context is None else torch.randn(5, context, *shape[1:])
    if "split_len" in options:
        reason = ff.accelerate(model).left_alone["module_list.0"]
        assert reason == (name, "halves of different sizes")
        return
    report = assert_same(ff, model, BOTH, x, c, pickles=False)
    assert list(report.replaced.values()) == [name] * 2


def test_graphs_with_conditions(monkeypatch):
    monkeypatch.setattr(freia_layers, "pays_for_small_ops", lambda z: True)
    conditions = [framework.ConditionNode(2), framework.ConditionNode(1)]
    nodes = [framework.InputNode(4)]
    kinds = (modules.GLOWCouplingBlock, modules.RNVPCouplingBlock, modules.AllInOneBlock)
    for kind, given in zip(kinds, (conditions, conditions[0], conditions[1]), strict=True):
        nodes.append(framework.Node(nodes[-1], kind, {"subnet_constructor": net}, conditions=given))
    model = framework.GraphINN([*nodes, *conditions, framework.OutputNode(nodes[-1])])
    calls = {
        name: lambda m, x, c, rev=rev: m(x, c=[c[:, :2], c[:, 2:]], rev=rev)
        for name, rev in (("forward", False), ("inverse", True))
    }
    report = assert_same(ff, randomized(model), calls, torch.randn(5, 4), torch.randn(5, 3), pickles=False)
    assert sorted(report.replaced.values()) == ["AllInOneBlock", "GLOWCouplingBlock", "RNVPCouplingBlock"]


def test_graphs():
    nodes = [framework.InputNode(4, 2, 2, name="in")]
    for _ in range(2):
        nodes.append(
            framework.Node(
                nodes[-1], modules.AllInOneBlock, {"subnet_constructor": images_net, "permute_soft": True}
            )
        )
    nodes.append(framework.OutputNode(nodes[-1]))
    model = framework.GraphINN(nodes)
    report = assert_same(ff, randomized(model), BOTH, torch.randn(5, 4, 2, 2), pickles=False)
    assert list(report.replaced.values()) == ["AllInOneBlock"] * 2


def test_training_coincides():
    torch.manual_seed(0)
    model = framework.SequenceINN(4, 3, 3)
    for _ in range(3):
        model.append(modules.AllInOneBlock, subnet_constructor=images_net)
    x = torch.randn(16, 4, 3, 3).double()

    def loss(m):
        z, log_det = m(x)
        return (z.square().sum((1, 2, 3)) / 2 - log_det).mean()

    assert_trains_the_same(ff, model, loss)


def test_training_of_couplings_coincides(monkeypatch):
    monkeypatch.setattr(freia_layers, "pays_for_small_ops", lambda z: True)
    torch.manual_seed(0)
    model = framework.SequenceINN(4)
    kinds = (modules.GLOWCouplingBlock, modules.RNVPCouplingBlock)
    for kind in kinds:
        model.append(kind, cond=0, cond_shape=(CONTEXT,), subnet_constructor=net)
    x, c = torch.randn(16, 4).double(), torch.randn(16, CONTEXT).double()

    def loss(m):
        z, log_det = m(x, c=[c])
        return (z.square().sum(1) / 2 - log_det).mean()

    assert_trains_the_same(ff, model, loss)


def test_what_is_left_alone_is_named():
    model = framework.SequenceINN(4, 2, 2)
    model.append(modules.AllInOneBlock, subnet_constructor=images_net, gin_block=True)
    model.append(modules.AllInOneBlock, subnet_constructor=images_net, learned_householder_permutation=2)
    model.append(modules.GINCouplingBlock, subnet_constructor=images_net)
    model.append(modules.PermuteRandom)
    model.append(modules.IRevNetDownsampling, legacy_backend=True)
    model.append(modules.IRevNetUpsampling)
    odd = modules.AllInOneBlock([(3, 2, 2)], subnet_constructor=images_net)
    report = ff.accelerate(nn.ModuleList([model, odd]))
    reasons = {name: reason for name, (_, reason) in report.left_alone.items()}
    assert reasons == {
        "0.module_list.0": "gin_block=True",
        "0.module_list.1": "learned_householder_permutation",
        "0.module_list.2": "not covered",
        "0.module_list.4": "legacy_backend=True",
        "0.module_list.5": "a subclass of a layer that is covered",
        "1": "an odd number of channels",
    }
    assert str(ff.accelerate(nn.Linear(2, 2))) == "nothing to replace was found"
