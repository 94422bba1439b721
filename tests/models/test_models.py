"""Every model: density against autograd's Jacobian, exact coding, samples, gradients of both kinds, overfitting, files, sizes by hand."""

import copy
import pickle
import re

import pytest
import torch
from torch.distributions import Normal

import fastflow
from fastflow import ops
from fastflow.models import NICE, Glow, RealNVP, VectorGlow, mnist_flow
from fastflow.nn import AffineCoupling, BatchNorm, Permute
from tests.support.cases import jacobian_log_det, randomize
from tests.support.gradients import outputs_and_gradients
from tests.support.models import (
    MNIST,
    MODELS,
    SIX_LEVELS,
    data,
    labels,
    nice,
    of,
    realnvp,
    trained,
    vector_glow,
)

F64 = torch.float64


# density, coding, samples -----------------------------------------------------------------------------------------------------


@of(MODELS)
def test_log_prob_is_the_jacobian_s(make):
    model = trained(make).double()
    x, context = data(model), labels(model)
    y, log_det = model.dequantize(x, seed=5)

    def latents(y):
        out = []
        for i, flow in enumerate(model.flows):
            y, _ = flow(y)
            if i < len(model.splits):
                y, z, _ = model.splits[i](y)
                out.append(z)
        return [*out, y]

    kept, expected = (
        y,
        log_det + jacobian_log_det(lambda y: torch.cat([z.flatten(1) for z in latents(y)], dim=1), y),
    )
    *early, last = latents(y)
    for flow, split, z in zip(model.flows, model.splits, early, strict=False):
        kept = flow(kept)[0].chunk(2, dim=1)[0]
        mean, log_scale = (torch.zeros_like(z),) * 2 if split.net is None else split.net(kept).chunk(2, dim=1)
        expected = expected + Normal(mean, log_scale.exp()).log_prob(z).flatten(1).sum(1)
    expected = expected + model.prior.log_prob(last, context)
    torch.testing.assert_close(model.log_prob(x, context, seed=5), expected, rtol=1e-9, atol=1e-9)


@of(MODELS, SIX_LEVELS, MNIST)
def test_decode_of_encode(make):
    """Exact for uint8, constant samples too; to rounding for vectors."""
    model = trained(make, n=4)
    discrete = model.n_bits is not None
    samples = [data(model)] + [
        torch.full((3, *model.shape), v, dtype=torch.uint8)
        for v in (0, 2 ** (model.n_bits or 1) - 1)
        if discrete
    ]
    for x in samples:
        latents = model.encode(x, labels(model))
        assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes()
        assert sum(z[0].numel() for z in latents) == x[0].numel()
        back = model.decode(latents, labels(model))
        assert back.dtype == x.dtype and back.shape == x.shape
        assert torch.equal(back, x) if discrete else (back - x).abs().max() < 1e-5 * (1 + x.abs().max())


@of(MODELS, MNIST)
def test_samples(make):
    model = trained(make, n=4)
    n = 2 if "MNISTFlow" in type(model).__name__ else 4

    def draw(seed, temperature=1.0):
        return model.sample(n, temperature, labels(model, n), torch.Generator().manual_seed(seed))

    x = draw(1)
    assert x.shape == (n, *model.shape) and x.dtype == (
        torch.float32 if model.n_bits is None else torch.uint8
    )
    assert not x.requires_grad and not x.is_inference()
    assert model.n_bits is None or int(x.max()) < 2**model.n_bits
    assert torch.equal(draw(1), x) and not torch.equal(draw(2), x)
    if "mixture" not in model.config.get("prior", ""):  # whose component is drawn
        assert torch.equal(draw(1, temperature=0.0), draw(2, temperature=0.0))
    assert not torch.equal(draw(1, temperature=0.3), x)
    torch.manual_seed(3)
    first = model.sample(n, context=labels(model, n))
    torch.manual_seed(3)
    assert torch.equal(model.sample(n, context=labels(model, n)), first)


@of(MODELS)
def test_samples_are_of_the_density(make):
    """Noise that decodes to a sample is what encodes it again: latents are standard under the prior."""
    model = trained(make).double()
    context = labels(model)
    z = tuple(torch.randn(3, *shape, dtype=F64) for shape in model.latent_shapes())
    y = z[-1]
    for i in reversed(range(len(model.flows))):
        y = model.flows[i].inverse(y if i >= len(model.splits) else model.splits[i].inverse(y, z[i]))[0]
    for i, flow in enumerate(model.flows):
        y = flow(y)[0]
        if i < len(model.splits):
            y, out, _ = model.splits[i](y)
            torch.testing.assert_close(out, z[i], rtol=0, atol=1e-9)
    torch.testing.assert_close(y, z[-1], rtol=0, atol=1e-9)
    assert model.prior.log_prob(y, context).isfinite().all()


@of(MODELS)
def test_a_sample_does_not_depend_on_its_batch(make):
    """In eval mode; the noise is that of its place."""
    model = trained(make).double()
    x, context = data(model, 4), labels(model, 4)
    first, rest = (None, None) if context is None else (context[:1], context[1:])
    parts = [model(x[:1], first, seed=3), model(x[1:], rest, seed=3, offset=1)]
    torch.testing.assert_close(torch.cat(parts), model(x, context, seed=3), rtol=1e-12, atol=1e-12)


def test_models_of_half_as_many_bits_count_a_pixel_alike():
    """Bits/dim of n_bits = 8 and of 5 differ by 3 where pixels are multiples of 8 and noise is as wide: an untrained NICE is Gaussian."""
    models = [nice(n_bits=n, prior="gaussian").double() for n in (8, 5)]
    x, noise = torch.randint(0, 32, (3, 8), dtype=torch.uint8), torch.rand(3, 8, dtype=F64)
    y = (x + noise) / 32 - 0.5
    log_p = Normal(torch.zeros((), dtype=F64), 1.0).log_prob(y).sum(1)
    for model, scale in zip(models, (256, 32), strict=True):
        values = 8 * x if scale == 256 else x
        within = (8 * (x + noise) - values) if scale == 256 else noise
        found, log_det = model.dequantize(values, noise=within)
        assert torch.equal(model.flows[0](found)[1], torch.zeros(3, dtype=F64))
        torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            model.prior.log_prob(model.flows[0](found)[0]) + log_det,
            log_p - 8 * torch.tensor(scale, dtype=F64).log(),
            rtol=1e-12,
            atol=0,
        )


# training ---------------------------------------------------------------------------------------------------------------------


@of(MODELS, SIX_LEVELS, {"MNIST, multiscale": MNIST["MNIST, multiscale"]})
def test_reversible_gradients_are_the_stored_ones(make):
    """In training mode: from the first batch, which initialises or sets statistics, and from the next."""
    on = randomize(make(), std=0.02).double()
    off = make(reversible=False).double()
    off.load_state_dict(on.state_dict())
    for n in (6, 3):
        n = 2 if on.shape == (1, 28, 28) else n
        x, context = data(on, n), labels(on, n)
        found, expected = (
            outputs_and_gradients(lambda m=m, x=x, c=context: (m(x, c, seed=1),), list(m.parameters()))
            for m in (on, off)
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
        assert sum(bool(g.abs().sum() > 0) for g in expected[1]) > 0.5 * len(expected[1])
    stored = off.state_dict()
    assert all(torch.equal(v, stored[k]) for k, v in on.state_dict().items())


@of(MODELS)
def test_every_parameter_gets_a_gradient(make):
    model = trained(make).train()
    model(data(model, 6), labels(model, 6)).mean().backward()
    without = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum()
    ]
    assert not without


@of({name: make for name, make in MODELS.items() if "three" not in name})
def test_one_batch_is_learned_by_heart(make):
    """Two samples, many times each: within 40 steps of Adam each value takes at least a bit less.

    Within 100 steps for vectors, whose scales the first batch has set already. It stops as soon as five steps in
    a row average a bit less.
    """
    model = make()
    x = data(model, 2).repeat(4, *[1] * len(model.shape))
    context = None if model.classes is None else torch.tensor([0, 1]).repeat(4)
    model.initialize(x, context)
    # a step moves a log scale by the learning rate, and NICE has but one for each dimension
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-2 if isinstance(model, NICE) else 1e-2), []
    for step in range(100 if model.n_bits is None else 40):
        loss = model(x, context, seed=step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step >= 5 and sum(losses[-5:]) / 5 < losses[0] - 1:
            return
    pytest.fail(f"the losses are {losses}")


def test_order_of_pixels_in_realnvp():
    """The half that leaves at a scale holds pixels 01 and 10 of each block (arXiv:1605.08803, figure 3)."""
    x = torch.randn(2, 3, 4, 4)
    (permute,) = [m for m in realnvp(image_shape=(3, 4, 4)).modules() if isinstance(m, Permute)]
    expected = ops.squeeze2d(x, order="realnvp")
    assert torch.equal(permute(ops.squeeze2d(x, order="space"))[0], expected)


def test_couplings_of_realnvp_alternate():
    first, last = realnvp().flows
    couplings = [(m.mask, m.swap_halves) for m in (*first, *last) if isinstance(m, AffineCoupling)]
    masks = ["checkerboard"] * 3 + ["halves"] * 3 + ["checkerboard"] * 4
    assert couplings == list(zip(masks, [False, True, False] * 2 + [False, True] * 2, strict=True))


def test_two_passes_of_realnvp_before_backward():
    model = realnvp()
    loss = model(data(model, 4)).mean()
    model(data(model, 4))
    with pytest.raises(RuntimeError, match="changed between forward and backward.*pass reversible=False"):
        loss.backward()


def test_an_evaluation_leaves_realnvp_as_it_was():
    model = trained(realnvp)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = data(model)
    model.decode(model.encode(x))
    model.sample(2)
    model(x).mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(isinstance(m, BatchNorm) and m.batches == 1 for m in model.modules())


# files, copies, errors --------------------------------------------------------------------------------------------------------


@of(MODELS, {"MNIST, vardeq": MNIST["MNIST, vardeq"]})
def test_saved_and_loaded(make, tmp_path):
    saved_and_loaded(trained(make, n=4), tmp_path)


# batch normalization's running statistics, one scale for each dimension, labels, a prior that is a layer
@of({name: MODELS[name] for name in ("RealNVP", "NICE", "Glow, shuffle, classes", "VectorGlow, mixture")})
def test_saved_and_loaded_in_float64(make, tmp_path):
    saved_and_loaded(trained(make, n=4).double(), tmp_path)


def saved_and_loaded(model, tmp_path):
    fastflow.save(tmp_path / "model.pt", model)
    loaded = fastflow.load(tmp_path / "model.pt")
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    found = loaded.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in model.state_dict().items())
    x, context = data(model, 2), labels(model, 2)
    with torch.no_grad():
        assert torch.equal(loaded(x, context, seed=1), model(x, context, seed=1))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x, context, seed=1), model(x, context, seed=1))


COUNT = "expected a positive integer"


@pytest.mark.parametrize(
    "make, arguments",
    [
        (
            realnvp,
            {
                "scales": {
                    0: COUNT,
                    4: r"4 for image_shape \(2, 4, 4\), expected a height and width that 8 divides",
                },
                "hidden": {0: COUNT},
                "blocks": {0: COUNT, 1.0: COUNT},
                "n_bits": {9: "expected 1 to 8"},
                "classes": {0: COUNT},
                "momentum": {1.0: "expected a number from 0 to below 1"},
                "activation_checkpoint_every": {0: COUNT},
                "image_shape": {(4, 4): r"expected \(C, H, W\)", (0, 4, 4): r"expected \(C, H, W\)"},
            },
        ),
        (
            nice,
            {
                "features": {
                    7: "expected an even number of dimensions",
                    0: "even",
                    (1, 3, 3): "even",
                    (): "even",
                },
                "couplings": {0: COUNT},
                "hidden": {0: COUNT},
                "layers": {0: COUNT},
                "prior": {"mixture": "expected one of 'logistic', 'gaussian'"},
                "n_bits": {0: COUNT, 9: "expected 1 to 8"},
            },
        ),
        (
            vector_glow,
            {
                "features": {1: "expected 2 or more", 0: COUNT},
                "steps": {0: COUNT},
                "hidden": {0: COUNT},
                "layers": {0: COUNT},
                "components": {0: COUNT},
                "prior": {"logistic": "expected one of 'gaussian', 'mixture'"},
            },
        ),
        (
            mnist_flow,
            {
                "variant": dict.fromkeys(
                    ("small", None, 1), "expected one of 'simple', 'vardeq', 'multiscale'"
                ),
                "reversible": dict.fromkeys((None, "no", 1), "expected True or False"),
                "pre_activation": dict.fromkeys((None, "2022", 0), "expected True or False"),
            },
        ),
    ],
    ids=["RealNVP", "NICE", "VectorGlow", "MNISTFlow"],
)
def test_a_wrong_argument_is_named(make, arguments):
    for name, values in arguments.items():
        for value, said in values.items():
            with pytest.raises(ValueError, match=f"^{name}: got .*{said}"):
                make(**{name: value})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: vector_glow()(torch.zeros(2, 4).double()), "x: got dtype torch.float64, expected float32 vectors [N, 4]"),
        (lambda: vector_glow()(torch.zeros(2, 2)), "x: got shape [2, 2], expected float32 vectors [N, 4]"),
        (lambda: vector_glow()(torch.full((2, 4), torch.nan)), "x: got inf or NaN, expected float32 vectors [N, 4]"),
        (lambda: nice()(torch.zeros(2, 8)), "x: got dtype torch.float32, expected uint8 vectors [N, 8] with values in [0, 256)"),
        (lambda: nice(n_bits=3)(8 + torch.zeros(2, 8, dtype=torch.uint8)), "x: got a value of 8, expected uint8 vectors [N, 8]"),
        (lambda: realnvp(classes=2)(torch.zeros(2, 2, 4, 4, dtype=torch.uint8)), "context: got None, expected int64 classes [2] in [0, 2)"),
        (lambda: realnvp().eval().decode((torch.zeros(1, 4, 2, 2),)), "latents: got 1 tensors, expected 2, as encode gives them"),
    ],
)  # fmt: skip
def test_wrong_samples_are_named(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()


# torch.compile ----------------------------------------------------------------------------------------------------------------


# the modes of RealNVP differ; the layers of the other two compute the same in both
@pytest.mark.parametrize(
    "name, training",
    [
        ("RealNVP of one scale", False),
        ("RealNVP of one scale", True),
        ("NICE", True),
        ("VectorGlow, mixture", False),
    ],
)
def test_compiled(name, training):
    torch._dynamo.reset()
    eager = trained(MODELS[name], reversible=False).train(training)
    if name == "RealNVP of one scale":  # the second half of its couplings compiles as the first
        (chain,) = eager.flows
        chain.flows = chain.flows[: len(chain.flows) // 2]
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x, context = data(eager, 6), labels(eager, 6)
        found, expected = (
            outputs_and_gradients(lambda f=f: (f(x, context, seed=torch.tensor(seed)),), list(m.parameters()))  # noqa: B023
            for f, m in ((compiled, other), (eager, eager))
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


# numbers of parameters, by hand -----------------------------------------------------------------------------------------------


def size(model):
    return sum(p.numel() for p in model.parameters())


def conv(c_in, c_out, k, bias=True):
    return c_in * c_out * k * k + (c_out if bias else 0)


def linear(c_in, c_out):
    return (c_in + 1) * c_out


def glow_size(levels, steps, hidden, c=3, additive=False, mixing="lu", learned=0, factor=True):
    """By level: of each step an actnorm (2 C), a matrix (C^2; as LU two squares, of which triangles are read, and a diagonal, as in
    openai/glow), and the network of half the channels; its convolutions without a bias have an actnorm, the last one a bias and a scale
    for each channel; a factor for each changed channel. Between levels a zero convolution gives mean and scale. ``learned`` means and
    scales of the last latent's channels."""
    total = 0
    for level in range(levels):
        matrix = {"lu": 2 * (4 * c) ** 2 + 4 * c, "plain": (4 * c) ** 2, None: 0}[mixing]
        c *= 4
        out = c // 2 if additive else c
        network = (
            conv(c // 2, hidden, 3, False)
            + 2 * hidden
            + conv(hidden, hidden, 1, False)
            + 2 * hidden
            + conv(hidden, out, 3)
            + out
        )
        total += steps * (2 * c + matrix + network + (0 if additive or not factor else c // 2))
        if level < levels - 1:
            total += conv(c // 2, c, 3) + c
            c //= 2
    return total + 2 * c * learned


TWO = {"steps": 2}  # an option counts in each step
GLOWS = {
    "the paper's of CIFAR-10": ({}, glow_size(3, 32, 512)),
    "the exercise's": ({"steps": 16}, glow_size(3, 16, 512)),
    "of 256x256": ({"image_shape": (3, 256, 256), "levels": 6, **TWO}, glow_size(6, 2, 512)),
    "additive": ({"coupling": "additive", **TWO}, glow_size(3, 2, 512, additive=True)),
    "reverse": ({"conv1x1": "reverse", **TWO}, glow_size(3, 2, 512, mixing=None)),
    "shuffle": ({"conv1x1": "shuffle", **TWO}, glow_size(3, 2, 512, mixing=None)),
    "plain": ({"conv1x1": "plain", **TWO}, glow_size(3, 2, 512, mixing="plain")),
    "without a factor": ({"scale": "sigmoid", **TWO}, glow_size(3, 2, 512, factor=False)),
    "class-conditional": ({"classes": 10, **TWO}, glow_size(3, 2, 512, learned=10)),
    "with a learned prior": ({"learned_prior": True, **TWO}, glow_size(3, 2, 512, learned=1)),
}


@pytest.mark.parametrize("kwargs, expected", GLOWS.values(), ids=GLOWS.keys())
def test_size_of_glow(kwargs, expected):
    with torch.device("meta"):
        assert size(Glow(**kwargs)) == expected


def weight_normed(c_in, c_out, k, bias=True):
    return conv(c_in, c_out, k, bias) + c_out


def residual_network_size(c_in, c_out, hidden, blocks):
    block = (
        2 * hidden + weight_normed(hidden, hidden, 3, False) + 2 * hidden + weight_normed(hidden, hidden, 3)
    )
    skips = (blocks + 1) * weight_normed(hidden, hidden, 1)
    return (
        2 * c_in
        + weight_normed(2 * c_in, hidden, 3)
        + blocks * block
        + skips
        + 2 * hidden
        + weight_normed(hidden, c_out, 1)
    )


def realnvp_size(scales, hidden, blocks, c=3):
    """A factor for each channel that a coupling changes, beside its network; its batch norm between couplings has no parameters."""
    total = 0
    for scale in range(scales):
        last = scale == scales - 1
        total += (4 if last else 3) * (c + residual_network_size(c, 2 * c, hidden, blocks))
        if not last:
            c, hidden = 4 * c, 2 * hidden
            total += 3 * (c // 2 + residual_network_size(c // 2, c, hidden, blocks))
            c //= 2
    return total


@pytest.mark.parametrize("size_of, scales, hidden, blocks", [(32, 2, 64, 8), (32, 4, 32, 4), (64, 5, 32, 2)])
def test_size_of_realnvp(size_of, scales, hidden, blocks):
    with torch.device("meta"):
        assert size(RealNVP((3, size_of, size_of), scales, hidden, blocks)) == realnvp_size(
            scales, hidden, blocks
        )


def mlp_size(c_in, c_out, hidden, layers):
    return linear(c_in, hidden) + (layers - 1) * linear(hidden, hidden) + linear(hidden, c_out)


def test_size_of_nice():
    with torch.device("meta"):
        assert size(NICE()) == size(NICE((1, 28, 28))) == 4 * mlp_size(392, 392, 1000, 5) + 784


@pytest.mark.parametrize("prior", ["gaussian", "mixture"])
def test_size_of_vector_glow(prior):
    step = 2 * 2 + (2 * 2 * 2 + 2) + mlp_size(1, 2, 64, 2) + 1
    with torch.device("meta"):
        assert size(VectorGlow(prior=prior)) == 10 * step + (2 * (2 + 2 + 1) if prior == "mixture" else 0)


@pytest.mark.parametrize(
    "variant, published, since_2022",
    [("simple", 335128, 556312), ("vardeq", 379556, 628388), ("multiscale", 1062090, 1711818)],
)
def test_size_of_the_tutorial_s_flows(variant, published, since_2022):
    """As the tutorial prints them; with pre-activation, 9 h^2 more in each of the three blocks of a network of h channels."""
    assert size(mnist_flow(variant)) == published
    assert size(mnist_flow(variant, pre_activation=True)) == since_2022
