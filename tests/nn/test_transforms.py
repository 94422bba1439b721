"""Every flow and every model of vectors: second derivatives, stored and reversible, and the transforms of torch.func."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

from fastflow import fit
from fastflow.models import Glow, RealNVP, VectorGlow
from fastflow.nn import AffineCoupling, BatchNorm, Sequential
from fastflow.reversible import run_reversible, run_storing
from tests.support.cases import randomize
from tests.support.flows import FLOWS, WithContext, batch, mlp, trained


def loss_of(z: torch.Tensor, log_det: torch.Tensor) -> torch.Tensor:
    """Of which no derivative is constant."""
    return (z.flatten(1) ** 3).sum(1).mean() + z.square().mean() * log_det.mean()


def direction(values, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]


def hessian_times(loss, variables, vectors):
    """Gradients of a loss and its Hessian times ``vectors``, with respect to ``variables``."""
    first = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
    slope = sum((g * v).sum() for g, v in zip(first, vectors, strict=True)) + 0 * loss
    second = torch.autograd.grad(slope, variables, materialize_grads=True)
    return [g.detach() for g in first], second


def assert_per_sample_gradients(loss, parameters, x):
    found = vmap(grad(lambda p, x: loss(p, x[None])), (None, 0))(parameters, x)
    loop = [grad(loss)(parameters, v[None]) for v in x]
    torch.testing.assert_close(found, {name: torch.stack([each[name] for each in loop]) for name in found})


@pytest.mark.parametrize("name", FLOWS)
def test_second_derivatives(name):
    """By x and all parameters: stored equals reversible and differences of first derivatives."""
    make, shape = FLOWS[name]
    flow, x = trained(make), batch(shape, 2).requires_grad_()
    variables = [x, *flow.parameters()]
    vectors = direction(variables)

    def found(run):
        return hessian_times(loss_of(*run([flow], x)), variables, vectors)

    stored, reversible = found(run_storing), found(run_reversible)
    torch.testing.assert_close(reversible, stored, rtol=1e-8, atol=1e-8)

    def gradients(step):
        moved = copy.deepcopy(flow)
        at = [x.detach().clone().requires_grad_(), *moved.parameters()]
        with torch.no_grad():
            for v, d in zip(at, vectors, strict=True):
                v.add_(step * d)
        return torch.autograd.grad(loss_of(*run_storing([moved], at[0])), at, materialize_grads=True)

    h = 1e-6
    numeric = [(up - down) / (2 * h) for up, down in zip(gradients(h), gradients(-h), strict=True)]
    torch.testing.assert_close(list(stored[1]), numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_transforms(name):
    """Gradient, jvp, and vmap over gradients of samples, through functional_call, in both directions."""
    make, shape = FLOWS[name]
    flow, x = trained(make), batch(shape, 3)
    own = dict(flow.named_parameters())
    parameters = {**own, "another": torch.ones((), dtype=x.dtype, requires_grad=True)}  # some flows have none

    def loss(parameters, x):
        used = {name: parameters[name] for name in own}
        return parameters["another"] * loss_of(*functional_call(flow, used, (x,)))

    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    torch.testing.assert_close(list(grad(loss)(parameters, x).values()), list(expected))

    (t,) = direction([x])
    moving = x.clone().requires_grad_()
    slope = (torch.autograd.grad(loss_of(*flow(moving)), moving)[0] * t).sum()
    torch.testing.assert_close(jvp(lambda x: loss(parameters, x), (x,), (t,))[1], slope)

    def one(x):
        return loss(parameters, x[None])

    torch.testing.assert_close(vmap(grad(one))(x), torch.stack([grad(one)(v) for v in x]))
    assert_per_sample_gradients(loss, parameters, x)

    z = flow(x)[0].detach()
    inverses = vmap(lambda z: flow.inverse(z[None])[0][0])(z)
    torch.testing.assert_close(inverses, flow.inverse(z)[0])


MODELS = {
    "VectorGlow": lambda: VectorGlow(features=3 + 1, steps=2, hidden=4),
    "VectorGlow, stored": lambda: VectorGlow(features=4, steps=2, hidden=4, reversible=False),
}


def model(make):
    found = randomize(make(), std=0.1).double().eval()
    for name, flag in found.named_buffers():
        if name.endswith("initialized"):
            flag.fill_(True)
    return found


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_hessian_of_a_density_equals_differences(make):
    """Of a model that was trained for some epochs on samples with skewed, correlated dimensions."""
    noise = torch.randn(2000, 4, dtype=torch.float64)
    samples = noise + torch.stack([noise[:, 1] ** 2, *noise[:, 1:].T], dim=1).flip(1)
    density, x = model(make), samples[0]
    untrained = density.log_prob(samples).mean()
    fit(density, samples, max_epochs=5, lr=1e-2, progress=False)
    assert density.log_prob(samples).mean() > untrained + 0.5

    def log_prob(x):
        return density.log_prob(x[None])[0]

    found = torch.autograd.functional.hessian(log_prob, x)
    step = 1e-5 * torch.eye(4, dtype=torch.float64)
    scores = [torch.autograd.functional.jacobian(log_prob, x + s) for s in (*step, *-step)]
    numeric = torch.stack([(up - down) / 2e-5 for up, down in zip(scores[:4], scores[4:], strict=True)])
    torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hessian(log_prob)(x), found)
    score = grad(log_prob)
    batch_of_x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(vmap(score)(batch_of_x), torch.stack([score(v) for v in batch_of_x]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Glow((1, 4, 4), levels=2, steps=1, hidden=4),
        lambda: Glow((1, 4, 4), levels=2, steps=1, hidden=4, reversible=False, network="fused"),
        lambda: RealNVP((1, 4, 4), scales=1, hidden=2, blocks=1),
    ],
    ids=["Glow", "Glow, fused", "RealNVP"],
)
def test_models_of_images_by_parameters(make):
    """Second derivatives by parameters, such as of a Laplace approximation, and per-sample gradients."""
    flow = model(make)
    x = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    variables = list(flow.parameters())
    vectors = direction(variables)
    first, second = hessian_times(flow(x, seed=1).mean(), variables, vectors)

    def loss(parameters, x):
        return functional_call(flow, parameters, (x,), {"seed": 1}).mean()

    parameters = dict(flow.named_parameters())
    torch.testing.assert_close(list(grad(loss)(parameters, x).values()), first)
    _, second_again = jvp(
        lambda p: grad(loss)(p, x), (parameters,), (dict(zip(parameters, vectors, strict=True)),)
    )
    torch.testing.assert_close(list(second_again.values()), list(second), rtol=1e-6, atol=1e-8)
    assert_per_sample_gradients(loss, parameters, x)


def test_an_ensemble():
    """One vmap over the parameters of several models (torch.func's ensembling)."""
    members = [model(MODELS["VectorGlow"]) for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0])
    x = torch.randn(5, 4, dtype=torch.float64)
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(
        found, torch.stack([member(x) for member in members]).detach(), rtol=1e-9, atol=1e-9
    )


def test_third_derivatives_of_a_reversible_chain():
    make, shape = FLOWS["Sequential of images"]
    flow, x = trained(make), batch(shape, 1).requires_grad_()

    def third(run):
        v = x
        loss = loss_of(*run(list(flow), x))
        for _ in range(2):
            (v,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = v.pow(2).sum()
        return torch.autograd.grad(loss, x)[0]

    torch.testing.assert_close(third(run_reversible), third(run_storing), rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_a_reversible_chain():
    make, shape = FLOWS["Sequential of images"]
    flow, x = Sequential(*trained(make), reversible=True), batch(shape, 2)
    traced = torch.jit.trace(flow, (x,), check_trace=False)
    torch.testing.assert_close(traced(x + 1), flow(x + 1))


def test_shared_parameters_and_context_are_differentiated_once():
    """A layer in two segments, and a context that x depends on: paths through other uses are autograd's own."""
    layer, context = trained(lambda: FLOWS["ActNorm of vectors"][0]()), batch((3,), 2).requires_grad_()
    coupling = trained(lambda: AffineCoupling(WithContext(2, 4)))
    steps = [layer, coupling, layer]

    def found(run, **options):
        x = torch.cat([context, context[:, :1]], dim=1).sin()
        loss = loss_of(*run(steps, x, context, **options))
        variables = [context, *layer.parameters(), *coupling.parameters()]
        return hessian_times(loss, variables, direction(variables))

    expected = found(run_storing)
    for every in (None, 1):
        reversible = found(run_reversible, activation_checkpoint_every=every)
        torch.testing.assert_close(reversible, expected, rtol=1e-8, atol=1e-8)


def test_statistics_are_not_updated_by_second_derivatives():
    """Batch normalization in training mode runs again in backward, on the statistics that forward left."""
    x = batch((4,), 5).requires_grad_()

    def found(run):
        torch.manual_seed(0)
        steps = [BatchNorm(4).double(), AffineCoupling(mlp(2, 4)).double(), BatchNorm(4).double()]
        run(steps, x.detach())
        variables = [x, *(p for step in steps for p in step.parameters())]
        result = hessian_times(loss_of(*run(steps, x)), variables, direction(variables))
        return result, [b.clone() for step in steps for b in step.buffers()]

    torch.testing.assert_close(found(run_reversible), found(run_storing), rtol=1e-8, atol=1e-8)
