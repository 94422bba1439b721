"""torch.compile(fullgraph=True), which fails at any graph break, gives eager's outputs and gradients."""

import copy

import pytest
import torch
from torch import nn

from fastflow import ops
from fastflow.models import Glow
from fastflow.models.glow import GlowLevel, GlowStep
from fastflow.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    BatchNorm,
    CircularShift,
    Coupling,
    Dequantize,
    EmergingConv,
    Exp,
    Flatten,
    GaussianPrior,
    GlowNetwork,
    Inverse,
    InvertibleConv1x1,
    LeakyReLU,
    Log,
    Logit,
    LogitDequantize,
    LULinear,
    MaskedAutoregressive,
    MaskedNetwork,
    OrthogonalLinear,
    PeriodicConv,
    Permute,
    PiecewiseLinear,
    PiecewiseQuadratic,
    Planar,
    QRLinear,
    Radial,
    Scale,
    Sequential,
    Sigmoid,
    SoftClip,
    Softplus,
    Split,
    Squeeze,
    Tanh,
    TriangularLinear,
)
from tests.support.cases import CUDA, randomize

# not in the interpreter: tracing does not see an op's body, and test_backend.py compiles with kernels
pytestmark = [pytest.mark.usefixtures("each_backend"), pytest.mark.bodies("reference", CUDA)]

IMAGE, VECTOR = (3, 4, 2, 4), (3, 4)

FLOWS = {
    "ActNorm": (lambda: ActNorm(4), IMAGE),
    "ActNorm of vectors": (lambda: ActNorm(4), VECTOR),
    "InvertibleConv1x1": (lambda: InvertibleConv1x1(4), IMAGE),
    "InvertibleConv1x1, plain": (lambda: InvertibleConv1x1(4, lu=False), IMAGE),
    "Permute": (lambda: Permute(4, order="random"), IMAGE),
    "Permute, interleaved": (lambda: Permute(4, order="interleaved"), VECTOR),
    "Scale": (lambda: Scale(4), IMAGE),
    "BatchNorm": (lambda: BatchNorm(4).eval(), IMAGE),
    "Flatten": (lambda: Flatten(IMAGE[1:]), IMAGE),
    "AffineCoupling": (lambda: AffineCoupling(nn.Conv2d(2, 4, 1), num_scale_factors=2), IMAGE),
    "AffineCoupling of vectors": (
        lambda: AffineCoupling(nn.Linear(2, 4), scale="sigmoid", swap_halves=True),
        VECTOR,
    ),
    "AffineCoupling, checkerboard": (
        lambda: AffineCoupling(nn.Conv2d(4, 8, 1), mask="checkerboard", scale="tanh"),
        IMAGE,
    ),
    "AdditiveCoupling": (lambda: AdditiveCoupling(GlowNetwork(2, 2, hidden=4)), IMAGE),
    "LULinear": (lambda: LULinear(4), VECTOR),
    "TriangularLinear": (lambda: TriangularLinear(4), VECTOR),
    "OrthogonalLinear": (lambda: OrthogonalLinear(4), IMAGE),
    "OrthogonalLinear, cayley": (lambda: OrthogonalLinear(4, "cayley"), VECTOR),
    "OrthogonalLinear, exponential": (lambda: OrthogonalLinear(4, "exponential"), VECTOR),
    "QRLinear": (lambda: QRLinear(4), IMAGE),
    "PeriodicConv": (lambda: PeriodicConv(4), IMAGE),
    "EmergingConv": (lambda: EmergingConv(4), IMAGE),
    "Planar, leaky ReLU": (lambda: Planar(4, "leaky_relu"), VECTOR),
    "Radial": (lambda: Radial(4), VECTOR),
    "MaskedAutoregressive": (lambda: MaskedAutoregressive(MaskedNetwork(4, 2, (6, 5))), VECTOR),
    "MaskedAutoregressive, spline": (
        lambda: MaskedAutoregressive(
            MaskedNetwork(4, 8, (6, 5), residual=True, order="reverse"), "spline", bins=3
        ),
        VECTOR,
    ),
    "PiecewiseLinear": (lambda: Coupling(nn.Linear(2, 6), PiecewiseLinear(3)), VECTOR),
    "PiecewiseQuadratic": (lambda: Coupling(nn.Conv2d(2, 10, 1), PiecewiseQuadratic(3)), IMAGE),
    "Inverse": (lambda: Inverse(AffineCoupling(nn.Linear(2, 4))), VECTOR),
    "elementwise": (
        lambda: Sequential(
            *(
                CircularShift(9.0),
                LeakyReLU(0.5, learned=True),
                Softplus(),
                Log(),
                Exp(),
                Inverse(Softplus()),
            ),
            *(Sigmoid(), Logit(), Tanh(), Inverse(SoftClip(1.0)), LeakyReLU(0.5)),
            reversible=False,
        ),
        VECTOR,
    ),
    "Squeeze": (lambda: Squeeze("realnvp"), IMAGE),
    "Sequential": (
        lambda: Sequential(
            ActNorm(4), Permute(4), AffineCoupling(nn.Conv2d(2, 4, 1)), Squeeze(), reversible=False
        ),
        IMAGE,
    ),
    "GlowLevel": (
        lambda: GlowLevel([GlowStep(16, 2, network="fused"), GlowStep(16, 2)], reversible=False),
        IMAGE,
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(module):
    for layer in module.modules():
        if isinstance(layer, ActNorm):
            layer.initialized.fill_(True)
            assert layer._initialized
    return randomize(module, std=0.1)


def outputs_and_gradients(call, module, *args):
    """Of ``call(*args)``: its tensors, and the gradients of all that is differentiable in them."""
    args = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
    found = call(*args)
    outputs = found if isinstance(found, tuple) else (found,)
    loss = sum(
        (v * (1 + torch.arange(v.numel()).view(v.shape) / max(v.numel(), 1))).sum()
        for v in outputs
        if v.is_floating_point()
    )
    variables = [a for a in args if a.requires_grad] + list(module.parameters())
    gradients = (
        torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True)
        if loss.requires_grad
        else ()
    )
    return [v.detach() for v in outputs], list(gradients)


def assert_same(call, module, *args, backend="aot_eager"):
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    expected = outputs_and_gradients(call, module, *args)
    found = outputs_and_gradients(compiled, module, *args)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make, shape", FLOWS.values(), ids=FLOWS.keys())
def test_flows(make, shape):
    flow = trained(make())
    x = torch.randn(shape)
    # both in one graph, since each compilation takes most of a second
    assert_same(lambda v, w: (*flow(v), *flow.inverse(w)), flow, x, flow(x)[0])


DYNAMIC = {
    "Sequential": FLOWS["Sequential"][0],
    "GlowLevel": lambda: GlowLevel([GlowStep(16, 2)], reversible=False),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name):
    """With dynamic=True, one graph serves every batch size and image size."""
    flow = trained(DYNAMIC[name]())
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda v: flow(v), fullgraph=True, backend="aot_eager", dynamic=True)
    for n, height, width in ((3, 6, 10), (5, 6, 10), (2, 8, 12)):  # no 4: dynamo takes equal sizes to be one
        x = torch.randn(n, 4, height, width)
        found, expected = (outputs_and_gradients(call, flow, x) for call in (compiled, flow))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_batch_norm_in_training_mode(backend):
    eager, other = BatchNorm(4), BatchNorm(4)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    for _ in range(3):
        x = 1 + 2 * torch.randn(IMAGE)
        expected, found = outputs_and_gradients(eager, eager, x), outputs_and_gradients(compiled, other, x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)


def test_with_inductor():
    flow = trained(AffineCoupling(nn.Linear(2, 4)))
    assert_same(lambda v: flow(v), flow, torch.randn(VECTOR), backend="inductor")


@pytest.mark.parametrize("layer", [Dequantize(), LogitDequantize(5)], ids=repr)
def test_dequantize(layer):
    x = torch.randint(0, 2**layer.n_bits, IMAGE, dtype=torch.uint8)
    assert_same(lambda v, seed: layer(v, seed=seed), layer, x, torch.tensor(3))
    assert_same(lambda v, noise: layer(v, noise=noise), layer, x, torch.rand(IMAGE))
    assert_same(lambda v: layer.inverse(v), layer, layer(x)[0])


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_split(prior):
    split = trained(Split(4, prior))
    assert_same(lambda v: split(v), split, torch.randn(IMAGE))


def test_class_conditional_prior():
    prior, context = trained(GaussianPrior((4, 2, 4), classes=3)), torch.tensor([2, 0, 2])
    assert_same(lambda v, c: prior.log_prob(v, c), prior, torch.randn(IMAGE), context)


def test_ops_without_a_module():
    nothing = nn.Module()
    assert_same(
        lambda s, m, ls: ops.gaussian_sample(IMAGE, m, ls, seed=s),
        nothing,
        torch.tensor(1),
        torch.randn(IMAGE),
        torch.randn(IMAGE),
    )
    assert_same(lambda s: ops.uniform_noise(IMAGE, s, offset=2), nothing, torch.tensor(1))
    A = torch.randn(2, 3, 3) + 3 * torch.eye(3)
    assert_same(lambda a, b: ops.triangular_solve(a, b, upper=True), nothing, A, torch.randn(2, 3, 4))


def glow(**kwargs):
    return Glow(
        **{"image_shape": (3, 4, 4), "levels": 1, "steps": 1, "hidden": 2, "reversible": False, **kwargs}
    )


VARIANTS = {
    "two levels": {"levels": 2},
    "classes, logit, plain, additive": {
        "classes": 3,
        "logit": True,
        "conv1x1": "plain",
        "coupling": "additive",
    },
}


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_glow_loss(kwargs):
    model = trained(glow(**kwargs))
    x = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    context = () if model.classes is None else (torch.tensor([1, 0, 2]),)
    assert_same(lambda v, seed, *c: model(v, *c, seed=seed).mean(), model, x, torch.tensor(5), *context)


def test_compiled_model_is_called_as_the_model_is():
    """torch.compile(model) itself: seeds as tensors, batches of another size, and noise from torch's generator, which is eager's."""
    model = trained(glow(conv1x1="reverse"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n, seed in ((2, 1), (2, 2), (3, None)):
        x = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8)
        seed = None if seed is None else torch.tensor(seed)
        torch.manual_seed(1)
        expected = model(x, seed=seed)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x, seed=seed), expected, rtol=1e-5, atol=0)


def test_training_from_the_first_batch():
    """ActNorm is initialised inside the first compiled step, once, to eager's values; training goes on from there as in eager."""
    eager = glow()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (eager, other)]
    for step in range(2):
        x = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
        losses = [m(x, seed=torch.tensor(step)).mean() for m in (eager, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(
            layer.initialized and layer._initialized
            for layer in other.modules()
            if isinstance(layer, ActNorm)
        )
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("reversible", [False, True])
def test_compiled_networks(reversible):
    """Equal to eager ones, and one kind for all steps of a level: K does not count."""
    eager = trained(Glow((3, 8, 8), levels=2, steps=4, hidden=3, reversible=reversible))
    other, frames = copy.deepcopy(eager), []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    other.compile_networks(backend=backend)
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    for _ in range(2):
        gradients = []
        for model in (eager, other):
            loss = model(x, seed=1).mean()
            gradients.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
        # a level's networks; where the chain is reversible, once without a gradient and once with
        assert len(frames) == 2 * (1 + reversible)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x, seed=1), eager.eval()(x, seed=1), rtol=1e-5, atol=0)
    assert other.state_dict().keys() == eager.state_dict().keys()
