"""fastflow::residual_network and its gradients: against networks of torch.nn."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fastflow
from fastflow import ops
from fastflow.ops.residual_network.spec import parameters_of
from tests.support.cases import STATIC, TRACED

FUNCTIONS = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "silu": nn.SiLU(), "elu": nn.ELU()}
OP = torch.ops.fastflow.residual_network.default
BACKWARD = torch.ops.fastflow.residual_network_backward.default


class Network(nn.Module):
    """The network as one writes it in PyTorch."""

    def __init__(self, features, contexts, hidden, outputs, blocks, activation, batch_norm, momentum=0.1):
        super().__init__()
        self.f, self.batch_norm = FUNCTIONS[activation], batch_norm
        self.first = nn.Linear(features + (contexts or 0), hidden)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            layers = []
            for _ in range(2):
                norm = nn.BatchNorm1d(hidden, eps=1e-3, momentum=momentum) if batch_norm else nn.Identity()
                layers += [norm, nn.Linear(hidden, hidden)]
            layers += [nn.Linear(contexts, hidden)] if contexts else []
            self.blocks.append(nn.ModuleList(layers))
        self.last = nn.Linear(hidden, outputs)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))
        for m in self.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)

    def forward(self, x, context=None):
        h = self.first(x if context is None else torch.cat([x, context], 1))
        for norm0, linear0, norm1, linear1, *gate in self.blocks:
            t = linear1(self.f(norm1(linear0(self.f(norm0(h))))))
            h = h + (t * torch.sigmoid(gate[0](context)) if gate else t)
        return self.last(h)

    def by_op(self, x, context=None):
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm1d)]
        running = [] if self.training else [v for m in norms for v in (m.running_mean, m.running_var)]
        return ops.residual_network(
            x,
            context,
            list(self.parameters()),
            blocks=len(self.blocks),
            activation=next(k for k, f in FUNCTIONS.items() if f is self.f),
            batch_norm=self.batch_norm,
            running=running,
            eps=1e-3,
        )[0]


def results(call, x, context, parameters):
    """y, and gradients by x, the context and the parameters."""
    given = [v for v in (x, context) if v is not None]
    y = call(*(v.requires_grad_() for v in given))
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((weights * y).sum(), [*given, *parameters])]


def assert_near(found, wanted, tolerance):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = (a - b).abs().max() / (1 + b.abs().max())
        assert error <= tolerance, f"result {i}: {error:.1e}"


# samples, features, context features, hidden units, outputs, blocks: rows that fill no tile, sums in two parts
SIZES = ((37, 3, 2, 17, 5, 2), (1100, 1, None, 7, 3, 1), (16, 2, 4, 5, 1, 0), (130, 5, None, 250, 3, 1))


@pytest.mark.parametrize("mode", ["none", "batch", "running"])
@pytest.mark.parametrize("sizes, activation", list(zip(SIZES, FUNCTIONS, strict=True)))
def test_values_and_gradients(sizes, activation, mode):
    torch.manual_seed(0)
    n, features, contexts, hidden, outputs, blocks = sizes
    net = Network(features, contexts, hidden, outputs, blocks, activation, mode != "none").double()
    net.train(mode == "batch")
    x = torch.randn(n, features, dtype=torch.float64)
    context = torch.randn(n, contexts, dtype=torch.float64) if contexts else None
    wanted = results(net, x, context, list(net.parameters()))
    assert_near(results(net.by_op, x, context, list(net.parameters())), wanted, 1e-12)
    with torch.no_grad():  # nothing is kept
        assert_near([net.by_op(*(v for v in (x, context) if v is not None))], wanted[:1], 1e-12)


@pytest.mark.parametrize("mode", ["none", "batch", "running"])
def test_float32_rounds_as_pytorch(mode):
    torch.manual_seed(0)
    net = Network(3, 2, 20, 4, 2, "relu", mode != "none").train(mode == "batch")
    x, context = torch.randn(200, 3), torch.randn(200, 2)
    plain, found = (results(f, x, context, list(net.parameters())) for f in (net, net.by_op))
    exact = results(net.double(), x.double(), context.double(), list(net.parameters()))
    for i, (a, b, truth) in enumerate(zip(found, plain, exact, strict=True)):
        scale = 1 + truth.abs().max()
        own, error = ((v.double() - truth).abs().max() / scale for v in (b, a))
        assert error <= max(2 * own, 1e-5), f"result {i}: {error:.1e}, PyTorch {own:.1e}"


@pytest.mark.parametrize("batch_norm", [False, True])
def test_backward_computes_what_was_not_kept(batch_norm):
    torch.manual_seed(0)
    parameters = parameters_of(3, 2, 7, 4, 2, batch_norm, torch.float64)
    x, context, dy = (torch.randn(20, k, dtype=torch.float64) for k in (3, 2, 4))
    options = 2, "relu", batch_norm, 1e-3
    _, hidden, statistics = OP(x, context, parameters, [], *options, True, True)
    empty = x.new_empty(0)
    kept, again = (
        BACKWARD(x, context, parameters, [], *values, *options, True, dy)
        for values in ((hidden, statistics), (empty, empty))
    )
    assert hidden.shape == (9, 20, 7) and statistics.numel() == (56 if batch_norm else 0)
    assert_near(kept, again, 1e-14)


def test_statistics():
    torch.manual_seed(0)
    parameters = parameters_of(3, None, 7, 4, 1, True, torch.float64)
    x = 100 + torch.randn(50, 3, dtype=torch.float64)
    _, statistics = ops.residual_network(x, None, parameters, blocks=1, batch_norm=True)
    h = nn.functional.linear(x, *parameters[:2])
    torch.testing.assert_close(statistics[:2], torch.stack([h.mean(0), h.var(0, correction=0)]))
    assert statistics.shape == (4, 7) and not statistics.requires_grad


@pytest.mark.parametrize("mode", ["none", "batch"])
def test_derivatives(mode):
    torch.manual_seed(0)
    parameters = parameters_of(2, 1, 3, 2, 1, mode == "batch", torch.float64)
    x, context = (torch.randn(16, k, dtype=torch.float64) for k in (2, 1))
    values = [v.requires_grad_() for v in (x, context, *parameters)]

    def f(x, context, *parameters):
        options = {"blocks": 1, "activation": "tanh", "batch_norm": mode == "batch"}
        return ops.residual_network(x, context, parameters, **options)[0]

    first, recorded = (
        torch.autograd.grad(f(*values).square().sum(), values, create_graph=graph) for graph in (False, True)
    )
    assert_near(first, recorded, 1e-12)
    assert gradcheck(f, values, fast_mode=True)
    assert gradgradcheck(f, values, fast_mode=True)
    assert gradcheck(f, values, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


def test_registration_and_compile():
    torch.manual_seed(0)
    parameters = [p.requires_grad_() for p in parameters_of(2, 1, 3, 2, 1, True, torch.float64)]
    x, context = (torch.randn(16, k, dtype=torch.float64).requires_grad_() for k in (2, 1))
    args = x, context, parameters, [], 1, "relu", True, 1e-3, True, True
    torch.library.opcheck(OP, args, test_utils=(*STATIC, *TRACED))

    def f(x, context, *parameters):
        return ops.residual_network(x, context, parameters, blocks=1, batch_norm=True)[0].square().sum()

    values = x, context, *parameters
    wanted = torch.autograd.grad(f(*values), values)
    found = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*values), values)
    torch.testing.assert_close(found, wanted)


def test_vmap_over_networks():
    torch.manual_seed(0)
    networks = [parameters_of(2, None, 3, 2, 1, False, torch.float64) for _ in range(3)]
    x = torch.randn(16, 2, dtype=torch.float64)
    stacked = [torch.stack(p) for p in zip(*networks, strict=True)]

    def f(parameters):
        return ops.residual_network(x, None, parameters, blocks=1)[0]

    torch.testing.assert_close(torch.func.vmap(f)(stacked), torch.stack([f(p) for p in networks]))
    per_network = torch.func.vmap(torch.func.grad(lambda p: f(p).square().sum()))(stacked)
    for i, p in enumerate(networks):
        leaves = [v.requires_grad_() for v in p]
        wanted = torch.autograd.grad(f(leaves).square().sum(), leaves)
        torch.testing.assert_close(tuple(g[i] for g in per_network), wanted)


def test_layouts_empty_batches_and_few_samples():
    torch.manual_seed(0)
    parameters = parameters_of(3, None, 7, 4, 1, False, torch.float64)
    parameters[2] = parameters[2].mT.contiguous().mT
    both = torch.randn(40, 6, dtype=torch.float64)
    for x in (both[:, ::2], both[:0, :3], both[:1, :3], both[::2, :3], both[:1, :3].expand(20, 3)):
        y, _ = ops.residual_network(x, None, parameters, blocks=1)
        with fastflow.backend("reference"):
            wanted, _ = ops.residual_network(x, None, parameters, blocks=1)
        torch.testing.assert_close(y, wanted)
