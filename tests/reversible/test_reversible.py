"""Reversible backprop gives the gradients of stored activations, keeps nothing that grows, and refuses what it cannot do."""

import copy
import gc
from collections import Counter
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastflow.models import Glow
from fastflow.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Dequantize,
    Flow,
    GlowLevel,
    GlowStep,
    InvertibleConv1x1,
    Permute,
    Sequential,
)
from fastflow.reversible import run_reversible, run_storing
from fastflow.reversible.state import generators_of as generators
from tests.support.cases import name, pairwise, randomize
from tests.support.flows import WithContext, batch, conv, mlp, trained
from tests.support.gradients import assert_as_stored, outputs_and_gradients

# gradients --------------------------------------------------------------------------------------------------------------------


GLOWS = pairwise(
    coupling=["affine", "additive", "spline", "mixture"],
    conv1x1=["lu", "plain", "reverse", "shuffle"],
    scale=["soft_clamp", "tanh", "sigmoid", "exp"],
    classes=[None, 3],
    activation_checkpoint_every=[None, 1, 2],
    steps=[1, 3],
    first=[False, True],
)


@pytest.mark.parametrize("case", GLOWS, ids=name)
def test_glow(case):
    """``first``: the batch that initialises every ActNorm is differentiated, too."""
    first, classes = case["first"], case["classes"]
    kwargs = {k: v for k, v in case.items() if k != "first"}
    model = Glow((3, 8, 4), levels=2, hidden=5, reversible=False, **kwargs).double()
    x, labels = (
        torch.randint(0, 256, (6, 3, 8, 4), dtype=torch.uint8),
        None if classes is None else torch.arange(6) % 3,
    )
    if not first:
        model.initialize(x, labels)
        randomize(model, std=0.03)
    other = Glow((3, 8, 4), levels=2, hidden=5, **kwargs).double()
    other.load_state_dict(model.state_dict())
    expected = outputs_and_gradients(lambda: (model(x, labels, seed=1),), list(model.parameters()))
    found = outputs_and_gradients(lambda: (other(x, labels, seed=1),), list(other.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def chain(k=4, context=False):
    """Steps of vectors, of each kind, with random parameters."""
    couplings = [
        AffineCoupling(WithContext(2, 4) if context else mlp(2, 4), swap_halves=i % 2 == 1) for i in range(k)
    ]
    return [
        s
        for c in couplings
        for s in (trained(lambda: ActNorm(4)), trained(lambda: InvertibleConv1x1(4)), trained(lambda c=c: c))
    ]


@pytest.mark.parametrize("activation_checkpoint_every", [None, 1, 5, 100])
@pytest.mark.parametrize("wants", ["nothing else", "x", "context", "x and context"])
def test_inputs_that_need_gradients(wants, activation_checkpoint_every):
    x, context = (
        batch((4,)).requires_grad_("x" in wants.split()),
        batch((3,)).requires_grad_("context" in wants),
    )
    assert_as_stored(chain(context=True), x, context, activation_checkpoint_every=activation_checkpoint_every)


def test_a_context_reaches_steps_before_the_first_parameter():
    class Shift(Flow):
        def forward(self, x, context=None):
            return x + context.square(), x.new_zeros(x.shape[0])

        def inverse(self, z, context=None):
            return z - context.square(), z.new_zeros(z.shape[0])

    assert_as_stored([Shift(), trained(lambda: ActNorm(4))], batch((4,)), batch((4,)).requires_grad_())


def test_a_context_of_labels():
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_label, self.net = nn.Embedding(5, 3), WithContext(2, 4)

        def forward(self, x, context):
            return self.net(x, self.of_label(context))

    assert_as_stored(
        [trained(lambda: AffineCoupling(Embedding())) for _ in range(2)], batch((4,)), torch.tensor([1, 4, 1])
    )


@pytest.mark.parametrize(
    "frozen", ["all but the last step", "all but the first step", "some parameters", "every other parameter"]
)
def test_frozen_parameters(frozen):
    steps = chain()
    parameters = [p for s in steps for p in s.parameters()]
    for i, p in enumerate(parameters):
        last, first = i >= len(parameters) - 5, i < 2
        keep = {"all but the last step": last, "all but the first step": first, "some parameters": i > 9}.get(
            frozen, i % 2
        )
        p.requires_grad_(bool(keep))
    assert_as_stored(steps, batch((4,)))


def test_nothing_wants_a_gradient():
    steps = chain()
    for s in steps:
        s.requires_grad_(False)
    z, log_det = run_reversible(steps, batch((4,)))
    assert not z.requires_grad and not log_det.requires_grad


def test_shared_steps_networks_and_parameters():
    net, step = mlp(2, 4), trained(lambda: ActNorm(4))
    couplings = [trained(lambda f=f: AffineCoupling(net, swap_halves=f)) for f in (False, True)]
    couplings[1].log_factor = couplings[0].log_factor
    assert_as_stored(
        [step, *couplings, step, couplings[0]], batch((4,)).requires_grad_(), activation_checkpoint_every=3
    )
    assert_as_stored([step, *couplings, step, couplings[0]], batch((4,)))


def test_an_output_that_nobody_uses():
    steps, x = chain(2), batch((4,)).requires_grad_()
    for which in (0, 1):
        expected = torch.autograd.grad(run_storing(steps, x)[which].sum(), x)
        torch.testing.assert_close(
            torch.autograd.grad(run_reversible(steps, x)[which].sum(), x), expected, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_none_and_one(n):
    assert_as_stored(chain(), batch((4,), n).requires_grad_())
    assert_as_stored(
        [GlowLevel([GlowStep(16, 3) for _ in range(2)]).double()], batch((4, 2, 4), n).requires_grad_()
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_layouts(dtype, layout):
    steps = [
        trained(lambda flip=flip: AffineCoupling(conv(2, 4), swap_halves=flip)).to(dtype)
        for flip in (False, True)
    ]
    x = batch((4, 2, 4)).to(dtype).contiguous(memory_format=layout).requires_grad_()
    (z, _), _ = found = assert_as_stored(steps, x, tolerance=1e-4 if dtype == torch.float32 else 0.1)
    assert (
        z.dtype == dtype and z.is_contiguous(memory_format=layout) and all(g.dtype == dtype for g in found[1])
    )


def test_a_step_that_changes_nothing():
    class Identity(Flow):
        def forward(self, x, context=None):
            return x, x.new_zeros(x.shape[0])

        inverse = forward

    assert_as_stored([Identity()], batch((4,)).requires_grad_())
    assert_as_stored([ActNorm(4).double().eval(), Identity(), Permute(4)], batch((4,)).requires_grad_())


def test_sequential_of_images_and_of_sequentials():
    x = torch.randint(0, 256, (3, 4, 2, 4), dtype=torch.uint8)
    flows = [
        Dequantize(),
        Sequential(ActNorm(4), Sequential(AffineCoupling(conv(2, 4)), reversible=False)),
        AffineCoupling(conv(2, 4)),
    ]
    on, off = Sequential(*flows).double(), Sequential(*flows, reversible=False)
    on(x)
    randomize(on)
    found, expected = [], []
    for flow, results in ((on, found), (off, expected)):
        torch.manual_seed(5)
        results.append(outputs_and_gradients(lambda flow=flow: flow(x), list(on.parameters())))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (
        isinstance(on(x)[0].grad_fn, type(run_reversible(list(on), x)[0].grad_fn))
        and off(x)[0].grad_fn.name() != on(x)[0].grad_fn.name()
    )


@pytest.mark.parametrize("value", [0, -1, 2.0])
def test_checkpoint_every_is_a_count(value):
    for make in (
        lambda: Sequential(activation_checkpoint_every=value),
        lambda: GlowLevel([], activation_checkpoint_every=value),
    ):
        with pytest.raises(
            ValueError, match="activation_checkpoint_every: got .*, expected a positive integer or None"
        ):
            make()


def test_same_bits_twice():
    steps, x = chain(), batch((4,)).requires_grad_()
    parameters = [p for s in steps for p in s.parameters()]
    first, second = (outputs_and_gradients(lambda: run_reversible(steps, x), parameters) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_backward_twice():
    steps, x = chain(), batch((4,))
    z, log_det = run_reversible(steps, x)
    loss = z.square().sum() + log_det.sum()
    parameters = [p for s in steps for p in s.parameters()]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


def test_a_subclass_with_its_own_forward_has_no_inherited_rule():
    class Scaled(AffineCoupling):
        def forward(self, x, context=None):
            y, log_det = super().forward(x, context)
            return 2 * y, log_det + y[0].numel() * torch.log(torch.tensor(2.0))

        def inverse(self, z, context=None):
            x, log_det = super().inverse(z / 2, context)
            return x, log_det - z[0].numel() * torch.log(torch.tensor(2.0))

    class Mixed(Scaled, AdditiveCoupling):
        pass

    assert AdditiveCoupling.inverse_backward is AffineCoupling.inverse_backward is not None
    assert Scaled.inverse_backward is Mixed.inverse_backward is None
    assert_as_stored(
        [trained(lambda: Scaled(mlp(2, 4))), trained(lambda: Mixed(mlp(2, 2)))], batch((4,)).requires_grad_()
    )


def test_a_step_whose_part_has_no_rule():
    class Doubled(AffineCoupling):
        def forward(self, x, context=None):
            return super().forward(2 * x, context)

        def inverse(self, z, context=None):
            x, log_det = super().inverse(z, context)
            return x / 2, log_det

    step = GlowStep(4, 6)
    step.coupling = Doubled(conv(2, 4))
    assert_as_stored([trained(lambda: step)], batch((4, 2, 4)).requires_grad_())


# what runs how often, and what is kept ----------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Counts the calls of the library's own ops."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastflow":
            inverse = func._schema.name.endswith("::affine_coupling") and args[-1]
            self.calls[func._schema.name.split("::")[1] + (" inverse" if inverse else "")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "network, forward, backward",
    [
        ("plain", {"bias_relu_": 3}, {"bias_relu_": 3, "bias_relu_backward": 3}),
        ("fused", {"glow_network": 1}, {"glow_network": 1, "glow_network_backward": 1}),
    ],
)
def test_two_network_evaluations_and_one_inverse_a_step(network, forward, backward):
    k, evaluations = 5, Counter()
    level = GlowLevel([GlowStep(16, 3, network=network) for _ in range(k)])
    level(x := torch.randn(2, 4, 4, 4))
    for i, step in enumerate(level.steps):
        step.coupling.net.register_forward_hook(lambda *_, i=i: evaluations.update([i]))
    with Ops() as ops:
        z, log_det = level(x)
    assert evaluations == dict.fromkeys(range(k), 1)
    expected = {"squeeze": 1, "lu_weight": 1, "conv1x1": k, "affine_coupling": k}
    assert ops.calls == expected | {name: k * calls for name, calls in forward.items()}
    with Ops() as ops:
        (z.sum() + log_det.sum()).backward()
    assert evaluations == dict.fromkeys(range(k), 2)
    assert ops.calls == {
        "lu_weight": 1,  # for all steps together: their weights are not kept either
        "lu_weight_backward": 1,
        "conv1x1_inverse_backward": k,
        "affine_coupling_inverse_backward": k,
    } | {name: k * calls for name, calls in backward.items()}


def storages() -> dict[int, int]:
    """Bytes by address of all tensors that the garbage collector can reach; subclasses aside."""
    gc.collect()
    found = {}
    for v in gc.get_objects():
        if type(v) in (torch.Tensor, nn.Parameter) and v.device.type == "cpu" and v.layout == torch.strided:
            with suppress(RuntimeError):  # what the compiler's tests leave has no memory
                found[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
    return found


def kept(model, x) -> tuple[int, int]:
    """Bytes saved for backward and bytes of all tensors between forward and backward, parameters and buffers aside."""
    own = {v.untyped_storage().data_ptr() for v in (*model.parameters(), *model.buffers(), x)}
    saved = {}

    def pack(v):
        if v.untyped_storage().data_ptr() not in own:
            saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    before = storages()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        loss = model(x, seed=1).mean()
    after = storages()
    loss.backward()
    return sum(saved.values()), sum(size for at, size in after.items() if at not in before.keys() | own)


def test_what_is_kept_does_not_grow_with_the_steps():
    def of(k, **options):
        model = Glow((3, 16, 16), levels=2, steps=k, hidden=8, **options)
        x = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        model.initialize(x, seed=0)
        return kept(model, x)

    few, many = of(2), of(8)
    assert few == many and min(few) > 0
    assert of(8, activation_checkpoint_every=2)[0] > many[0]
    assert of(4, reversible=False)[0] > 10 * many[0], "this counts what is saved"


# hooks, modes, generators -----------------------------------------------------------------------------------------------------


def test_hooks_of_parameters_run_once():
    steps, x = chain(2), batch((4,))
    seen = Counter()
    parameters = [p for s in steps for p in s.parameters()]
    plain = outputs_and_gradients(lambda: run_reversible(steps, x), parameters)[1]
    handles = [p.register_hook(lambda g: (seen.update(["hook"]), 2 * g)[1]) for p in parameters]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p: seen.update(["accumulated"])) for p in parameters
    ]
    generator = torch.Generator().manual_seed(3)
    sum(
        (v * torch.randn(v.shape, generator=generator, dtype=torch.float64)).sum()
        for v in run_reversible(steps, x)
    ).backward()
    assert seen == {"hook": len(parameters), "accumulated": len(parameters)}
    torch.testing.assert_close([p.grad for p in parameters], [2 * g for g in plain], rtol=0, atol=0)
    assert all(p._backward_hooks for p in parameters)


def test_hooks_of_modules():
    """Those of a step run in its forward pass and when it runs again, with gradients; those of a network likewise."""
    steps, x, seen = chain(2), batch((4,)).requires_grad_(), Counter()
    steps[2].register_forward_hook(lambda *_: seen.update(["step"]))
    steps[2].register_full_backward_hook(
        lambda m, dx, dz: seen.update(["step backward"] if dx[0] is not None and dz[0] is not None else [])
    )
    steps[5].net.register_forward_hook(lambda *_: seen.update(["network"]))
    steps[5].net.register_full_backward_hook(lambda *_: seen.update(["network backward"]))
    flow = Sequential(*steps)
    flow.register_forward_hook(lambda *_: seen.update(["chain"]))
    flow.register_full_backward_hook(
        lambda m, dx, dz: seen.update(["chain backward"] if dx[0] is not None else [])
    )
    z, log_det = flow(x)
    assert seen == {"step": 1, "network": 1, "chain": 1}
    (z.sum() + log_det.sum()).backward()
    assert seen == {
        "step": 2,
        "step backward": 1,
        "network": 2,
        "network backward": 1,
        "chain": 1,
        "chain backward": 1,
    }


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_one_hook_alone(kind):
    """A step with one goes by the general rule, which calls it; gradients are the same."""
    steps, x, seen = chain(2), batch((4,)).requires_grad_(), []
    expected = assert_as_stored(steps, x)
    getattr(steps[2], f"register_{kind}_hook")(lambda *_: seen.append(kind))
    torch.testing.assert_close(
        outputs_and_gradients(lambda: run_reversible(steps, x), [x])[1][0],
        expected[1][0],
        rtol=1e-10,
        atol=1e-10,
    )
    assert len(seen) == (2 if "forward" in kind else 1)


def test_no_grad_and_inference_mode():
    flow, x = Sequential(*chain()), batch((4,))
    expected = flow(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z, log_det = flow(x)
        assert not z.requires_grad and torch.equal(z, expected[0]) and torch.equal(log_det, expected[1])
    level = GlowLevel([GlowStep(16, 3)])
    with torch.inference_mode():
        level(torch.randn(2, 4, 4, 4))
    torch.autograd.grad(level(torch.randn(2, 4, 4, 4))[0].sum(), level.steps[0].coupling.net[0].conv.weight)


class Noisy(nn.Module):
    """A network with batch norm and dropout, of images."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 6, 1),
            nn.BatchNorm2d(6, momentum=momentum),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(6, 4, 1),
        )

    def forward(self, x):
        return self.net(x)


class ByHand(Flow):
    """A coupling that knows nothing of this library."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context=None):
        shift, scale = self.net(x[:, :2]).chunk(2, dim=1)
        return torch.cat([x[:, :2], x[:, 2:] * torch.exp(torch.tanh(scale)) + shift], 1).flip(1), torch.tanh(
            scale
        ).flatten(1).sum(1)

    def inverse(self, z, context=None):
        z = z.flip(1)
        shift, scale = self.net(z[:, :2]).chunk(2, dim=1)
        return torch.cat([z[:, :2], (z[:, 2:] - shift) * torch.exp(-torch.tanh(scale))], 1), -torch.tanh(
            scale
        ).flatten(1).sum(1)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [AffineCoupling, ByHand])
def test_batch_norm_and_dropout_within_networks(kind, momentum):
    """Gradients, running statistics and the generator's state afterwards are those of stored activations."""
    steps = [randomize(kind(Noisy(momentum))).double() for _ in range(3)]
    x, results = batch((4, 2, 4), 5), []
    for run in (run_storing, run_reversible):
        own = copy.deepcopy(steps)
        torch.manual_seed(7)
        found = outputs_and_gradients(
            lambda own=own, run=run: run(own, x), [p for s in own for p in s.parameters()]
        )
        buffers = {f"{i}.{k}": v for i, s in enumerate(own) for k, v in s.named_buffers()}
        results.append((found, buffers, torch.get_rng_state()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-9, atol=1e-9)
    assert len(results[0][1]) == 9 and all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())
    assert results[0][1]["0.net.net.1.num_batches_tracked"] == 1
    assert torch.equal(results[0][2], results[1][2])


def test_a_shared_network_with_batch_norm():
    net = Noisy()
    steps = [randomize(AffineCoupling(net, swap_halves=f)).double() for f in (False, True)]
    x, results = batch((4, 2, 4), 5), []
    for run in (run_storing, run_reversible):
        own = copy.deepcopy(steps)
        torch.manual_seed(7)
        parameters = list(dict.fromkeys(p for s in own for p in s.parameters()))
        found = outputs_and_gradients(lambda own=own, run=run: run(own, x), parameters)
        results.append((found, dict(own[0].named_buffers())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())


@pytest.mark.parametrize("kind", [AffineCoupling, ByHand])
def test_a_network_that_moves_its_buffers_before_it_uses_them(kind):
    """Spectral norm: each forward pass in training mode takes a step of the power iteration."""
    net = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 8, 1)), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    steps, x, results = [randomize(kind(net)).double()], batch((4, 2, 4)), []
    for run in (run_storing, run_reversible):
        own = copy.deepcopy(steps)
        found = outputs_and_gradients(lambda own=own, run=run: run(own, x), list(own[0].parameters()))
        results.append((found, dict(own[0].named_buffers())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-10)
    assert len(results[0][1]) == 2 and all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())


def test_eval_between_forward_and_backward():
    """Backward runs the steps in the mode of the forward pass, and leaves the new one."""
    steps = [randomize(AffineCoupling(Noisy(), swap_halves=f)).double() for f in (False, True)]
    x, results = batch((4, 2, 4), 5), []
    for run in (run_storing, run_reversible):
        torch.manual_seed(7)
        own = copy.deepcopy(steps)
        z, log_det = run(own, x)
        for step in own:
            step.eval()
        (z.square().sum() + log_det.sum()).backward()
        results.append([p.grad for s in own for p in s.parameters()])
        assert not any(m.training for s in own for m in s.modules())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_generators_go_on_as_if_nothing_was_replayed():
    steps, draws = [randomize(AffineCoupling(Noisy()))], []
    for run in (run_storing, run_reversible):
        torch.manual_seed(7)
        z, _ = run(steps, torch.randn(5, 4, 2, 4))
        between = torch.rand(1)
        z.sum().backward()
        draws.append((between, torch.rand(1)))
    assert draws[0] == draws[1]


class Dtypes(nn.Module):
    """A network that writes down the dtype in which autocast runs it."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = conv(2, 4), []

    def forward(self, x):
        h = self.net(x)
        self.seen.append(h.dtype)
        return h


def test_autocast_is_that_of_the_forward_pass():
    steps = [randomize(AffineCoupling(Dtypes(), swap_halves=f)) for f in (False, True)]
    x, parameters = torch.randn(3, 4, 2, 4), [p for s in steps for p in s.parameters()]
    results = []
    for run in (run_storing, run_reversible):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = run(steps, x)
        assert z.dtype == torch.float32
        for step in steps:
            step.net.seen.clear()
        results.append(torch.autograd.grad(z.square().sum() + log_det.sum(), parameters))
        assert all(step.net.seen == [torch.bfloat16] * (run is run_reversible) for step in steps)
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).norm() <= 0.02 * expected.norm()
    z, _ = run_reversible(steps, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z.sum().backward()
    assert all(step.net.seen[-1] == torch.float32 for step in steps)


def test_autocast_caches_no_cast_without_its_gradient():
    """A network used within the chain and beside it in one region of autocast: its weights get the gradients of both."""
    net, x, results = nn.Linear(2, 4), torch.randn(3, 4), []
    for run in (run_storing, run_reversible):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, _ = run([AffineCoupling(net)], x)
            beside = net(x[:, :2])
        results.append(torch.autograd.grad(z.sum() + 100 * beside.float().sum(), net.weight)[0])
        assert torch.autograd.grad(net(x[:, :2]).sum(), net.weight)[0].abs().sum() > 0
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


INTO_IT, IN_ITS_PLACE = (lambda p, v: p.data.copy_(v), lambda p, v: setattr(p, "data", v))


@pytest.mark.parametrize("write, flag", [(INTO_IT, False), (IN_ITS_PLACE, False), (IN_ITS_PLACE, 0.0)])
def test_a_flow_of_another_library_that_initialises_itself(write, flag):
    """It does so in the first forward pass, and not again in the walk back, which calls its inverse and its forward."""

    class Init(Flow):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))
            self.register_buffer("done", torch.tensor(flag))

        def initialize(self, x):
            if not self.done:
                write(self.shift, -x.mean(0).to(self.shift.dtype))
                self.done.fill_(1)

        def forward(self, x, context=None):
            self.initialize(x)
            return x.tanh() + self.shift + x, (2 - x.tanh() ** 2).log().sum(1)

        def inverse(self, z, context=None):
            self.initialize(z)
            y, x = z - self.shift, z.clone()
            for _ in range(60):
                x = x - (x + x.tanh() - y) / (2 - x.tanh() ** 2)
            return x, -(2 - x.tanh() ** 2).log().sum(1)

    steps, x = [Init().double(), ActNorm(4).double()], 3 + batch((4,))
    other = copy.deepcopy(steps)
    expected = outputs_and_gradients(
        lambda: run_storing(other, x), [p for s in other for p in s.parameters()]
    )
    found = outputs_and_gradients(
        lambda: run_reversible(steps, x), [p for s in steps for p in s.parameters()]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps[0].shift, other[0].shift, rtol=0, atol=0)
    z, _ = run_reversible(steps, x)
    for _ in range(2):
        z.sum().backward(retain_graph=True)


def test_parametrizations_and_their_cache():
    """Weight norm, within a region that caches what it makes; and a network used beside the chain there."""
    net, x, results = mlp(2, 4).double(), batch((4,)), []
    nn.utils.parametrizations.weight_norm(net[0])
    step = AffineCoupling(net).double()
    nn.utils.parametrize.register_parametrization(step, "log_factor", nn.Softplus())
    for run in (run_storing, run_reversible):
        with nn.utils.parametrize.cached():
            z, _ = run([step], x)
            beside = net(x[:, :2])
            results.append(
                torch.autograd.grad(z.square().sum() + beside.square().sum(), list(step.parameters()))
            )
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_functional_call_and_replaced_parameters():
    flow, x = Sequential(*chain(2)), batch((4,))
    given = {name: p.detach().clone().mul_(1.1).requires_grad_() for name, p in flow.named_parameters()}
    results = []
    for flow.reversible in (False, True):
        z, log_det = torch.func.functional_call(flow, given, (x,))
        results.append(torch.autograd.grad(z.square().sum() + log_det.sum(), list(given.values())))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    p = flow[2].net[0].bias
    z, _ = flow(x)
    flow[2].net[0].bias = nn.Parameter(torch.zeros_like(p))
    z.square().sum().backward()
    assert p.grad.abs().sum() > 0 and flow[2].net[0].bias is not p and flow[2].net[0].bias.grad is None


def test_replicas_of_data_parallel_are_stored():
    """They have no parameters of their own, only attributes."""
    layer, x = trained(lambda: ActNorm(4)), batch((4,)).requires_grad_()
    replica = layer._replicate_for_data_parallel()
    replica.log_scale, replica.bias = 1 * layer.log_scale, 1 * layer.bias
    dx = torch.autograd.grad(
        run_reversible([replica, replica], x)[1].sum(), list(layer.parameters()), allow_unused=True
    )[0]
    torch.testing.assert_close(dx, torch.full((4,), 6.0, dtype=torch.float64))


def test_lazy_networks_and_meta_tensors():
    steps, x = [AffineCoupling(nn.LazyLinear(4))], torch.randn(3, 4)
    for _ in range(2):  # the first pass gives the network its parameters
        assert_as_stored(steps, x, tolerance=1e-4)
    steps = [step.to("meta") for step in chain(1)]
    assert run_reversible(steps, torch.empty(3, 4, dtype=torch.float64, device="meta"))[0].shape == (3, 4)


def test_flops_are_counted():
    """The counter hooks what comes into modules; a walk back costs a forward pass of each network more."""

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            z, log_det = run([trained(lambda: AffineCoupling(mlp(2, 4)))], batch((4,)).requires_grad_())
            (z.sum() + log_det.sum()).backward()
        return counter.get_total_flops()

    forward = 2 * 3 * (2 * 5 + 5 * 4)
    assert flops(run_reversible) == flops(run_storing) + forward == 4 * forward


def test_random_numbers_of_others_are_left_alone():
    """Where no step drew any, backward leaves the generator as others move it meanwhile, here a hook on a network in the walk."""
    steps = chain(1)
    z, _ = run_reversible(steps, batch((4,)))
    state, drawn = torch.get_rng_state(), []
    steps[2].net.register_forward_hook(lambda *_: drawn.append(torch.rand(1)))
    z.sum().backward()
    assert len(drawn) == 1 and not torch.equal(torch.get_rng_state(), state)


# refusals ---------------------------------------------------------------------------------------------------------------------


class OneWay(Flow):
    def forward(self, x, context=None):
        return 2 * x, x.new_full((x.shape[0],), 4 * 0.6931)


def test_a_step_without_an_inverse_is_refused():
    steps, x = [ActNorm(4).double().eval(), OneWay()], batch((4,)).requires_grad_()
    with pytest.raises(
        ValueError, match=r"steps\[1\]: OneWay has no inverse, expected .*; or pass reversible=False"
    ):
        Sequential(*steps)(x)
    with pytest.raises(ValueError, match=r"steps\[0\]: Linear has no inverse"):
        run_reversible([nn.Linear(4, 4).double()], x)
    Sequential(*steps, reversible=False)(x)[0].sum().backward()
    with torch.no_grad():
        Sequential(*steps)(x)


def test_an_inverse_that_is_none_is_refused():
    class Wrong(OneWay):
        def inverse(self, z, context=None):
            return z / 3, z.new_full((z.shape[0],), -4 * 0.6931)

    z, _ = run_reversible(
        [ActNorm(4).double().eval(), Wrong()], batch((4,)).requires_grad_(), activation_checkpoint_every=1
    )
    with pytest.raises(
        RuntimeError, match=r"steps\[1\]: forward\(inverse\(z\)\) of Wrong is off by .*reversible=False"
    ):
        z.sum().backward()


def test_a_parameter_that_changed_is_refused():
    def move(p):
        p.add_(1.0)

    def swap(p):
        p.data = p.data + 1.0

    for change in (move, swap):
        for frozen in (False, True):
            steps = chain(2)
            p = steps[4].lower.requires_grad_(not frozen)
            z, _ = run_reversible(steps, batch((4,)), activation_checkpoint_every=2)
            with torch.no_grad():
                change(p)
            with pytest.raises(
                RuntimeError,
                match=r"steps\[4\].lower of a reversible chain changed between forward and backward",
            ):
                z.sum().backward()


def test_a_fused_optimizer_is_seen():
    flow = Sequential(*[step.float() for step in chain(1)])
    optimizer = torch.optim.Adam(flow.parameters(), fused=True)
    flow(torch.randn(3, 4))[0].sum().backward()
    z, _ = flow(torch.randn(3, 4))
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        z.sum().backward()


def test_a_buffer_that_changed_is_refused():
    """Here by a pass in training mode in between, which moves the statistics that the first pass in eval mode used."""
    step, x = randomize(AffineCoupling(Noisy())).eval(), torch.randn(5, 4, 2, 4)
    z, _ = run_reversible([step], x)
    run_reversible([step.train()], x)
    with pytest.raises(RuntimeError, match=r"steps\[0\].net.net.1.* changed between forward and backward"):
        z.sum().backward()


def test_parameters_exchanged_by_the_forward_pass_are_refused():
    net = mlp(2, 4).double()
    net.register_forward_pre_hook(
        lambda *_: setattr(net[0], "bias", nn.Parameter(net[0].bias.detach().clone()))
    )
    with pytest.raises(RuntimeError, match="exchanged for others while it ran; pass reversible=False"):
        run_reversible([AffineCoupling(net).double()], batch((4,)))


def test_frozen_in_between():
    steps, x = chain(1), batch((4,))
    z, _ = run_reversible(steps, x)
    for step in steps:
        step.requires_grad_(False)
    z.sum().backward()


def test_other_contexts_and_log_dets_are_refused():
    class LogDet(ActNorm):
        def forward(self, x, context=None):
            return super().forward(x)[0], self.log_det

        def inverse(self, z, context=None):
            return super().inverse(z)

    x = batch((4,)).requires_grad_()
    with pytest.raises(TypeError, match="context: got tuple, expected a tensor or None"):
        run_reversible(chain(1), x, (x,))
    for log_det, got in ((torch.tensor(0.0), r"\[\]"), (torch.zeros(1), r"\[1\]"), (0.0, "float")):
        with pytest.raises(ValueError, match=rf"log_det of steps\[0\] \(LogDet\): got {got}, expected \[3\]"):
            step = LogDet(4).double().eval()
            step.log_det = log_det
            run_reversible([step], x)


def test_dropout_in_a_captured_graph_is_refused(monkeypatch):
    """A step that has been seen to draw, as the passes before a capture show."""
    steps = [AffineCoupling(Noisy()), AffineCoupling(conv(2, 4))]
    run_reversible(steps, torch.randn(5, 4, 2, 4))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert len(generators(torch.device("cuda"), steps[1:])) == 1
    with pytest.raises(RuntimeError, match="AffineCoupling draws random numbers .* captured CUDA graph"):
        generators(torch.device("cuda"), steps)


def test_what_fails_in_backward_leaves_all_as_it_was():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fails = Noisy(), False

        def forward(self, x):
            h = self.net(x)
            if self.fails:
                raise KeyError("here")
            return h

    step = randomize(AffineCoupling(Failing()))
    p = step.net.net.net[0].weight
    p.register_hook(lambda g: g)
    z, _ = run_reversible([step], torch.randn(5, 4, 2, 4))
    buffers, state = {k: v.clone() for k, v in step.named_buffers()}, torch.get_rng_state()
    step.net.fails = True
    step.eval()
    with pytest.raises(KeyError, match="here"):
        z.sum().backward()
    assert torch.equal(torch.get_rng_state(), state) and not step.net.training and len(p._backward_hooks) == 1
    assert all(torch.equal(v, buffers[k]) for k, v in step.named_buffers()) and not torch.is_autocast_enabled(
        "cpu"
    )


# with the rest of PyTorch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend, levels", [("aot_eager", 2), ("inductor", 1)])
def test_compiled_networks_inside(backend, levels):
    """Compiled in place, each network runs compiled in both passes; gradients are those of the eager model."""
    model = Glow((3, 8, 8), levels=levels, steps=2, hidden=4)
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    model.initialize(x)
    randomize(model, std=0.03)
    expected = outputs_and_gradients(lambda: (model(x, seed=1),), list(model.parameters()))
    torch._dynamo.utils.counters.clear()
    for flow in model.flows:
        for step in flow.steps:
            step.coupling.net.compile(backend=backend, fullgraph=True, dynamic=False)
    found = outputs_and_gradients(lambda: (model(x, seed=1),), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 2 * levels, "each level's networks, with and without gradients"
    model(x, seed=2).mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_around():
    """torch.compile of a whole flow breaks its graph at the chain and gives the same; with fullgraph=True it says what to do."""
    flow, x = Sequential(*[s.float() for s in chain(1)]), torch.randn(3, 4)
    parameters = list(flow.parameters())
    expected = outputs_and_gradients(lambda: flow(x), parameters)
    whole = torch.compile(flow, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reversible=False"):
        whole(x)
    with torch.no_grad():
        torch.testing.assert_close(list(whole(x)), expected[0], rtol=1e-5, atol=1e-5)
    compiled = torch.compile(flow, backend="aot_eager")
    torch.testing.assert_close(
        outputs_and_gradients(lambda: compiled(x), parameters), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed_data_parallel(find_unused_parameters):
    """Its hooks on parameters run, once, in each of two steps."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Glow((3, 8, 8), levels=2, steps=2, hidden=4)
        x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
        model.initialize(x)
        model(x, seed=1).mean().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        wrapped, reduced = (
            nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused_parameters),
            [],
        )

        def hook(state, bucket):
            reduced.append(len(bucket.gradients()))
            future = torch.futures.Future()
            future.set_result(2 * bucket.buffer())
            return future

        wrapped.register_comm_hook(None, hook)
        for _ in range(2):
            reduced.clear()
            model.zero_grad()
            wrapped(x, seed=1).mean().backward()
            assert sum(reduced) == len(expected)
            torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in expected])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("networks", [None, torch.bfloat16])
def test_on_a_gpu(networks):
    model = Glow((3, 16, 16), levels=2, steps=4, hidden=32, reversible=False).cuda()
    x = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, device="cuda")
    model.initialize(x)
    randomize(model, std=0.02)
    results = []
    for on in (False, True):
        for flow in model.flows:
            flow.reversible = on
        model.zero_grad()
        with torch.autocast("cuda", dtype=networks or torch.bfloat16, enabled=networks is not None):
            loss = model(x, seed=1).mean()
        loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (results[1] - results[0]).norm() <= (1e-4 if networks is None else 5e-2) * results[0].norm()


@pytest.mark.gpu
def test_dropout_on_a_gpu():
    steps = [randomize(AffineCoupling(Noisy(), swap_halves=f)).cuda() for f in (False, True)]
    x, results = torch.randn(5, 4, 2, 4, device="cuda"), []
    for run in (run_storing, run_reversible):
        torch.manual_seed(7)
        z, log_det = run(steps, x)
        results.append(
            torch.autograd.grad(z.square().sum() + log_det.sum(), [p for s in steps for p in s.parameters()])
        )
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_memory_of_a_step_on_a_gpu():
    """Each step more, one a level, adds at most 0.05 MiB to the peak, its weights and gradients aside."""

    def peak(k):
        model = Glow(levels=3, steps=k, hidden=512).cuda()
        x = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, device="cuda")
        model.initialize(x)
        model(x, seed=1).mean().backward()
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        model(x, seed=1).mean().backward()
        sizes = sum(p.nbytes for p in model.parameters())
        return torch.cuda.max_memory_allocated() - 2 * sizes - sum(b.nbytes for b in model.buffers())

    assert (peak(12) - peak(4)) / 8 <= 0.05 * 2**20
