"""Glow: its log-density against autograd's Jacobian, exact coding, sampling, and bits/dim by hand."""

import copy
import math
import pickle

import pytest
import torch
from torch.distributions import Normal

from fastflow.models import Glow
from fastflow.models.glow import CONV1X1, COUPLINGS, SCALES
from fastflow.models.model import Model
from fastflow.nn import ActNorm, Dequantize, GaussianPrior, Permute
from tests.support.cases import jacobian_log_det, name, pairwise, randomize

AXES = {
    "coupling": COUPLINGS,
    "conv1x1": CONV1X1,
    "scale": SCALES,
    "classes": [None, 3],
    "logit": [False, True],
    "n_bits": [8, 5],
    "levels": [1, 2],
}
every_variant = pytest.mark.parametrize("case", pairwise(**AXES), ids=name)


def small(**kwargs):
    return Glow(**{"image_shape": (3, 4, 4), "levels": 2, "steps": 2, "hidden": 6, **kwargs})


def images(model, n=3):
    return torch.randint(0, 2**model.n_bits, (n, *model.shape), dtype=torch.uint8)


def labels(model, n=3):
    return None if model.classes is None else torch.arange(n) % model.classes


def trained(**kwargs):
    """As after some training: initialised on a batch, then no parameter at a special value; eval mode."""
    model = small(**kwargs)
    model.initialize(images(model, 16), labels(model, 16))
    return randomize(model, std=0.05).eval()


@every_variant
def test_log_prob_is_the_jacobian_s(case):
    model = trained(**case).double()
    x, context = images(model), labels(model)
    y, log_det = model.dequantize(x, seed=5)

    def latents(y):
        out = []
        for i, flow in enumerate(model.flows):
            y, _ = flow(y)
            if i < len(model.splits):
                y, z, _ = model.splits[i](y)
                out.append(z.flatten(1))
        return torch.cat([*out, y.flatten(1)], dim=1)

    z, log_prior, kept, at = latents(y), 0.0, y, 0
    for i, flow in enumerate(model.flows):
        kept = flow(kept)[0]
        terms = 0.0, 0.0
        if i < len(model.splits):
            kept = kept.chunk(2, dim=1)[0]
            terms = model.splits[i].net(kept).chunk(2, dim=1)
        elif context is not None:
            terms = (
                v[context][:, :, None, None].expand_as(kept)
                for v in (model.prior.mean, model.prior.log_scale)
            )
        mean, log_scale = (torch.as_tensor(v, dtype=y.dtype).expand_as(kept).flatten(1) for v in terms)
        part = z[:, at : at + mean.shape[1]]
        at += mean.shape[1]
        log_prior = log_prior + Normal(mean, log_scale.exp()).log_prob(part).sum(1)
    assert at == 48
    expected = log_prior + log_det + jacobian_log_det(latents, y)
    found = model.log_prob(x, context, seed=5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    bits = -expected / (48 * math.log(2))
    torch.testing.assert_close(model.bits_per_dim(x, context, seed=5), bits, rtol=1e-9, atol=0)
    torch.testing.assert_close(model(x, context, seed=5), bits, rtol=1e-9, atol=0)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_of_encode_is_exact(case, dtype):
    model = trained(**case).to(dtype)
    constant = [torch.full((3, 3, 4, 4), value, dtype=torch.uint8) for value in (0, 2**model.n_bits - 1)]
    # on images so unlike those of its ActNorms, an exponential scale may overflow, and a spline may be too flat to invert
    # in float32, as their documentation says
    flat = case["coupling"] == "spline" and dtype == torch.float32
    for x in (images(model), *([] if flat or case["scale"] == "exp" else constant)):
        latents = model.encode(x, labels(model))
        assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes() and latents[0].dtype == dtype
        back = model.decode(latents, labels(model))
        assert back.dtype == torch.uint8 and torch.equal(back, x)


def test_latents_come_back_from_what_they_decode_to():
    """The flows under decode are the inverse of those under encode, on latents that no image had."""
    model = trained().double()
    latents = tuple(torch.randn(3, *shape, dtype=torch.float64) for shape in model.latent_shapes())
    y = latents[1]
    y = model.flows[0].inverse(model.splits[0].inverse(model.flows[1].inverse(y)[0], latents[0]))[0]
    kept, z, _ = model.splits[0](model.flows[0](y)[0])
    torch.testing.assert_close((z, model.flows[1](kept)[0]), latents, rtol=0, atol=1e-10)


@every_variant
def test_sample(case):
    model = trained(**case)

    def draw(seed, temperature=1.0):
        return model.sample(4, temperature, labels(model, 4), torch.Generator().manual_seed(seed))

    x = draw(1)
    assert (
        x.shape == (4, 3, 4, 4)
        and x.dtype == torch.uint8
        and int(x.max()) < 2**model.n_bits
        and not x.requires_grad
    )
    assert torch.equal(draw(1), x) and not torch.equal(draw(2), x)
    assert torch.equal(draw(1, temperature=0.0), draw(2, temperature=0.0))
    torch.manual_seed(3)
    first = model.sample(4, context=labels(model, 4))
    torch.manual_seed(3)
    assert torch.equal(model.sample(4, context=labels(model, 4)), first)


def test_a_generator_leaves_torchs_own_alone():
    model, state = trained(), torch.get_rng_state()
    model.sample(2, generator=torch.Generator().manual_seed(1))
    model.log_prob(images(model).zero_(), seed=1)
    torch.set_rng_state(state)
    model.sample(2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_change_density_and_samples():
    model = trained(classes=3)
    with torch.no_grad():
        model.prior.mean.copy_(torch.tensor([-3.0, 0.0, 3.0])[:, None])
    x, zeros = images(model), torch.zeros(3, dtype=torch.int64)
    by_class = [model.log_prob(x, zeros + k, seed=1) for k in range(3)]
    assert all((by_class[i] != by_class[j]).all() for i, j in ((0, 1), (1, 2)))
    torch.testing.assert_close(
        model.log_prob(x, torch.tensor([2, 0, 1]), seed=1),
        torch.stack([by_class[2][0], by_class[0][1], by_class[1][2]]),
    )
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert not torch.equal(
        *(model.sample(3, context=zeros + k, generator=g) for k, g in zip((0, 2), generators, strict=True))
    )


def test_an_image_does_not_depend_on_its_batch():
    model = trained()
    x = images(model, 4)
    whole = model.log_prob(x, seed=3)
    parts = [model.log_prob(x[:1], seed=3), model.log_prob(x[1:], seed=3, offset=1)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [None, 3])
def test_empty_batch(classes):
    model = small(classes=classes)
    x, context = images(model, 0), labels(model, 0)
    assert model(x, context).shape == (0,) and model.sample(0, context=context).shape == (0, 3, 4, 4)
    assert model.decode(model.encode(x, context), context).shape == (0, 3, 4, 4)
    assert not any(layer.initialized for layer in model.modules() if isinstance(layer, ActNorm))


def test_gradients_reach_every_parameter():
    model = trained(classes=3).train()
    model(images(model), labels(model)).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("conv1x1", CONV1X1)
def test_first_batch_initialises_every_actnorm(conv1x1):
    """By the first forward pass in training mode, by initialize in either mode, and to the same values."""
    by_forward = small(conv1x1=conv1x1)
    by_call, x = copy.deepcopy(by_forward).eval(), images(by_forward, 16)
    by_forward(x, seed=1)
    by_call.initialize(x, seed=1)
    assert not by_call.training
    layers = [m for m in by_forward.modules() if isinstance(m, ActNorm)]
    assert len(layers) == 2 * 2 * 3 and all(layer.initialized for layer in layers)
    state = by_call.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in by_forward.state_dict().items())
    with torch.no_grad():  # a second pass takes the path with all weights at once, and means the same
        torch.testing.assert_close(by_forward(x, seed=1), by_call(x, seed=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_copies_are_the_same_model(copied):
    model = trained(classes=3)
    if copied:
        other = copied(model)
    else:
        other = Glow(**model.config)
        other.load_state_dict(model.state_dict())
    x = images(model)
    for training in (False, True):  # and nothing is initialised again
        assert torch.equal(other.train(training)(x, labels(model), seed=1), model(x, labels(model), seed=1))


def test_state_dict_holds_nothing_but_tensors():
    assert all(isinstance(v, torch.Tensor) for v in small(classes=2, logit=True).state_dict().values())


def test_same_bits_twice():
    model = trained().train()

    def run():
        model.zero_grad()
        loss = model(images(model).fill_(7), seed=2).mean()
        loss.backward()
        return loss, *(p.grad.clone() for p in model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_channels_last_changes_nothing():
    model = trained()
    x = images(model)
    torch.testing.assert_close(
        model(x.contiguous(memory_format=torch.channels_last), seed=1), model(x, seed=1), rtol=1e-5, atol=0
    )


def test_an_untrained_model_s_bits_are_those_of_its_dequantization():
    """Before initialization, with a permutation for a convolution, Glow is the identity: the value by hand holds for it."""
    model = small(conv1x1="reverse").double().eval()
    x = images(model)
    y = (x + torch.ops.fastflow.uniform_noise(x.shape, torch.tensor(4), 0, torch.float64)) / 256 - 0.5
    torch.testing.assert_close(model(x, seed=4), by_hand(y, 8), rtol=1e-12, atol=0)


# bits/dim by hand, see docs/maths.md -------------------------------------------------------------------------------------------------


def by_hand(y, n_bits):
    """Of an identity flow under a standard normal prior: n + log2 sqrt(2 pi) + mean(y^2) / (2 ln 2)."""
    return n_bits + 0.5 * math.log2(2 * math.pi) + y.square().flatten(1).mean(1) / (2 * math.log(2))


def one_layer(flow, image_shape, n_bits=8):
    return (
        Model(image_shape, Dequantize(n_bits), [flow], [], GaussianPrior(image_shape), None, {})
        .double()
        .eval()
    )


@pytest.mark.parametrize("n_bits", [8, 5, 1])
def test_identity_flow_for_given_noise(n_bits):
    model = one_layer(Permute(3), (3, 4, 4), n_bits)
    x = images(model)
    u = torch.ops.fastflow.uniform_noise(x.shape, torch.tensor(9), 0, torch.float64)
    y = (x + u) / 2**n_bits - 0.5
    torch.testing.assert_close(model(x, seed=9), by_hand(y, n_bits), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [0, 100, 255])
def test_identity_flow_on_average_over_the_noise(value):
    """E[y^2] of a pixel v is (b^3 - a^3) / (3 (b - a)) with a, b the ends of its bin; black and white: 9.5 bits, grey: 9.33."""
    model = one_layer(Permute(1), (1, 64, 64))
    bits = model(torch.full((16, 1, 64, 64), value, dtype=torch.uint8), seed=1)
    a, b = value / 256 - 0.5, (value + 1) / 256 - 0.5
    expected = 8 + 0.5 * math.log2(2 * math.pi) + (b**3 - a**3) / (3 * (b - a)) / (2 * math.log(2))
    # y^2 varies by at most 2 |y| / 256 within a bin, and there are 65536 draws
    assert abs(bits.mean().item() - expected) < 5 * (1 / 256) / (2 * math.log(2)) / 65536**0.5
    assert expected == pytest.approx({0: 9.5046, 100: 9.3341, 255: 9.5046}[value], abs=1e-4)


@pytest.mark.parametrize("std", [0.03, 0.1])
def test_gaussian_of_known_entropy(std):
    """Pixels that are a rounded N(0, std^2), each weighted by its probability, under that very density.

    With d = 1/256, rounding and the uniform noise each add d^2 / 12 to the variance (Sheppard), so on average over the noise
    bits/dim = n + 1/2 log2(2 pi e std^2), the entropy, + d^2 / (12 std^2 ln 2).
    """
    layer = ActNorm(1)
    with torch.no_grad():
        layer.log_scale.fill_(-math.log(std))
    model, d = one_layer(layer, (1, 64, 64)), 1 / 256
    with torch.no_grad():
        bits = model(torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 64, 64), seed=2)
    edges = torch.arange(257, dtype=torch.float64) / 256 - 0.5
    weights = (0.5 * (1 + torch.erf(edges / (std * 2**0.5)))).diff()
    expected = 8 + 0.5 * math.log2(2 * math.pi * math.e * std**2) + d**2 / (12 * std**2 * math.log(2))
    # of one draw, and over the draws of all the bins that count
    spread = d / (12**0.5 * std * math.log(2)) / (2 * math.pi**0.5 * std / d * 4096) ** 0.5
    assert abs((weights * bits).sum() - expected).item() < 5 * spread < 1e-3


def test_splines_begin_as_the_identity_and_have_the_asked_form():
    model = small(coupling="spline", bins=6, bound=2.5, steps=1)
    couplings = [step.coupling for flow in model.flows for step in flow.steps]
    assert all((coupling.bins, coupling.bound) == (6, 2.5) for coupling in couplings)
    assert [coupling.net[-1].weight.shape[0] for coupling in couplings] == [6 * 17, 12 * 17]
    x = images(model, 16)
    model.initialize(x)
    for coupling, c in zip(couplings, (12, 24), strict=True):
        z, log_det = coupling(v := torch.randn(3, c, 2, 2))
        torch.testing.assert_close((z, log_det), (v, torch.zeros(3)), rtol=0, atol=1e-5)
    default = Glow((3, 4, 4), levels=1, steps=1, hidden=4, coupling="spline").flows[0].steps[0].coupling
    assert (default.bins, default.bound) == (4, 3.0)  # as in the paper's code for 8-bit CIFAR-10


@pytest.mark.parametrize("output_start", [1.0, 0.01])
def test_components_of_mixtures_begin_apart(output_start):
    """Whatever factor the outputs of the networks begin with; otherwise, all components would stay equal."""
    model = small(coupling="mixture", components=3, levels=1, output_start=output_start)
    model.initialize(images(model, 16))
    for step in model.flows[0].steps:
        params = step.coupling.net(torch.randn(2, 6, 2, 2))
        expected = torch.zeros(11)
        expected[5:8] = torch.tensor([-1.0, 0.0, 1.0])
        torch.testing.assert_close(
            params.unflatten(1, (6, 11)).movedim(2, -1), expected.expand(2, 6, 2, 2, 11), rtol=0, atol=1e-5
        )
    model(images(model)).mean().backward()
    means = model.flows[0].steps[0].coupling.net[-1].bias.grad.view(6, 11)[:, 5:8]
    assert (means[:, :-1] != means[:, 1:]).all()


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(
    "options, said",
    [
        ({"bins": 0}, "bins: got 0, expected a positive integer"),
        ({"bins": 2.0}, "bins: got 2.0, expected a positive integer"),
        ({"bound": 0.0}, "bound: got 0.0, expected a positive number"),
        ({"bound": math.inf}, "bound: got inf, expected a positive number"),
        ({"components": 0}, "components: got 0, expected a positive integer"),
    ],
)
def test_options_of_splines_and_mixtures_are_checked_for_every_coupling(coupling, options, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        small(coupling=coupling, **options)


@pytest.mark.parametrize("coupling", ["spline", "mixture"])
def test_networks_are_prepared_at_once(coupling, monkeypatch):
    """A level casts the weights of all its networks once under autocast, and every network uses these."""
    model = trained(coupling=coupling, levels=1, network="plain")
    given = []
    for step in model.flows[0].steps:
        forward = step.coupling.net.forward

        def spy(x, context=None, shared_args=(), forward=forward):
            given.append([v.dtype for v in shared_args])
            return forward(x, context, shared_args)

        monkeypatch.setattr(step.coupling.net, "forward", spy)
    with torch.no_grad():
        model(images(model))
        with torch.autocast("cpu", torch.bfloat16):
            model(images(model))
            model.decode(model.encode(images(model)))
    assert given[:2] == [[torch.float32]] * 2
    assert given[2:] == [[torch.float32] + [torch.bfloat16] * 3] * 6


@pytest.mark.parametrize("coupling", ["spline", "mixture"])
@pytest.mark.parametrize("network", ["plain", "fused"])
def test_bits_per_dim_of_splines_and_mixtures_with_bfloat16_networks(network, coupling):
    model = trained(coupling=coupling, network=network).to(memory_format=torch.channels_last)
    x = images(model)
    with torch.no_grad():
        exact = model(x, seed=1)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, seed=1)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
