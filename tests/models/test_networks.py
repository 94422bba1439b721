"""Coupling networks that the caller chooses, and the sizes of the MNIST flows."""

import re

import pytest
import torch
from torch import nn

import fastflow
from fastflow.models import Glow, MNISTFlow, RealNVP, mnist_flow
from fastflow.nn import AffineCoupling, GatedNetwork, MixtureCDFCoupling, SplineCoupling
from tests.support.cases import randomize

COUPLINGS = AffineCoupling, SplineCoupling, MixtureCDFCoupling


class Conv(nn.Conv2d):
    """A network that adds its context, if it gets one, to x."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x, context=None):
        return super().forward(x if context is None else torch.cat([x, context], dim=1))


MODELS = {
    "Glow": lambda network: Glow((1, 4, 4), levels=2, steps=1, network=network),
    "additive Glow": lambda network: Glow((1, 4, 4), levels=1, steps=2, coupling="additive", network=network),
    "Glow, mixture": lambda network: Glow((1, 4, 4), levels=1, steps=2, coupling="mixture", network=network),
    "Glow, spline": lambda network: Glow((1, 4, 4), levels=1, steps=2, coupling="spline", network=network),
    "RealNVP": lambda network: RealNVP((1, 4, 4), scales=2, network=network),
    "simple": lambda network: mnist_flow("simple", depth=2, network=network),
    "multiscale": lambda network: mnist_flow("multiscale", depth=4, network=network),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_networks_are_those_of_the_function(make):
    asked = []

    def network(in_channels, out_channels):
        asked.append((in_channels, out_channels))
        return Conv(in_channels, out_channels)

    model = make(network)
    assert asked == [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, Conv)]
    assert len(asked) == sum(isinstance(m, COUPLINGS) for m in model.modules())
    randomize(model, std=0.1).double().eval()
    x = torch.randint(0, 256, (2, *model.shape), dtype=torch.uint8)
    assert torch.equal(model.decode(model.encode(x)), x)
    model(x).sum().backward()
    assert all(p.grad is not None for m in model.modules() if isinstance(m, Conv) for p in m.parameters())


def test_other_functions():
    with pytest.raises(
        ValueError, match=r"network: got a function that returns list for \(2, 4\) channels, expected"
    ):
        Glow((1, 4, 4), levels=1, steps=1, network=lambda i, o: [])
    with pytest.raises(ValueError, match=r"params: got shape \[2, 3, 2, 2\], expected \[2, 4, 2, 2\]"):
        Glow((1, 4, 4), levels=1, steps=1, network=lambda i, o: Conv(i, o - 1))(
            torch.zeros(2, 1, 4, 4).byte()
        )
    names = "one of 'plain', 'fused', 'auto', or a function of (in_channels, out_channels)"
    with pytest.raises(ValueError, match=re.escape(f"network: got 'fast', expected {names}")):
        Glow((1, 4, 4), levels=1, network="fast")
    with pytest.raises(
        ValueError, match=re.escape("network: got 'plain', expected one of None, or a function")
    ):
        RealNVP(network="plain")


def test_a_file_holds_the_weights_of_a_function_s_networks(tmp_path):
    model = MODELS["Glow"](Conv)
    fastflow.save(tmp_path / "glow.pt", model)
    with pytest.raises(fastflow.CheckpointError, match="holds the weights of 'Glow' without its options"):
        fastflow.load(tmp_path / "glow.pt")
    other = fastflow.load(tmp_path / "glow.pt", into=MODELS["Glow"](Conv))
    x = torch.zeros(1, 1, 4, 4).byte()
    torch.testing.assert_close(other.eval()(x, seed=0), model.eval()(x, seed=0))


@pytest.mark.parametrize("variant", ["simple", "vardeq", "multiscale"])
def test_sizes_of_the_mnist_flows(variant, tmp_path):
    model = mnist_flow(variant, depth=4, width=4, blocks=1, alpha=0.1)
    networks = [m for m in model.modules() if isinstance(m, GatedNetwork)]
    widths = [network.conv_in.out_channels for network in networks]
    of_flow = [4, 6, 8, 8] if variant == "multiscale" else [4] * 4
    assert widths == ([] if variant == "simple" else [2] * 4) + of_flow
    assert {len(network.blocks) for network in networks} == {1} and model.dequantize.alpha == 0.1
    fastflow.save(tmp_path / "model.pt", model)
    assert fastflow.load(tmp_path / "model.pt").config == model.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"width": 3},
            "width: got 3, expected an even number, the dequantization's networks have half of it",
        ),
        ({"depth": 6}, "depth: got 6, expected a multiple of 4 for 'multiscale'"),
        ({"depth": 0}, "depth: got 0, expected a positive integer"),
        ({"alpha": 0.0}, "alpha: got 0.0, expected a number between 0 and 1"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MNISTFlow(**options)
