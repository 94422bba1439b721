"""Glow of floating point images, and the error of uint8 models that are given floats."""

import math
import re

import pytest
import torch
from torch.distributions import Normal

import fastflow
from fastflow.models import NICE, Glow
from fastflow.nn import Dequantize
from fastflow.trainer.cli import main
from tests.support.cases import randomize

F64 = torch.float64


def glow(**options):
    return Glow((2, 4, 4), levels=2, steps=1, hidden=4, n_bits=None, **options)


def test_the_density_is_exact_and_images_come_back():
    model = randomize(glow(), std=0.05).double().eval()
    x = 300 + 100 * torch.randn(2, 2, 4, 4, dtype=F64)

    def latents(x):
        return torch.cat([z.flatten(1) for z in model.encode(x, normalized=True, differentiable=True)], dim=1)

    z = latents(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: latents(x).sum(0), x).transpose(0, 1).flatten(2)
    expected = Normal(0, 1).log_prob(z).sum(1) + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(model.log_prob(x), expected)
    torch.testing.assert_close(model.bits_per_dim(x), -expected / (32 * math.log(2)))
    torch.testing.assert_close(model.decode(model.encode(x)), x)
    samples, log_prob = model.rsample_and_log_prob(2)
    torch.testing.assert_close(model.log_prob(samples), log_prob)


def test_the_bound_of_uint8_images_is_the_density_of_the_dequantized_ones():
    """bits/dim of images and of their floats differ by the logarithm of the bin width."""
    floats = randomize(glow(), std=0.05).eval()
    integers = Glow((2, 4, 4), levels=2, steps=1, hidden=4).eval()
    integers.load_state_dict(floats.state_dict())
    x = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    y, _ = Dequantize()(x, seed=1)
    torch.testing.assert_close(integers.bits_per_dim(x, seed=1), floats.bits_per_dim(y) + 8)


def test_fit_standardizes_and_a_file_keeps_it(tmp_path, capsys):
    x = 1000 + 50 * torch.randn(64, 2, 4, 4)
    model = glow(reversible=False)
    fastflow.fit(model, x, standardize=True, max_epochs=2, batch_size=32)
    fastflow.save(tmp_path / "glow.pt", model)
    loaded = fastflow.load(tmp_path / "glow.pt")
    torch.testing.assert_close(loaded.log_prob(x), model.eval().log_prob(x))
    assert main(["sample", str(tmp_path / "glow.pt"), "--out", str(tmp_path / "out.png")]) == 1
    assert "got a Glow of floating point images, expected a model of uint8 images" in capsys.readouterr().err
    assert loaded.n_bits is None and 500 < loaded.sample(8).mean() < 1500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bits": None, "logit": True}, "logit: got True, expected False with n_bits=None: floats are not"),
        ({"standardize": True}, "standardize: got True, expected False, unless n_bits is None"),
        ({"n_bits": 0}, "n_bits: got 0, expected a positive integer or None"),
        ({"n_bits": 9}, "n_bits: got 9, expected 1 to 8, the bit depth of uint8 images"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Glow((2, 4, 4), levels=1, steps=1, hidden=4, **options)


def test_uint8_models_turn_floats_away_with_the_way_to_integers():
    x = torch.rand(2, 2, 4, 4)
    way = "; floats in [0, 1] become uint8 by (255 * x).round().to(torch.uint8)"
    message = (
        f"x: got dtype torch.float32, expected uint8 images [N, 2, 4, 4] with values in [0, 32){way} >> 3"
    )
    model = Glow((2, 4, 4), levels=1, steps=1, hidden=4, n_bits=5)
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        model(x)
    model((255 * x).round().to(torch.uint8) >> 3)
    with pytest.raises(ValueError, match=re.escape(f"vectors [N, 8] with values in [0, 256){way}") + "$"):
        NICE(8, hidden=4).encode(torch.rand(2, 8))
    with pytest.raises(
        ValueError, match=re.escape("got dtype torch.uint8, expected float32 images [N, 2, 4, 4]") + "$"
    ):
        glow()(x.byte())
