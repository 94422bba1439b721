"""Normalized latents of multi-scale models and of every kind of prior."""

import math

import pytest
import torch

import fastflow.nn as fnn
from fastflow.models import FlowModel, Glow, RealNVP, VectorGlow, mnist_flow

SEED = 11


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def trained(model, x, context=None):
    """A model whose coupling networks, splits and priors are not at their start values."""
    model.initialize(x, context, seed=0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model.double().eval()


def images(n, shape):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def learned():
    return FlowModel(VectorGlow(3, steps=2).flows[0], fnn.GaussianPrior((3,), learned=True))


CASES = {
    "glow": lambda: (Glow(image_shape=(3, 8, 8), levels=3, steps=1, hidden=8), images(8, (3, 8, 8)), None),
    "glow with classes": lambda: (
        Glow(image_shape=(3, 8, 8), levels=2, steps=1, hidden=8, classes=2),
        images(8, (3, 8, 8)),
        torch.arange(8) % 2,
    ),
    "realnvp": lambda: (
        RealNVP(image_shape=(1, 8, 8), scales=2, hidden=8, blocks=1),
        images(8, (1, 8, 8)),
        None,
    ),
    "mnist": lambda: (mnist_flow("multiscale"), images(4, (1, 28, 28)), None),
    "learned prior of vectors": lambda: (learned(), drawn(64, 3), None),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    torch.manual_seed(0)
    model, x, context = CASES[request.param]()
    model = trained(model, x, context)
    return model, x if x.dtype == torch.uint8 else x.double(), context


def test_decode_is_the_inverse_of_encode(case):
    model, x, context = case
    latents = model.encode(x, context, normalized=True)
    back = model.decode(latents, context, normalized=True)
    assert torch.equal(back, x) if x.dtype == torch.uint8 else torch.allclose(back, x, atol=1e-10)


def test_latents_are_those_of_encode_less_mean_over_scale(case):
    model, x, context = case
    raw, latents = model.encode(x, context), model.encode(x, context, normalized=True)
    check(latents[-1], raw[-1], *model.prior.mean_and_log_scale(len(x), context))
    y = raw[-1]
    for i in reversed(range(len(model.splits))):
        kept, _ = model.flows[i + 1].inverse(y)
        check(latents[i], raw[i], *model.splits[i].mean_and_log_scale(kept))
        y = model.splits[i].inverse(kept, raw[i])


def check(z, raw, mean, log_scale):
    if mean is None:
        assert torch.equal(z, raw)
        return
    mean, log_scale = (v.view(-1, *[1] * (raw.ndim - 2)) if v.ndim == 1 else v for v in (mean, log_scale))
    assert torch.allclose(z, (raw - mean) / log_scale.exp(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(z, raw, atol=1e-2)


def test_log_prob_is_the_density_of_normalized_latents_and_the_log_dets(case):
    model, x, context = case
    y, log_prob = model.dequantize(x, seed=3)
    for i, flow in enumerate(model.flows):
        y, log_det = flow(y)
        log_prob = log_prob + log_det
        if i < len(model.splits):
            y, z, _ = model.splits[i](y)
            z, log_det = model.splits[i].normalize(y, z)
            back, opposite = model.splits[i].denormalize(y, z)
            assert torch.allclose(opposite, -log_det, rtol=1e-12)
            assert torch.allclose(model.splits[i].normalize(y, back)[0], z, atol=1e-12)
            log_prob = log_prob + log_det + standard(z)
    z, log_det = model.prior.normalize(y, context)
    assert torch.allclose(model.prior.denormalize(z, context)[0], y, atol=1e-12)
    expected = log_prob + log_det + standard(z)
    assert torch.allclose(model.log_prob(x, context, seed=3), expected, rtol=1e-10)


def standard(z):
    return -(z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


def test_standard_gaussian_noise_decodes_to_samples():
    """The mean over many decoded draws equals the mean over many samples, within 5 standard errors."""
    torch.manual_seed(0)
    model = trained(Glow(image_shape=(1, 8, 8), levels=2, steps=1, hidden=4), images(16, (1, 8, 8)))
    n = 4000
    latents = tuple(torch.randn(n, *shape, dtype=torch.float64) for shape in model.latent_shapes())
    decoded, sampled = (
        x.double().mean((1, 2, 3)) for x in (model.decode(latents, normalized=True), model.sample(n))
    )
    raw = model.decode(latents).double().mean((1, 2, 3))
    error = ((decoded.var() + sampled.var()) / n).sqrt()
    assert (decoded.mean() - sampled.mean()).abs() < 5 * error
    assert (raw.mean() - sampled.mean()).abs() > 5 * error


def test_normalized_latents_of_continuous_samples_keep_the_graph():
    torch.manual_seed(0)
    model = trained(learned(), drawn(64, 3))
    x = drawn(2, 3).double().requires_grad_()
    (z,) = model.encode(x, normalized=True, differentiable=True)
    assert torch.autograd.grad(z.square().sum(), x)[0].abs().min() > 0


def test_latents_of_a_mixture_stay_as_they_are():
    model = trained(VectorGlow(2, steps=2, prior="mixture"), drawn(64, 2))
    (raw,), (z,) = (model.encode(drawn(4, 2).double(), normalized=n) for n in (False, True))
    z_prior, log_det = model.prior.normalize(raw)
    assert torch.equal(z, raw) and torch.equal(z_prior, raw) and torch.equal(log_det, torch.zeros(4).double())


@pytest.mark.parametrize("missing", [0, 1])
def test_decode_names_the_latent_that_is_none(missing):
    model = Glow(image_shape=(3, 8, 8), levels=2, steps=1, hidden=4).eval()
    latents = list(model.encode(images(2, (3, 8, 8))))
    latents[missing] = None
    with pytest.raises(ValueError, match=rf"latents\[{missing}\]: got None, expected a tensor"):
        model.decode(tuple(latents))
