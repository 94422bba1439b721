"""Residual flows and their networks: bounds, inverses, estimators of the log-det and of its gradient, other libraries, errors."""

import math
import re

import pytest
import torch
from torch import nn

from fastflow import nn as fnn
from fastflow.nn import LipschitzConv2d, LipschitzConvNet, LipschitzLinear, LipschitzMLP, LipSwish, Residual
from tests.support.cases import jacobian_log_det, randomize

F64 = torch.float64


def trained(net, std=0.5) -> nn.Module:
    """A network with random weights, whose norms are known."""
    net = randomize(net, std=std).double()
    for layer in net.modules():
        if hasattr(layer, "update_norm"):
            layer.update_norm(1e-8)
    return net.eval()


def mlp(features=3, **options) -> nn.Module:
    return trained(LipschitzMLP(features, (7, 6), **options))


def dense(layer: LipschitzConv2d, weight: torch.Tensor) -> torch.Tensor:
    """The map of whole images as a matrix."""
    shape = layer.vectors.shape[1:]
    basis = torch.eye(shape.numel(), dtype=weight.dtype).view(-1, *shape)
    return nn.functional.conv2d(basis, weight, padding=layer.padding).flatten(1).T


def norms(net) -> list[tuple[float, float]]:
    """The true norm of each layer's map, and its bound."""
    found = []
    for layer in net.modules():
        if isinstance(layer, (LipschitzLinear, LipschitzConv2d)):
            weight = layer.bounded_weight().detach()
            matrix = weight if weight.ndim == 2 else dense(layer, weight)
            found.append((torch.linalg.matrix_norm(matrix, 2).item(), layer.bound))
    return found


# bounds -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: LipschitzLinear(5, 8, 0.7),
        lambda: LipschitzLinear(1, 1, 0.7),
        lambda: LipschitzConv2d(2, 3, 3, (5, 4), 0.7),
        lambda: LipschitzConv2d(3, 2, 1, (2, 3), 0.7),
        lambda: LipschitzConv2d(1, 4, 5, (3, 7), 0.7),
    ],
)
def test_the_norm_is_the_true_one(make):
    layer = trained(make(), std=2.0)
    matrix = layer.weight if layer.weight.ndim == 2 else dense(layer, layer.weight)
    true = torch.linalg.matrix_norm(matrix, 2)
    assert true > 0.7
    found = layer._norm(layer.weight)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=0)
    # not the norm of the kernel as a matrix, which is no bound for a convolution
    torch.testing.assert_close(layer.bounded_weight(), layer.weight * (0.7 / 1.01 / true), rtol=1e-5, atol=0)
    with torch.no_grad():
        layer.weight.mul_(0.5 / true)
    assert torch.equal(layer.bounded_weight(), layer.weight)


def test_the_norm_of_the_kernel_as_a_matrix_is_no_bound():
    layer = LipschitzConv2d(1, 1, 3, (8, 8), 0.9).double()
    with torch.no_grad():
        layer.weight.fill_(0.3)  # as a matrix, its norm is 0.9
    layer.update_norm(1e-8)
    assert torch.linalg.matrix_norm(dense(layer, layer.weight), 2) > 2.3
    assert norms(layer)[0][0] <= 0.9


def test_smaller_images_have_smaller_norms():
    layer = trained(LipschitzConv2d(2, 2, 3, (6, 6), 0.9), std=1.0)
    x = torch.randn(1, 2, 3, 5, dtype=F64)
    y = nn.functional.conv2d(x, layer.bounded_weight(), padding=1)
    assert y.norm() <= 0.9 * x.norm()
    torch.testing.assert_close(layer(x), y + layer.bias[:, None, None], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=re.escape("x: got shape [1, 2, 7, 6], expected images of 6x6")):
        layer(torch.zeros(1, 2, 7, 6, dtype=F64))
    with pytest.raises(ValueError, match="max_iterations: got 0, expected a positive integer"):
        layer.update_norm(max_iterations=0)


@pytest.mark.parametrize("activation", [LipSwish, nn.ELU])
def test_slopes_of_activations(activation):
    x = torch.linspace(-200, 200, 40_001, dtype=F64, requires_grad=True)
    for beta in (-3.0, 0.5, 4.0):
        layer = activation().double()
        if activation is LipSwish:
            with torch.no_grad():
                layer.raw_beta.fill_(beta)
            b = math.log1p(math.exp(beta))
            torch.testing.assert_close(layer(x), x * torch.sigmoid(b * x) / 1.1, rtol=1e-12, atol=1e-15)
        (slope,) = torch.autograd.grad(layer(x).sum(), x)
        assert 0.99 < slope.abs().max() <= 1


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: LipschitzMLP(2, (16, 16), lipschitz=0.9), (2,)),
        (lambda: LipschitzMLP(2, (16,), lipschitz=0.97, activation="elu"), (2,)),
        (lambda: LipschitzConvNet(2, (4, 4), 6, lipschitz=0.9), (2, 4, 4)),
    ],
)
def test_bounds_hold_at_every_step_of_a_training(make, shape):
    """In training mode, and in eval mode after a step of the optimizer; learning rates are large."""
    torch.manual_seed(0)
    net = make()
    flow = Residual(net, exact_terms=2, log_det="roulette")
    x = 0.2 * torch.randn(64, *shape)  # far from the prior, so that norms grow to their bounds
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    largest = 0.0
    for _ in range(100):
        z, log_det = flow.train()(x)
        for norm, bound in norms(net):
            assert norm <= bound, norm / bound
            largest = max(largest, norm / bound)
        loss = (0.5 * z.square().flatten(1).sum(1) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        flow.eval()(x[:1])
        for norm, bound in norms(net):
            assert norm <= bound, norm / bound
    assert largest > 0.98  # the bounds are reached


# inverse ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lipschitz", [0.3, 0.9, 0.97])
@pytest.mark.parametrize("activation", ["lipswish", "elu"])
def test_the_inverse_from_every_point(lipschitz, activation):
    """Also from points far away and from equal ones; samples have their own numbers of iterations."""
    flow = Residual(mlp(3, lipschitz=lipschitz, activation=activation))
    z = torch.randn(50, 3, dtype=F64) * torch.logspace(-3, 3, 50, dtype=F64)[:, None]
    z[-5:] = 0
    x, log_det = flow.inverse(z)
    torch.testing.assert_close(x + flow.net(x), z, rtol=1e-11, atol=1e-11)
    back, _ = flow.inverse(flow(z)[0])
    torch.testing.assert_close(back, z, rtol=1e-8, atol=1e-8)
    counts = flow.inverse_iterations
    assert counts.shape == (50,) and counts.min() >= 1 and (counts[-5:] == counts[-1]).all()
    assert counts.unique().numel() > 1
    torch.testing.assert_close(log_det, -jacobian_log_det(lambda v: v + flow.net(v), x), rtol=1e-9, atol=1e-9)


def test_converged_samples_cost_nothing():
    sizes = []

    class Counted(nn.Module):
        def forward(self, x, context):
            sizes.append(len(x))
            assert len(context) == len(x)
            return context * x

    flow = Residual(Counted(), log_det="exact").double()
    slopes = torch.tensor([[0.0], [0.1], [0.9]], dtype=F64)
    z = torch.ones(3, 1, dtype=F64)
    with torch.no_grad():
        x, _ = flow.inverse(z, slopes)
    torch.testing.assert_close(x, 1 / (1 + slopes), rtol=1e-14, atol=0)
    counts = flow.inverse_iterations.tolist()
    assert counts[0] == 1 and 10 < counts[1] < 30 and 200 < counts[2] < 500
    assert sizes[:-1] == [sum(c >= i for c in counts) for i in range(1, counts[2] + 1)]


class Times(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=F64))

    def forward(self, x):
        return self.slope * x


@pytest.mark.parametrize(
    "net, said",
    [
        (Times(1.5), "a step that is 1.5 times the one before"),
        (Times(-1.5), "a step that is 1.5 times the one before"),
        (Times(1.0), "2 samples that moved after 30 iterations"),
        (Times(0.999), "2 samples that moved after 30 iterations"),
        (Times(float("nan")), "a step that is nan times the one before"),
    ],
)
def test_no_contraction_is_an_error(net, said):
    flow = Residual(net, max_iterations=30)
    with pytest.raises(RuntimeError, match=f"net: got {said}, expected a contraction"):
        flow.inverse(torch.ones(2, 3, dtype=F64))


def test_samples_that_are_not_finite():
    flow = Residual(mlp())
    z = torch.randn(4, 3, dtype=F64)
    expected, _ = flow.inverse(z)
    z[1, 0], z[2, 2] = torch.nan, torch.inf
    x, _ = flow.inverse(z)
    assert not x[1:3].isfinite().all(1).any()
    torch.testing.assert_close(x[[0, 3]], expected[[0, 3]])
    assert flow(z[:0])[0].shape == flow.inverse(z[:0])[0].shape == (0, 3)


def test_derivatives_of_the_inverse_by_a_context():
    flow = Residual(mlp(2, context_features=3), log_det="exact")
    z, context = (torch.randn(4, d, dtype=F64, requires_grad=True) for d in (2, 3))
    flow.check(z.detach(), context.detach())
    fnn.Inverse(flow).check(z.detach(), context.detach())
    x, _ = flow.inverse(z, context)
    with pytest.raises(RuntimeError, match="create_graph: got True, expected False"):
        torch.autograd.grad(x.sum(), z, create_graph=True)


# log-det ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, shape", [
    (lambda: mlp(1), (1,)),
    (lambda: mlp(3), (3,)),
    (lambda: mlp(5, activation="elu"), (5,)),
    (lambda: trained(LipschitzConvNet(2, (2, 3), 4)), (2, 2, 3)),
])  # fmt: skip
def test_the_exact_log_det(make, shape):
    net = make()
    x = torch.randn(4, *shape, dtype=F64)
    expected = jacobian_log_det(lambda v: v + net(v), x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(Residual(net, log_det="exact")(x)[1], expected, rtol=1e-9, atol=1e-9)
    few = math.prod(shape) <= 4
    auto, other = (Residual(net, log_det=how).eval() for how in ("auto", "exact" if few else "roulette"))
    assert torch.equal(auto(x)[1], other(x)[1])


class Matrix(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x):
        return x @ self.matrix.T


@pytest.mark.parametrize("terms", [1, 2, 3, 8])
def test_the_series_of_a_diagonal(terms):
    """Signs give the trace of a diagonal matrix exactly, and so its gradient."""
    slopes = torch.tensor([0.5, -0.3, 0.1], dtype=F64)
    flow = Residual(Matrix(torch.diag(slopes)), log_det="series", terms=terms).train()
    x = torch.randn(4, 3, dtype=F64)
    _, log_det = flow(x)
    orders = torch.arange(1, terms + 1)[:, None]
    expected = ((-1.0) ** (orders + 1) * slopes**orders / orders).sum()
    torch.testing.assert_close(log_det, expected.expand(4), rtol=1e-13, atol=1e-13)
    log_det.mean().backward()
    slope = ((-slopes) ** (orders - 1)).sum(0)
    torch.testing.assert_close(flow.net.matrix.grad.diagonal(), slope, rtol=1e-13, atol=1e-13)


def mean_and_error(draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


CALLS, ROWS = 500, 40  # 20,000 draws of the noise; the draws of a call share their number of terms


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_roulette_is_unbiased(noise):
    """Values, and gradients of x and of a weight, against the exact ones: within 4 standard errors."""
    torch.manual_seed(0)
    net = mlp(3, lipschitz=0.8)
    x = torch.randn(1, 3, dtype=F64).expand(ROWS, 3).clone().requires_grad_()
    variables = [x, net.layers[1].weight]
    exact = Residual(net, log_det="exact")(x)[1]
    expected = [exact[0].detach()]
    dx, dweight = torch.autograd.grad(exact.mean(), variables)
    expected += [dx.sum(0), dweight.flatten()]
    flow = Residual(net, log_det="roulette", noise=noise, exact_terms=1).train()
    net.eval()  # its norms do not move
    values, gradients, weights = [], [], []
    for _ in range(CALLS):
        _, log_det = flow(x)
        dx, dweight = torch.autograd.grad(log_det.mean(), variables)
        values.append(log_det.detach().mean())
        gradients.append(dx.sum(0))
        weights.append(dweight.flatten())
    for draws, right in zip((values, gradients, weights), expected, strict=True):
        mean, error = mean_and_error(torch.stack(draws))
        assert ((mean - right).abs() <= 4 * error).all()
        assert (right.abs() > 8 * error).any()  # the errors are small enough to see a bias


def test_the_series_has_the_mean_of_its_terms():
    torch.manual_seed(0)
    net = mlp(3, lipschitz=0.8)
    x = torch.randn(1, 3, dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v)[0], x)[:, 0]
    powers = [torch.linalg.matrix_power(jacobian, k).trace() for k in (1, 2, 3)]
    flow = Residual(net, log_det="series", terms=3).train()
    net.eval()
    with torch.no_grad():
        mean, error = mean_and_error(flow(x.expand(20_000, 3))[1])
    assert abs(mean - (powers[0] - powers[1] / 2 + powers[2] / 3)) <= 4 * error
    assert abs(powers[2] / 3) > 0


def test_eval_mode_repeats_its_numbers():
    net = mlp(6)
    flow = Residual(net, log_det="roulette").eval()
    x = torch.randn(5, 6, dtype=F64)
    z, log_det = flow(x)
    state = torch.get_rng_state()
    assert torch.equal(flow(x)[1], log_det)
    torch.testing.assert_close(flow(x[:2])[1], log_det[:2], rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(flow.inverse(z)[1], -log_det, rtol=1e-10, atol=1e-10)
    other = Residual(net, log_det="roulette", seed=1).eval()(x)[1]
    assert (other != log_det).all()
    flow.train()
    assert not torch.equal(flow(x)[1], flow(x)[1])
    exact = Residual(net, log_det="exact")(x)[1]
    assert (log_det - exact).abs().max() < 1  # of one draw


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("by_autograd", [False, True])
def test_products_and_memory_do_not_grow_with_the_terms(graph, by_autograd):
    """n terms: n products. The bytes stored for backward are those of one term."""
    net, x = mlp(8), torch.randn(16, 8, dtype=F64)
    counted_in, name = (torch.autograd, "grad") if by_autograd else (net.layers[0], "_map")
    net = nn.Sequential(net) if by_autograd else net  # a network of another kind
    stored = []
    for terms in (2, 4, 32):
        flow, products = Residual(net, log_det="series", terms=terms).train(), []
        net.eval()
        pulled = getattr(counted_in, name)

        def counted(*args, pulled=pulled, products=products, **kwargs):
            products.append(1)
            return pulled(*args, **kwargs)

        sizes = []
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
            ),
        ):
            if not by_autograd:
                patch.setattr(counted_in, "update_norm", lambda **_: None)  # it maps vectors too
            patch.setattr(counted_in, name, counted)
            with torch.set_grad_enabled(graph):
                flow(x)
        assert len(products) == terms
        stored.append(sum(sizes))
    assert stored[0] == stored[1] == stored[2] and bool(stored[0]) == (graph or by_autograd)


@pytest.mark.parametrize("make, shape", [
    (lambda: mlp(3, activation_first=True), (3,)),
    (lambda: mlp(2, activation="elu", context_features=2), (2,)),
    (lambda: trained(LipschitzConvNet(2, (2, 3), 4, activation_first=True)), (2, 2, 3)),
])  # fmt: skip
@pytest.mark.parametrize("log_det", ["exact", "roulette"])
def test_products_without_autograd(make, shape, log_det):
    """Values, gradients and second derivatives are those of a network that is differentiated by autograd."""
    net, other = make(), nn.ModuleList()
    x = torch.randn(4, *shape, dtype=F64, requires_grad=True)
    context = torch.randn(4, 2, dtype=F64) if getattr(net, "context_features", None) else None

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, *args):
            return self.inner(*args)

    found = []
    for other in (net, Hidden()):
        flow = Residual(other, log_det=log_det).eval()
        z, log_det_ = flow(x, context)
        variables = [x, *net.parameters()]
        first = torch.autograd.grad(
            log_det_.sum() + z.square().sum(), variables, create_graph=log_det == "exact", allow_unused=True
        )
        found.append([z, log_det_, *first])
        if log_det == "exact":
            again = torch.autograd.grad(
                sum(g.square().sum() for g in first if g is not None), variables, allow_unused=True
            )
            found[-1] += again
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None or b is not None]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert sum(bool(a.abs().sum() > 0) for a, _ in pairs) > 0.8 * len(pairs)


# other libraries --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def normflows_residual():
    return pytest.importorskip("normflows.flows.residual")


def test_normflows_exact(normflows_residual):
    net = mlp(2)
    other = normflows_residual.Residual(net, brute_force=True).double()
    x = torch.randn(6, 2, dtype=F64)
    z, log_det = Residual(net)(x)
    theirs = other.inverse(x)
    torch.testing.assert_close((z, log_det), (theirs[0], -theirs[1].neg()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n_power_series", [None, 5])
def test_normflows_series_and_roulette(normflows_residual, n_power_series, monkeypatch):
    """The same Gaussian noise and number of terms. Its number of terms is one or more beyond the exact ones."""
    net, x = mlp(5), torch.randn(6, 5, dtype=F64)
    other = normflows_residual.Residual(
        net, n_power_series=n_power_series, reduce_memory=False, n_exact_terms=2
    ).double()
    further = 3
    monkeypatch.setattr(
        normflows_residual, "geometric_sample", lambda p, n: torch.tensor([1 + further]).numpy()
    )
    how = (
        {"log_det": "roulette", "exact_terms": 3}
        if n_power_series is None
        else {"log_det": "series", "terms": 5}
    )
    flow = Residual(net, noise="gaussian", **how).train()
    monkeypatch.setattr(flow, "_further_terms", lambda: further)
    net.eval(), torch.manual_seed(3)
    z, log_det = flow(x)
    torch.manual_seed(3)
    theirs = other.inverse(x)
    torch.testing.assert_close(theirs[0], z, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(theirs[1], log_det, rtol=1e-8, atol=1e-8)


# errors -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Residual(torch.tanh), "net: got <built-in method tanh"),
        (lambda: Residual(nn.Tanh(), log_det="trace"), "log_det: got 'trace', expected one of"),
        (
            lambda: Residual(nn.Linear(3, 2))(torch.randn(2, 3)),
            "net's output: got shape [2, 2], expected [2, 3]",
        ),
        (lambda: LipschitzMLP(2, lipschitz=1.0), "lipschitz: got 1.0, expected a number between 0 and 1"),
        (lambda: LipschitzConv2d(1, 1, 2, (4, 4)), "kernel_size: got 2, expected an odd number"),
        (lambda: LipschitzMLP(2)(torch.randn(2, 2), torch.randn(2, 2)), "context: got a tensor of"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


def test_a_chain_stored_and_reversible():
    def chain(reversible):
        torch.manual_seed(0)
        flows = [f for _ in range(2) for f in (fnn.ActNorm(3), Residual(LipschitzMLP(3, (6,))))]
        return randomize(fnn.Sequential(*flows, reversible=reversible), std=0.3).double()

    x, found = torch.randn(5, 3, dtype=F64), []
    for reversible in (False, True):
        flow = chain(reversible)
        z, log_det = flow(x)
        (z.square().sum() - log_det.sum()).backward()
        found.append([z, log_det, *(p.grad for p in flow.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


# torch.compile ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_compiled(training):
    """The norms iterate until convergence outside of the graph, so bounds hold; all numbers are eager's."""
    torch._dynamo.reset()
    x = torch.randn(4, 3, dtype=F64)
    flows = []
    for _ in range(2):
        torch.manual_seed(0)
        net = randomize(LipschitzMLP(3, (6, 5)), std=0.8)  # whose norms are not known
        flows.append(Residual(net, log_det="exact").double().train(training))
    eager, other = flows
    compiled = torch.compile(other, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.state_dict(), eager.state_dict(), rtol=1e-12, atol=1e-12)
    found = norms(other.net)
    assert all(norm <= bound for norm, bound in found) and max(n / b for n, b in found) > 0.98
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="number of power iterations depends on values"):
        torch.compile(lambda v: eager(v), backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_second_derivatives_by_finite_differences():
    flow = Residual(mlp(2), log_det="exact")
    x = torch.randn(2, 2, dtype=F64, requires_grad=True)
    weight = flow.net.layers[1].weight
    with torch.no_grad():
        weight.mul_(1.5)
    flow(x)  # the norms are known

    def call(x, weight):
        return torch.func.functional_call(flow, {"net.layers.1.weight": weight}, (x,))

    flow._update_norms = lambda trains: None
    assert torch.autograd.gradcheck(call, (x, weight.detach().requires_grad_()))
    assert torch.autograd.gradgradcheck(call, (x, weight.detach().requires_grad_()))
