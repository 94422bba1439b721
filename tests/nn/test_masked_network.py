"""MaskedNetwork: what each output depends on, its formula, degrees, kept weights, dropout, its plan, and errors."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflow.nn import MaskedNetwork
from fastflow.nn.networks.masked_network import ACTIVATIONS, AFTER, BEFORE, GATE, SKIP, spread
from tests.support.cases import name, pairwise, randomize
from tests.support.copies import COPIES

F64 = torch.float64


def trained(*args, **options) -> MaskedNetwork:
    return randomize(MaskedNetwork(*args, **options), std=0.5).double().eval()


def contexts(net: MaskedNetwork, n: int) -> torch.Tensor | None:
    return None if net.context_features is None else torch.randn(n, net.context_features, dtype=F64)


def jacobian(net: MaskedNetwork, n: int = 4) -> torch.Tensor:
    """Largest |d output / d x| over some samples, ``[D, P, D]``, with features in the network's order."""
    x, context = torch.randn(n, net.features, dtype=F64, requires_grad=True), contexts(net, n)
    h = net(x, context).unflatten(1, (net.features, -1))
    rows = [
        torch.autograd.grad(h[:, k, p].sum(), x, retain_graph=True, materialize_grads=True)[0].abs().amax(0)
        for k in range(net.features)
        for p in range(net.outputs_per_feature)
    ]
    found = torch.stack(rows).unflatten(0, (net.features, -1))
    order = torch.arange(net.features) if net.order is None else net.order
    return found[order][..., order]


NETWORKS = pairwise(
    features=[1, 2, 5],
    outputs=[1, 3],
    hidden=[(1, 1), (3, 3), (4, 9, 4), (17, 30)],
    residual=[False, True],
    context=[None, 2],
    mode=["add", "glu"],
    order=[None, "reverse", "random"],
    activation=list(ACTIVATIONS),
    given=[False, True],
)


def network(case: dict, **more) -> MaskedNetwork:
    features, hidden, residual = case["features"], case["hidden"], case["residual"]
    degrees = None
    if case["given"]:
        lowest = 0 if case["context"] or features == 1 else 1
        first, *rest = (torch.randint(lowest, features, (h,)) for h in hidden)
        degrees = [first, *(d for inner in rest for d in (inner, first))] if residual else [first, *rest]
    return trained(
        features,
        case["outputs"],
        hidden,
        residual=residual,
        context_features=case["context"],
        context_mode=case["mode"],
        order=case["order"],
        activation=case["activation"],
        degrees=degrees,
        **more,
    )


@pytest.mark.parametrize("case", NETWORKS, ids=name)
def test_outputs_depend_on_the_features_before(case):
    torch.manual_seed(0)
    found = jacobian(network(case))
    features = case["features"]
    later = torch.ones(features, features, dtype=torch.bool).triu()
    assert (found.movedim(1, 0)[:, later] == 0).all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("features, width", [(2, 3), (5, 4), (5, 20), (8, 7)])
def test_outputs_depend_on_every_feature_before(features, width, context, residual):
    torch.manual_seed(0)
    width = max(width, features) if context else width
    net = trained(features, 2, (width,) * 3, residual=residual, context_features=context, activation="tanh")
    found = jacobian(net)
    earlier = torch.ones(features, features, dtype=torch.bool).tril(-1)
    assert (found.movedim(1, 0)[:, earlier] > 0).all()


@pytest.mark.parametrize("case", [c for c in NETWORKS if c["context"]], ids=name)
def test_every_feature_depends_on_the_context(case):
    torch.manual_seed(0)
    net = network(case | {"activation": "tanh", "given": False})
    x, context = torch.randn(4, net.features, dtype=F64), contexts(net, 4).requires_grad_()
    h = net(x, context)
    for column in h.T:
        gradient = torch.autograd.grad(column.sum(), context, retain_graph=True, materialize_grads=True)[0]
        assert (gradient != 0).any() or min(case["hidden"]) == 1


@pytest.mark.parametrize("case", NETWORKS, ids=name)
def test_the_formula(case):
    """Layer by layer, with matrices of which every masked entry is 0."""
    torch.manual_seed(0)
    net = network(case, context_activation=True)
    act = ACTIVATIONS[case["activation"]]
    x, context = torch.randn(6, net.features, dtype=F64), contexts(net, 6)
    order = torch.arange(net.features) if net.order is None else net.order
    of_layer = [1 + torch.arange(net.features), *net._degrees()]
    of_output = torch.arange(net.features).repeat_interleave(net.outputs_per_feature)

    def linear(i, v):
        rows = of_output if i == len(net.widths) else of_layer[i + 1]
        weight = net.layers[i].weight.clone()
        for row, d in enumerate(rows):
            for column, e in enumerate(of_layer[i]):
                if e > d:
                    weight[row, column] = 0
        return v @ weight.T + net.layers[i].bias

    def of_context(i):
        return (
            0.0
            if context is None or str(i) not in net.context_layers
            else net.context_layers[str(i)](context)
        )

    def gate(i):
        if context is None or case["mode"] == "add":
            return 1.0
        return torch.sigmoid(net.context_layers[str(i)](context))

    first = 0.0 if context is None else act(of_context(0))
    h = linear(0, x[:, order]) + first
    if case["residual"]:
        for block in range(len(case["hidden"]) - 1):
            i = 1 + 2 * block
            inner = linear(i, act(h)) + (of_context(i) if case["mode"] == "add" else 0.0)
            h = h + linear(i + 1, act(inner)) * gate(i + 1)
    else:
        h = act(h)
        for i in range(1, len(case["hidden"])):
            h = act(linear(i, h) * gate(i))
    expected = torch.empty(6, net.features, net.outputs_per_feature, dtype=F64)
    expected[:, order] = linear(len(net.widths), h).unflatten(1, (net.features, -1))
    torch.testing.assert_close(net(x, context), expected.flatten(1), rtol=1e-12, atol=1e-12)
    for copied in COPIES:
        assert torch.equal(copied(net)(x, context), net(x, context))


@pytest.mark.parametrize("case", NETWORKS, ids=name)
def test_the_plan_is_the_same_network(case):
    """Its matrices are sorted by degree, and masked by ``ends``."""
    torch.manual_seed(0)
    net = network(case, context_activation=case["residual"])
    x, context = torch.randn(6, net.features, dtype=F64), contexts(net, 6)
    with torch.no_grad():
        plan, (added, gates) = net.plan(), net.context_terms(context)
        expected = net.in_order(x, context)
    assert plan.ends.shape == (len(plan.widths), net.features) and plan.ends[:, -1].tolist() == plan.widths
    sizes = [net.features, *plan.widths, net.features * net.outputs_per_feature]
    matrices = plan.weights.split([a * b for a, b in zip(sizes, sizes[1:], strict=False)])
    matrices = [m.view(b, a) for m, a, b in zip(matrices, sizes, sizes[1:], strict=False)]
    ends = [torch.arange(net.features), *plan.ends]  # of x, feature k has degree k + 1
    rows = [*plan.ends, net.outputs_per_feature * (1 + torch.arange(net.features))]
    for matrix, columns, of_row in zip(matrices, ends, rows, strict=True):
        for k in range(net.features):
            assert (matrix[: of_row[k], columns[k] :] == 0).all()
    act, gated, outputs, u = ACTIVATIONS[case["activation"]], 0, [x], x
    terms = added.split(sizes[1:], dim=-1)
    for matrix, term, flags in zip(matrices, terms, plan.layers, strict=True):
        u = (act(u) if flags & BEFORE else u) @ matrix.T + term
        if flags & GATE:
            u = u * gates[:, gated : gated + u.shape[1]]
            gated += u.shape[1]
        u = act(u) if flags & AFTER else u
        u = u + outputs[-2] if flags & SKIP else u
        outputs.append(u)
    assert gates is None or gated == gates.shape[1]
    torch.testing.assert_close(u, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("low, high", [(0, 0), (1, 5), (0, 5), (1, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 20, 23])
def test_degrees_are_spread_evenly(count, low, high):
    found, values = spread(count, low, high), high - low + 1
    assert found.shape == (count,) and (found.diff() >= 0).all() and found[0] == low
    times = torch.bincount(found - low, minlength=values)
    assert len(times) == values and times.max() - times.min() <= 1
    if count > 1:
        assert found[-1] == high
    if 1 < count < values:
        assert found.diff().max() - found.diff().min() <= 1


def test_zeros_at_the_start():
    for residual in (False, True):
        net = MaskedNetwork(4, 3, (8, 8), residual=residual)
        assert not net(torch.randn(5, 4)).any()
    assert 0 < net.layers[2].weight.abs().max() <= 1e-3


def test_another_order_is_that_of_the_next_pass():
    net = MaskedNetwork(3, 2, (6,), order="reverse")
    with torch.no_grad():
        assert net.one_pass()[0].order is net.order
        net.order = net.order[[1, 0, 2]]
        assert net.one_pass()[0].order is net.order and net.plan().order is net.order


def test_kept_weights_follow_the_parameters():
    net = trained(3, 2, (6, 6))
    x = torch.randn(5, 3, dtype=F64)
    with torch.no_grad():
        net(x)
        structure = net._structure()
        assert net._weights(structure) is net._weights(structure) and net.plan().weights is net.plan().weights
        assert net.context_terms()[0] is net.context_terms()[0]

        def changes(change):
            before, plan, biases = net(x), net.plan().weights, net.context_terms()[0]
            assert net.one_pass()[0].weights is plan and net.one_pass()[1] is biases
            change()
            assert torch.equal(net.one_pass()[0].weights, net.plan().weights)
            assert torch.equal(net.one_pass()[1], net.context_terms()[0])
            assert not torch.equal(net(x), before) and net.plan().weights is not plan
            assert net.context_terms()[0] is not biases
            fresh = copy.deepcopy(net)
            assert torch.equal(fresh(x), net(x)) and torch.equal(fresh.plan().weights, net.plan().weights)

        changes(lambda: net.layers[1].weight.mul_(1.5))
        changes(lambda: net.layers[1].bias.add_(0.5))
        changes(
            lambda: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()} | kept_buffers(net))
        )
        changes(lambda: setattr(net.layers[0], "weight", nn.Parameter(torch.randn(6, 3, dtype=F64))))
        changes(lambda: (net.layers[2].weight.data.mul_(2), net.eval()))
        plan = net.plan()
        net.float()
        assert (
            net(x.float()).dtype == torch.float32
            and net.plan().weights.dtype == torch.float32 != plan.weights.dtype
        )
    with torch.inference_mode():
        net.plan()
    net.requires_grad_(False)
    leaf = x.float().requires_grad_()
    net(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


def kept_buffers(net):
    return dict(net.named_buffers())


def test_gradients_of_weights_are_masked_and_recorded():
    net = trained(3, 2, (6, 6))
    with torch.no_grad():
        net(torch.randn(2, 3, dtype=F64)), net.plan()
    net(torch.randn(5, 3, dtype=F64)).square().sum().backward()
    for layer, mask in zip(net.layers, net._structure().masks, strict=True):
        assert layer.weight.grad.abs().sum() > 0
        assert (layer.weight.grad[mask == 0] == 0).all()
    assert net.plan().weights.requires_grad


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("widths", [(256, 256), (512, 600)])
def test_blocks_of_the_matrices(widths, given):
    """Wide layers skip blocks of masked columns if their units are sorted; results differ by rounding."""
    torch.manual_seed(0)
    degrees = [torch.randint(1, 20, (w,)) for w in widths] if given else None
    net = trained(20, 30, widths, degrees=degrees)
    blocks = net._structure().blocks
    assert [b is not None for b in blocks] == [False, not given, not given]
    if not given:
        assert len(blocks[1]) == (2 if widths[0] == 256 else 4)
        used = sum((b - a) * end for a, b, end in blocks[1])
        assert 0.5 * widths[0] * widths[1] < used < 0.8 * widths[0] * widths[1]
    x = torch.randn(64, 20, dtype=F64, requires_grad=True)
    results = []
    for rows in (slice(0, 64), slice(0, 63)):  # fewer samples take whole products
        h = net(x[rows])
        results.append((h[:63], *torch.autograd.grad(h[:63].square().sum(), [x, *net.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-9)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    net = trained(3, 2, (6, 6), residual=True, context_features=2, order="random")
    x, context = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), net(x, context))
    torch._dynamo.reset()


@pytest.mark.parametrize("residual", [False, True])
def test_dropout(residual):
    torch.manual_seed(0)
    net = trained(4, 2, (32, 32), residual=residual, dropout=0.5).train()
    x = torch.randn(8, 4, dtype=F64)
    assert (net(x) - net(x)).abs().max() > 1e-3
    factors = net.drawn(x)
    assert [f is not None for f in factors] == (
        [False, False, True, False] if residual else [False, True, True]
    )
    assert {v.item() for f in factors if f is not None for v in f.unique()} == {0.0, 2.0}
    assert torch.equal(net.in_order(x, None, factors), net.in_order(x, None, factors))
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        states.append(net(x))
    assert torch.equal(*states)
    net.eval()
    assert torch.equal(net(x), net(x))
    expected = net(x)
    mean = torch.stack([net.train()(x) for _ in range(4000)]).mean(0)
    if residual:  # the dropped layer is the last of its block, so the output is linear in it
        torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.15)


def test_nothing_but_the_context():
    """With one feature, all units depend on the context only, and without one they are constant."""
    for context_features in (None, 2):
        net = trained(1, 3, (4, 4), context_features=context_features)
        x, context = torch.randn(6, 1, dtype=F64), contexts(net, 6)
        assert torch.equal(net(x, context), net(x + 1, context))
    assert (net(x, context) - net(x, context + 1)).abs().min() > 0


def test_tensors_without_values():
    net, x = trained(4, 2, (8, 8)).float(), torch.randn(3, 4)
    with torch.device("meta"):
        other = MaskedNetwork(4, 2, (8, 8))
        assert other(torch.randn(3, 4)).shape == (3, 8) and other.plan().weights.is_meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert net(torch.randn(3, 4)).shape == (3, 8)
    with torch.no_grad():
        expected = net(x)
        other.to_empty(device="cpu").load_state_dict(net.state_dict())
        assert torch.equal(other(x), expected)
        assert torch.equal(torch.func.functional_call(other, dict(net.named_parameters()), (x,)), expected)


def test_an_empty_batch():
    assert trained(3, 2, (4,))(torch.empty(0, 3, dtype=F64)).shape == (0, 6)


def test_the_order_is_in_the_state_dict():
    torch.manual_seed(0)
    nets = [trained(7, 1, (9,), order="random") for _ in range(2)]
    assert not torch.equal(nets[0].order, nets[1].order)
    x = torch.randn(4, 7, dtype=F64)
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[0](x), nets[1](x))
    assert "order" not in MaskedNetwork(3, 1, (4,)).state_dict()
    assert MaskedNetwork(3, 1, (4,), order=[2, 0, 1]).order.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MaskedNetwork(3, 2, (4,), residual=True), "hidden: got (4,), expected 2 or more"),
        (lambda: MaskedNetwork(3, 2, ()), "hidden: got (), expected 1 or more positive integers"),
        (lambda: MaskedNetwork(3, 2, (4, 0)), "hidden: got (4, 0), expected 1 or more positive integers"),
        (lambda: MaskedNetwork(3, 2, order=[0, 1]), "order: got [0, 1], expected each of 0 to 2 once"),
        (lambda: MaskedNetwork(3, 2, order="up"), "order: got 'up', expected one of 'reverse', 'random'"),
        (lambda: MaskedNetwork(3, 2, activation=F.relu), "activation: got <function relu"),
        (lambda: MaskedNetwork(3, 2, dropout=1.0), "dropout: got 1.0, expected a number from 0 to below 1"),
        (lambda: MaskedNetwork(3, 2, (4,), degrees=[[1, 2, 3, 1]]), "degrees[0]: got [1, 2, 3, 1], expected"),
        (
            lambda: MaskedNetwork(3, 2, (2, 2), degrees=[[1, 2]]),
            "degrees: got 1 sequences, expected for each",
        ),
        (
            lambda: MaskedNetwork(3, 2, (2, 1), residual=True, degrees=[[1, 2], [1], [2, 1]]),
            "degrees[2]: got [2, 1], expected the degrees of the block's input",
        ),
        (lambda: MaskedNetwork(3, 2)(torch.zeros(2, 4)), "x: got shape [2, 4], expected [2, 3]"),
        (
            lambda: MaskedNetwork(3, 2, (4,), context_features=2)(torch.zeros(2, 3)),
            "context: got None, expected [2, 2]",
        ),
        (
            lambda: MaskedNetwork(3, 2, (4,))(torch.zeros(2, 3), torch.zeros(2, 1)),
            "context: got a tensor of shape [2, 1], expected None: the network has no context_features",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()
