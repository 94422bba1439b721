"""ResidualFlow: the published layers, estimates in both modes, contexts, fits, options of images and of vectors."""

import math
import re

import pytest
import torch

import fastflow
from fastflow import nn as fnn
from fastflow.models import ResidualFlow
from tests.support.cases import randomize

F64 = torch.float64
IMAGE = {"features": (1, 8, 8), "blocks": 1, "hidden": 4, "scales": 2, "dense_blocks": 2, "dense_hidden": 3}


def test_the_layers_of_images_are_the_published_ones():
    """ActNorm before the first block and after each, a squeeze between scales, dense blocks at the end."""
    flow = ResidualFlow(**IMAGE | {"blocks": 2}).flows[0]
    block = ["Residual", "ActNorm"]
    expected = ["ActNorm", *2 * block, "Squeeze", *2 * block, "Flatten", *2 * block]
    assert [type(layer).__name__ for layer in flow] == expected
    nets = [layer.net for layer in flow if isinstance(layer, fnn.Residual)]
    assert [net.first is None for net in nets] == [True] + 5 * [False]
    kernels = [[m.weight.shape[-1] for m in net.net if hasattr(m, "weight")] for net in nets[:4]]
    assert kernels == 4 * [[3, 1, 3]]
    assert [tuple(m.weight.shape) for m in nets[-1].layers] == [(3, 64), (3, 3), (64, 3)]
    # a bound of 0.94 for a network is 0.98 for each of its three layers
    assert all(
        layer.bound == pytest.approx(0.98, abs=1e-3) for layer in nets[0].net if hasattr(layer, "bound")
    )


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dense_blocks", [None, 1])
def test_shapes_of_latents(split, dense_blocks):
    model = ResidualFlow(**IMAGE | {"split": split, "dense_blocks": dense_blocks})
    last = (2, 4, 4) if split else (4, 4, 4)
    expected = [(2, 4, 4)] * split + [last if dense_blocks is None else (math.prod(last),)]
    assert model.latent_shapes() == expected
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    latents = model.eval().encode(x)
    assert [tuple(z.shape[1:]) for z in latents] == expected and torch.equal(model.decode(latents), x)


def test_training_draws_and_eval_repeats():
    model = randomize(ResidualFlow(6, blocks=2, hidden=8), std=0.3)
    x = torch.randn(16, 6)
    model.initialize(x)
    first, second = (model.train().log_prob(x) for _ in range(2))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    repeated = [model.eval().log_prob(x) for _ in range(2)]
    assert torch.equal(*repeated) and torch.equal(torch.get_rng_state(), state)
    seeds = [m.seed for m in model.modules() if isinstance(m, fnn.Residual)]
    assert seeds == [0, 1]


def test_training_is_unbiased():
    """The mean of estimates of a batch within 4 standard errors of the exact log-density."""
    torch.manual_seed(0)
    model = randomize(ResidualFlow(5, blocks=2, hidden=8, lipschitz=0.8), std=0.4).double()
    x = torch.randn(1, 5, dtype=F64)
    model.eval().log_prob(x)  # norms of these weights
    blocks = [m for m in model.modules() if isinstance(m, fnn.Residual)]
    for block in blocks:
        block.log_det = "exact"
    expected = model.log_prob(x)
    for block in blocks:
        block.log_det = "roulette"
        block.training = True  # the estimator only: weights, and so norms, do not move
    with torch.no_grad():
        draws = torch.stack([model.log_prob(x.expand(64, 5)).mean() for _ in range(150)])
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - expected).abs() <= 4 * error and error < 0.05


def test_reversible_estimates_have_the_same_gradients():
    """Backward repeats the noise and the number of terms."""
    x, found = torch.randn(4, 6, dtype=F64), []
    for reversible in (False, True):
        torch.manual_seed(0)
        model = randomize(ResidualFlow(6, blocks=2, hidden=4, reversible=reversible), std=0.3).double()
        torch.manual_seed(1)
        loss = -model.log_prob(x).mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_a_context():
    model = randomize(ResidualFlow(2, context_features=3, blocks=2, hidden=8), std=0.5).double().eval()
    x, context = torch.randn(6, 2, dtype=F64), torch.randn(6, 3, dtype=F64)
    log_prob = model.log_prob(x, context)
    assert (log_prob != model.log_prob(x, context.flip(0))).all()
    torch.testing.assert_close(model.log_prob(x, context[:1])[0], log_prob[0])
    torch.testing.assert_close(model.decode(model.encode(x, context), context), x, rtol=1e-9, atol=1e-9)
    drawn, density = model.rsample_and_log_prob(5, context[:1])
    torch.testing.assert_close(model.log_prob(drawn, context[:1]), density, rtol=1e-9, atol=1e-9)
    density.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(1 <= n < 1000 for n in model.inverse_iterations())


def test_a_fit_of_a_ring():
    """Better than the Gaussian with the covariance of the data."""
    torch.manual_seed(0)
    angle = 2 * torch.pi * torch.rand(2000)
    x = torch.stack([angle.cos(), angle.sin()], 1) * (2 + 0.1 * torch.randn(2000, 1))
    gaussian = 1 + math.log(2 * math.pi) + 0.5 * math.log(x.T.cov().det())
    model = ResidualFlow(2, blocks=3, hidden=16)
    fastflow.fit(model, x, max_epochs=12, batch_size=250, lr=1e-2, progress=False)
    assert -model.eval().log_prob(x).mean() < gaussian - 0.2


@pytest.mark.parametrize(
    "options, said",
    [
        ({"features": 0}, "features: got 0, expected a positive integer"),
        ({"features": (3, 4)}, "features: got (3, 4), expected a number of dimensions or (C, H, W)"),
        ({"features": 2, "scales": 2}, "scales: got 2, expected the default, 3: it is an option of images"),
        ({"features": 2, "n_bits": 5}, "n_bits: got 5, expected the default, 8: it is an option of images"),
        ({"features": (1, 6, 4)}, "scales: got 3 for features (1, 6, 4), expected a height and width that 4"),
        ({"features": (1, 4, 4), "context_features": 2}, "context_features: got 2, expected None for images"),
        (
            {"features": (1, 4, 4), "standardize": True},
            "standardize: got True, expected False, unless n_bits",
        ),
        ({"features": 2, "lipschitz": 1.0}, "lipschitz: got 1.0, expected a number between 0 and 1"),
    ],
)
def test_options(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ResidualFlow(**options)
