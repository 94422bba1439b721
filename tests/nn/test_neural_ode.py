"""NeuralODE flows: exact solutions of linear fields, gradients, unbiased estimates, penalties, errors."""

import gc
import math
import re
import sys
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fastflow
from fastflow import nn as fnn
from fastflow.models import ContinuousFlow, FlowModel
from tests.support.cases import jacobian_log_det, randomize

pytest.importorskip("torchdiffeq")
F64 = torch.float64
EXACT = {"atol": 1e-10, "rtol": 1e-10}


class Linear(nn.Module):
    """dx/dt = A x, or A x plus the context."""

    def __init__(self, features):
        super().__init__()
        self.matrix = nn.Parameter(0.5 * torch.randn(features, features, dtype=F64))

    def forward(self, t, x, context=None):
        speed = x @ self.matrix.mT
        return speed if context is None else speed + context


def smooth(features=3, context_features=None, **options):
    net = randomize(fnn.ConcatSquash(features, (8,), context_features, torch.tanh))
    return fnn.NeuralODE(net, **EXACT | options).double()


@pytest.mark.parametrize("trace", ["auto", "exact"])
@pytest.mark.parametrize("time", [0.5, 2.0])
def test_a_linear_field_is_a_matrix_exponential(trace, time):
    net, x = Linear(3), torch.randn(6, 3, dtype=F64)
    flow = fnn.NeuralODE(net, time=time, trace=trace, **EXACT)
    z, log_det = flow(x)
    torch.testing.assert_close(z, x @ torch.linalg.matrix_exp(time * net.matrix).mT, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_det, (time * net.matrix.trace()).expand(6), rtol=1e-8, atol=1e-8)
    assert flow.evaluations > 6
    back, log_det_back = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("context", [None, 2])
def test_check(adjoint, context):
    torch.manual_seed(0)
    flow, x = smooth(2, context, adjoint=adjoint), torch.randn(2, 2, dtype=F64)
    given = () if context is None else (torch.randn(2, context, dtype=F64),)
    report = flow.check(x, *given, tolerance=1e-7, gradient_tolerance=1e-5)
    assert not report.failures()
    assert ("context" in report.gradient_errors) == (context is not None)


def test_a_field_without_its_gradient_is_found():
    class Detached(Linear):
        def forward(self, t, x, context=None):
            return super().forward(t, x.detach()) + 0 * x

    flow, x = fnn.NeuralODE(Detached(2), adjoint=False, **EXACT), torch.randn(4, 2, dtype=F64)
    with pytest.raises(ValueError, match="inaccurate: log_det, gradient of x"):
        flow.check(x, tolerance=1e-7)


class HyperPlanar(nn.Module):
    r"""The field of torchdiffeq's example of a continuous flow, a mean of planar maps whose parameters depend on time.

    :math:`f(t, x) = \frac{1}{K} \sum_k u_k(t) \sigma(g_k(t)) \tanh(w_k(t)^\top x + b_k(t))` with the output u, g, w, b of a
    network with two hidden layers (arXiv:1806.07366, section 4.1).
    """

    def __init__(self, features=2, hidden=8, width=6):
        super().__init__()
        sizes = [width * features] * 3 + [width]
        self.sizes, self.shape = sizes, (width, features)
        self.net = nn.Sequential(
            nn.Linear(1, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, sum(sizes)),
        )

    def forward(self, t, x):
        *vectors, b = self.net(t.reshape(1)).split(self.sizes)
        w, u, g = (v.view(self.shape) for v in vectors)
        return torch.tanh(x @ w.mT + b) @ (u * torch.sigmoid(g)) / len(b)


def test_the_continuous_flow_of_torchdiffeqs_example():
    """Log-densities and gradients of two circles, beside a solve of the augmented state by odeint_adjoint alone."""
    ode = pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    net, time, n = randomize(HyperPlanar(), std=0.4).double(), 10.0, 12
    close = {"atol": 1e-7, "rtol": 1e-7}
    radius, angle = torch.where(torch.arange(n) % 2 == 0, 1.0, 0.5), 2 * math.pi * torch.rand(n)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1) + 0.06 * torch.randn(n, 2)
    x = x.double().requires_grad_()
    base = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), 0.1 * torch.eye(2, dtype=F64))

    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, state):
            with torch.enable_grad():
                x = state[0].requires_grad_()
                f = self.net(t, x)
                parts = [torch.autograd.grad(f[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
            return f, -sum(parts)

    times = torch.tensor([time, 0.0], dtype=F64)
    z, change = ode.odeint_adjoint(Augmented(), (x, x.new_zeros(n)), times, method="dopri5", **close)
    expected = base.log_prob(z[-1]) - change[-1]
    # the example solves from the data at its last time to the latents at time 0
    model = FlowModel(fnn.Inverse(fnn.NeuralODE(net, time=time, **close)), base).double()
    found = model.log_prob(x)
    assert change[-1].std() > 0.1  # the flow is not close to the identity
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    variables = [x, *net.parameters()]
    gradients = (torch.autograd.grad(v.mean(), variables) for v in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)


def test_images():
    net = nn.Conv2d(2, 2, 3, padding=1).double()

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, x):
            return torch.tanh(self.net(x)) * t

    flow, x = fnn.NeuralODE(Field(), trace="exact", **EXACT), torch.randn(2, 2, 2, 1, dtype=F64)
    z, log_det = flow(x)
    assert z.shape == x.shape
    torch.testing.assert_close(log_det, jacobian_log_det(lambda v: flow(v)[0], x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["rk4", "midpoint", "euler"])
def test_fixed_steps(method):
    torch.manual_seed(0)
    flow, x = smooth(2, method=method, step_size=0.1, atol=1e-5, rtol=1e-5), torch.randn(5, 2, dtype=F64)
    exact = fnn.NeuralODE(flow.net, **EXACT)(x)
    errors = [(a - b).abs().max() for a, b in zip(flow(x), exact, strict=True)]
    assert max(errors) < {"rk4": 1e-5, "midpoint": 1e-2, "euler": 0.3}[method]
    assert flow.evaluations == 10 * {"rk4": 4, "midpoint": 2, "euler": 1}[method]


def test_derivatives_of_stored_steps():
    torch.manual_seed(0)
    flow = smooth(2, 1, method="rk4", step_size=0.5, adjoint=False, atol=1e-5, rtol=1e-5)
    x, context = (torch.randn(2, n, dtype=F64, requires_grad=True) for n in (2, 1))
    assert gradcheck(flow, (x, context))
    assert gradgradcheck(flow, (x, context))


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(noise, adjoint):
    """The mean of 20,000 draws, of the log-det and of its gradient, is within 4 standard errors of the exact value."""
    torch.manual_seed(0)
    net, n = Linear(3), 20_000
    options = {"method": "rk4", "step_size": 1.0, "adjoint": adjoint}
    flow = fnn.NeuralODE(net, trace="hutchinson", noise=noise, **options)
    _, log_det = flow(torch.randn(n, 3, dtype=F64))
    assert log_det.std() > 0.01
    assert abs(log_det.mean() - net.matrix.trace()) < 4 * log_det.std() / math.sqrt(n)
    (gradient,) = torch.autograd.grad(log_det.mean(), net.matrix)
    deviation = math.sqrt(2) if noise == "gaussian" else 1.0  # of a product of two draws, at most
    assert ((gradient - torch.eye(3)).abs() < 4 * deviation / math.sqrt(n)).all()
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_for_a_curved_field(noise):
    """20,000 draws at one x beside the exact trace, of the log-det and of its gradients by x and by a weight."""
    torch.manual_seed(0)
    options = {"method": "rk4", "step_size": 0.5, "adjoint": False, "atol": 1e-5, "rtol": 1e-5}
    exact = smooth(3, trace="exact", **options)
    estimated = fnn.NeuralODE(exact.net, trace="hutchinson", noise=noise, **options)
    point = torch.randn(1, 3, dtype=F64)

    def of(flow, rows):
        """The log-det and its gradients, means over equal rows."""
        x = point.clone().requires_grad_()
        log_det = flow(x.expand(rows, 3))[1].mean()
        return log_det.detach(), *torch.autograd.grad(log_det, [x, exact.net.layers[0].weight])

    calls, rows = 50, 400
    for draws, right in zip(
        zip(*(of(estimated, rows) for _ in range(calls)), strict=True), of(exact, 1), strict=True
    ):
        draws = torch.stack(draws)
        error = draws.std(0) / math.sqrt(calls)
        assert ((draws.mean(0) - right).abs() < 4 * error).all()
        assert (right.abs() > 8 * error).any()  # the errors are small enough to see a bias


def test_noise_is_of_torchs_generator():
    flow, x = fnn.NeuralODE(Linear(10), atol=1e-4, rtol=1e-4).eval(), torch.randn(4, 10, dtype=F64)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(flow(x)[1])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_penalties_of_a_linear_field():
    net, x = Linear(3), torch.randn(5, 3, dtype=F64)
    flow = fnn.NeuralODE(net, **EXACT)
    z, log_det, kinetic, jacobian = flow.with_penalties(x)
    torch.testing.assert_close((z, log_det), flow(x), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(jacobian, net.matrix.square().sum().expand(5), rtol=1e-7, atol=1e-7)
    steps = torch.linspace(0, 1, 2001, dtype=F64)
    speeds = torch.stack([(x @ torch.linalg.matrix_exp(t * net.matrix).mT @ net.matrix.mT) for t in steps])
    torch.testing.assert_close(
        kinetic, torch.trapezoid(speeds.square().sum(2), steps, dim=0), rtol=1e-5, atol=1e-5
    )


def test_the_path_of_a_linear_field():
    net, x = Linear(2), torch.randn(4, 2, dtype=F64)
    flow, times = fnn.NeuralODE(net, time=2.0, **EXACT), [0.0, 0.5, 2.0]
    expected = torch.stack([x @ torch.linalg.matrix_exp(t * net.matrix).mT for t in times])
    torch.testing.assert_close(flow.path(x, times), expected, rtol=1e-8, atol=1e-8)
    back = flow.path(expected[-1], times[::-1])
    torch.testing.assert_close(back, expected.flip(0), rtol=1e-7, atol=1e-7)
    for wrong in ([0.0], [0.0, 1.0, 0.5]):
        with pytest.raises(ValueError, match="^times: got .*, expected two or more times"):
            flow.path(x, wrong)


@pytest.mark.parametrize("adjoint", [False, True])
def test_memory_of_the_adjoint_does_not_grow_with_the_steps(adjoint):
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def kept(step_size):
        flow, alive = (
            smooth(2, method="rk4", step_size=step_size, adjoint=adjoint, atol=1e-5, rtol=1e-5),
            WeakSet(),
        )

        def pack(tensor):
            saved = Saved(tensor.detach())  # the tensor itself would keep its graph
            alive.add(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            result = flow(torch.randn(4, 2, dtype=F64, requires_grad=True))
        gc.collect()
        assert result[0].requires_grad
        return sum(saved.tensor.nbytes for saved in alive)

    few, many = kept(0.5), kept(0.05)
    assert many == few if adjoint else many > 8 * few


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    flow, x = fnn.NeuralODE(fnn.ConcatSquash(2, (8,))), torch.randn(5, 2)
    wanted = flow(x)
    z, log_det = flow.to(dtype)(x.to(dtype))
    assert z.dtype == dtype and log_det.dtype == torch.float32
    torch.testing.assert_close(z.float(), wanted[0], rtol=0.05, atol=0.05)


def test_no_samples():
    flow = fnn.NeuralODE(fnn.ConcatSquash(2, (4,)))
    z, log_det = flow(torch.zeros(0, 2))
    assert z.shape == (0, 2) and log_det.shape == (0,)
    (z.sum() + log_det.sum()).backward()
    assert all((p.grad == 0).all() for p in flow.net.layers.parameters())


def test_a_model_learns_and_samples():
    torch.manual_seed(0)
    x = torch.randn(400, 2) * torch.tensor([1.0, 0.2]) + torch.tensor([2.0, -1.0])
    model = ContinuousFlow(features=2, hidden=16, layers=1, atol=1e-3, rtol=1e-3)
    history = fastflow.fit(model, x, max_epochs=6, batch_size=100, lr=2e-2, progress=False)
    assert history.validation[-1] > history.validation[0] + 1
    samples = model.sample(1000)
    assert (samples.mean(0) - x.mean(0)).abs().max() < 0.5
    assert model.evaluations() > 0
    z = model.encode(x)
    torch.testing.assert_close(model.decode(z), x, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("context", [None, 3])
def test_the_regularized_loss(context):
    torch.manual_seed(0)
    model = ContinuousFlow(
        features=2, context_features=context, hidden=8, layers=1, blocks=2, atol=1e-7, rtol=1e-7
    )
    model = randomize(model)
    x, c = torch.randn(20, 2), None if context is None else torch.randn(20, context)
    plain = -model.log_prob(x, c).mean()
    torch.testing.assert_close(model.regularized_loss(x, c, 0, 0), plain, rtol=1e-4, atol=1e-4)
    one, two = (model.regularized_loss(x, c, factor, factor) - plain for factor in (0.1, 0.2))
    assert one > 0
    torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="^kinetic: got -1, expected a number of at least 0"):
        model.regularized_loss(x, c, kinetic=-1)


def test_files(tmp_path):
    model = ContinuousFlow(features=2, hidden=4, layers=1, time=0.5)
    fastflow.save(tmp_path / "model.pt", model)
    loaded, x = fastflow.load(tmp_path / "model.pt"), torch.randn(3, 2)
    assert type(loaded) is ContinuousFlow and loaded.config == model.config
    assert torch.equal(loaded.log_prob(x), model.log_prob(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fnn.NeuralODE(torch.tanh), "net: got <built-in method tanh"),
        (lambda: fnn.NeuralODE(Linear(2), trace="some"), "trace: got 'some', expected one of 'auto'"),
        (lambda: fnn.NeuralODE(Linear(2), method="rk5"), "method: got 'rk5', expected one of 'dopri5'"),
        (
            lambda: fnn.NeuralODE(Linear(2), step_size=0.1),
            "step_size: got 0.1, expected None for the method 'dopri5'",
        ),
        (
            lambda: fnn.NeuralODE(Linear(2), method="rk4", step_size=2),
            "step_size: got 2, expected a positive number up to the time 1",
        ),
        (
            lambda: _wrong_shape(),
            "output of net: got shape [2, 1], expected [2, 3]",
        ),
        (lambda: fnn.NeuralODE(Linear(2))(torch.zeros(2, 2, dtype=torch.int64)), "x: got dtype torch.int64"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


def _wrong_shape():
    class Field(nn.Module):
        def forward(self, t, x):
            return x[:, :1]

    return fnn.NeuralODE(Field())(torch.zeros(2, 3))


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=re.escape("pip install fastflow-torch[ode]")):
        fnn.NeuralODE(Linear(2))
