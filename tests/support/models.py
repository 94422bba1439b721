"""Small models of every kind, their samples and classes: the cases of the tests that hold for any model."""

import pytest
import torch

from fastflow.models import (
    IAF,
    MAF,
    NICE,
    Glow,
    NeuralSplineFlow,
    RealNVP,
    ResidualFlow,
    VectorGlow,
    mnist_flow,
)
from fastflow.models.mnist_flow import VARIANTS
from tests.support.cases import randomize


def realnvp(**kwargs):
    return RealNVP(**{"image_shape": (2, 4, 4), "scales": 2, "hidden": 4, "blocks": 1} | kwargs)


def nice(**kwargs):
    return NICE(**{"features": 8, "hidden": 5, "layers": 2} | kwargs)


def vector_glow(**kwargs):
    return VectorGlow(**{"features": 4, "steps": 2, "hidden": 5} | kwargs)


def neural_spline_flow(**kwargs):
    return NeuralSplineFlow(
        **{"features": 3, "steps": 2, "hidden": 5, "blocks": 1, "bins": 3, "reversible": True} | kwargs
    )


def maf(model=MAF, **kwargs):
    return model(
        **{"features": 3, "steps": 2, "hidden": 5, "activation": "tanh", "reversible": True} | kwargs
    )


def residual_flow(**kwargs):
    return ResidualFlow(**{"features": 3, "blocks": 2, "hidden": 5, "log_det": "exact"} | kwargs)


def glow(**kwargs):
    return Glow(**{"image_shape": (3, 4, 4), "levels": 2, "steps": 2, "hidden": 5} | kwargs)


MODELS = {
    "RealNVP": realnvp,
    "RealNVP of one scale": lambda **kw: realnvp(image_shape=(1, 3, 5), scales=1, **kw),
    "RealNVP of three scales, classes, 5 bits": lambda **kw: realnvp(
        image_shape=(1, 4, 8), scales=3, classes=3, n_bits=5, **kw
    ),
    "NICE": nice,
    "NICE of images, Gaussian, 5 bits": lambda **kw: nice(
        features=(2, 3, 2), couplings=3, layers=1, prior="gaussian", n_bits=5, **kw
    ),
    "VectorGlow": vector_glow,
    "VectorGlow, mixture": lambda **kw: vector_glow(
        features=2, layers=1, prior="mixture", components=3, **kw
    ),
    "NeuralSplineFlow": neural_spline_flow,
    "NeuralSplineFlow, autoregressive": lambda **kw: neural_spline_flow(autoregressive=True, **kw),
    "MAF": maf,
    "MAF, batch normalization, residual": lambda **kw: maf(
        batch_norm=True, residual=True, order="random", layers=1, **kw
    ),
    "IAF": lambda **kw: maf(IAF, **kw),
    "ResidualFlow": residual_flow,
    "ResidualFlow of images": lambda **kw: residual_flow(
        features=(1, 4, 2), blocks=1, scales=2, split=True, dense_blocks=1, dense_hidden=3, n_bits=5, **kw
    ),
    "Glow, additive, reverse, learned prior": lambda **kw: glow(
        coupling="additive", conv1x1="reverse", learned_prior=True, **kw
    ),
    "Glow, mixture": lambda **kw: glow(coupling="mixture", components=2, output_start=0.1, **kw),
    "Glow, spline": lambda **kw: glow(coupling="spline", bins=3, bound=2.0, **kw),
    "Glow, shuffle, classes": lambda **kw: glow(conv1x1="shuffle", classes=3, **kw),
}
MNIST = {f"MNIST, {variant}": lambda variant=variant, **kw: mnist_flow(variant, **kw) for variant in VARIANTS}
SIX_LEVELS = {
    "Glow of six levels": lambda **kw: glow(image_shape=(1, 64, 64), levels=6, steps=1, hidden=4, **kw)
}


def of(*groups):
    made = {name: make for group in groups for name, make in group.items()}
    return pytest.mark.parametrize("make", made.values(), ids=made.keys())


def data(model, n=3):
    if model.n_bits is None:
        return torch.randn(n, *model.shape, dtype=model.dequantize.like.dtype)
    return torch.randint(0, 2**model.n_bits, (n, *model.shape), dtype=torch.uint8)


def labels(model, n=3):
    return None if model.classes is None else torch.arange(n) % model.classes


def trained(make, n=16, **kwargs):
    """As after some training: statistics of a batch, no parameter at a special value; eval mode."""
    model = make(**kwargs)
    model.initialize(data(model, n), labels(model, n))
    return randomize(model, std=0.05).eval()
