"""Models of one's own levels: shapes of the latents, densities, exact coding, and errors that name the level."""

import re

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Laplace, Normal

import fastflow
from fastflow import nn as fnn
from fastflow.models import ImageFlow
from tests.support.cases import randomize

F64 = torch.float64


def coupling(channels, **options):
    return fnn.AffineCoupling(
        nn.Conv2d(channels - channels // 4, 2 * (channels // 4), 3, padding=1), split=0.75, **options
    )


def two_squeezes(**options):
    """Two squeezes before the first split, none before the second; parts of a quarter and of two thirds."""
    first = fnn.Sequential(fnn.Squeeze(), coupling(4), fnn.Squeeze(), fnn.ActNorm(16), coupling(16))
    second = fnn.Sequential(fnn.InvertibleConv1x1(12), coupling(12))
    third = fnn.GlowStep(8, hidden=4)
    splits = [fnn.Split(16, kept=0.75), fnn.Split(12, prior="standard", kept=8)]
    return ImageFlow((1, 8, 8), [first, second, third], splits, **options)


def trained(model):
    return randomize(model, std=0.05).double().eval()


def test_levels_of_any_number_of_squeezes():
    model = trained(two_squeezes())
    assert model.latent_shapes() == [(4, 2, 2), (4, 2, 2), (8, 2, 2)]
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    latents = model.encode(x)
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes()
    assert torch.equal(model.decode(latents), x)
    normalized = model.encode(x, normalized=True)
    assert torch.equal(model.decode(normalized, normalized=True), x)
    again = model.sample(3, latents=(None, None, latents[-1]))
    assert again.shape == x.shape and again.dtype == torch.uint8


def test_the_density_is_the_sum_over_the_levels():
    model = trained(two_squeezes(dequantize=fnn.IdentityDequantize()))
    x = torch.randn(2, 1, 8, 8, dtype=F64)

    def latents(x):
        return torch.cat([z.flatten(1) for z in model.encode(x, normalized=True, differentiable=True)], dim=1)

    z = latents(x)
    # Jacobian of the normalized latents, which are standard Gaussians
    jacobian = torch.autograd.functional.jacobian(lambda x: latents(x).sum(0), x).transpose(0, 1).flatten(2)
    expected = Normal(0, 1).log_prob(z).sum(1) + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(model.log_prob(x), expected)
    model.sample_and_log_prob(2)


def test_vectors_classes_and_contexts():
    flows = [fnn.AffineCoupling(fnn.MLP(2, 4, 4)), fnn.Scale(1)]
    model = ImageFlow((4,), flows, [fnn.Split(4, "standard", kept=1)], dequantize=fnn.IdentityDequantize())
    model.standardize_by(5 + 9 * torch.randn(64, 4))
    weights, standardized = model.state_dict(), {"dequantize": fnn.IdentityDequantize(), "standardize": True}
    ImageFlow((4,), flows, [fnn.Split(4, "standard", kept=1)], **standardized).load_state_dict(weights)
    assert model.latent_shapes() == [(3,), (1,)] and model.sample(5).shape == (5, 4)
    step = fnn.GlowStep(2, hidden=4, context_features=3)
    model = ImageFlow((2, 2, 2), [step], context_shape=(3,))
    x = torch.zeros(2, 2, 2, 2).byte()
    assert model.log_prob(x, torch.randn(2, 3)).shape == (2,)
    model = ImageFlow((2, 2, 2), [fnn.ActNorm(2)], prior=fnn.GaussianPrior((2, 2, 2), classes=3))
    assert model.log_prob(x, torch.tensor([0, 2])).shape == (2,)


@pytest.mark.parametrize("training", [True, False])
def test_construction_sets_no_state_and_draws_no_numbers(training):
    flow = fnn.Sequential(fnn.ActNorm(2), fnn.BatchNorm(2), fnn.Permute(2))
    flow.train(training)
    before = {key: t.clone() for key, t in flow.state_dict().items()}
    generator = torch.get_rng_state()
    ImageFlow((2, 3, 3), [flow])
    assert flow.training is training and torch.equal(torch.get_rng_state(), generator)
    for key, t in flow.state_dict().items():
        torch.testing.assert_close(t, before[key], msg=key)


class ReadsValues(fnn.Flow):
    """A flow that the meta device cannot run."""

    def forward(self, x, context=None):
        return (x + 1 if x.sum().item() > 0 else x), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z, z.new_zeros(len(z))


def test_a_flow_that_reads_values_runs_on_zeros():
    assert ImageFlow((1, 2, 2), [ReadsValues()]).latent_shapes() == [(1, 2, 2)]


class Crops(fnn.Flow):
    def forward(self, x, context=None):
        return x[:, :1], x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z, z.new_zeros(len(z))


class OneLogDet(Crops):
    def forward(self, x, context=None):
        return x, x.new_zeros(())


@pytest.mark.parametrize(
    ("flows", "splits", "options", "message"),
    [
        ([fnn.ActNorm(2), fnn.Squeeze()], [fnn.Split(2)], {}, "flows[1]: got samples of shape [1, 3, 4], expected a shape that fits (Val"),
        ([fnn.ActNorm(4)], [], {}, "flows[0]: got samples of shape [2, 3, 4], expected a shape that fits (ValueError: x: got shape [1, 2"),
        ([fnn.ActNorm(2)] * 2, [fnn.Split(4)], {}, "splits[0]: got samples of shape [2, 3, 4], expected a shape that fits (ValueError: x"),
        ([Crops()], [], {}, "flows[0]: got samples [2, 3, 4], latents [1, 3, 4], and from them samples [1, 3, 4], expected an inv"),
        ([OneLogDet()], [], {}, "log_det of flows[0]: got shape [], expected [1] ([N], one value per sample)"),
        ([fnn.ActNorm(2)] * 2, [], {}, "splits: got 0 for 2 flows, expected one split between each two flows"),
        ([], [], {}, "splits: got 0 for 0 flows, expected one split between each two flows"),
        ([nn.Identity()], [], {}, "flows[0]: got Identity, expected a Flow"),
        (fnn.ActNorm(2), [], {}, "flows: got ActNorm, expected a list of Flows"),
        ([fnn.ActNorm(2)] * 2, [fnn.ActNorm(2)], {}, "splits[0]: got ActNorm, expected a Split"),
        ([fnn.ActNorm(2)], [], {"prior": fnn.GaussianPrior((2, 4, 3))}, "prior: got shape [2, 4, 3], expected [2, 3, 4], the shape of"),
        ([fnn.ActNorm(2)], [], {"prior": "gaussian"}, "prior: got str, expected a fastflow.nn.Prior or a torch.distributions."),
        ([fnn.ActNorm(2)], [], {"prior": Laplace(torch.zeros(3), 1)}, "prior: got shape [3], expected [2, 3, 4], the shape of the last"),
        ([fnn.ActNorm(2)], [], {"dequantize": fnn.ActNorm(2)}, "dequantize: got ActNorm, expected a Dequantize or an IdentityDequantize"),
        ([fnn.ActNorm(2)], [], {"standardize": True}, "standardize: got True, expected False for uint8 samples"),
        ([fnn.ActNorm(2)], [], {"shape": (2, 0, 4)}, "shape: got (2, 0, 4), expected one or more positive integers"),
    ],
)  # fmt: skip
def test_errors_name_the_level(flows, splits, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ImageFlow(**{"shape": (2, 3, 4), "flows": flows, "splits": splits} | options)


def test_distributions_as_priors_and_files(tmp_path):
    prior = Independent(Laplace(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)), 3)
    model = ImageFlow((2, 3, 4), [fnn.ActNorm(2)], prior=prior)
    assert model.sample(2).shape == (2, 2, 3, 4)
    model = two_squeezes()
    fastflow.save(tmp_path / "model.pt", model)
    into = fastflow.load(tmp_path / "model.pt", into=two_squeezes())
    torch.testing.assert_close(into.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("prior", ["standard", "learned"])
@pytest.mark.parametrize(("kept", "channels"), [(1, 1), (5, 5), (0.34, 2)])
def test_splits_of_any_fraction(prior, kept, channels):
    split = randomize(fnn.Split(6, prior, kept=kept)).double()
    x = torch.randn(2, 6, 2, 3, dtype=F64)
    first, z, log_prob = split(x)
    assert torch.equal(first, x[:, :channels]) and torch.equal(z, x[:, channels:])
    assert torch.equal(split.inverse(first, z), x) and split.sample(first).shape == x.shape
    mean, log_scale = (torch.zeros_like(z),) * 2 if split.net is None else split.net(first).chunk(2, dim=1)
    torch.testing.assert_close(log_prob, Normal(mean, log_scale.exp()).log_prob(z).flatten(1).sum(1))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "kept: got 0, expected a number of channels, or a fraction of them between 0 and 1"),
        (6, "kept: got 6, by which 6 of 6 channels pass through, expected at least 1 channel in each part"),
        (
            0.1,
            "kept: got 0.1, by which 0 of 6 channels pass through, expected at least 1 channel in each part",
        ),
    ],
)
def test_splits_that_leave_one_part_empty(kept, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fnn.Split(6, kept=kept)
