"""fastflow.fit: a known density, early stopping, best weights, reproducibility, and errors that name the argument."""

import copy

import numpy as np
import pytest
import torch

import fastflow
from fastflow import fitting
from fastflow import nn as fnn
from fastflow.models import FlowModel, Glow, VectorGlow
from fastflow.trainer.nonfinite import NonFiniteError

MIXING = torch.tensor([[1.0, 0.8], [0.0, 0.5]])


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    """Correlated Gaussian samples, of which the entropy is known."""
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) @ MIXING.T


def small() -> VectorGlow:
    torch.manual_seed(0)
    return VectorGlow(features=2, steps=2, hidden=8)


def test_a_gaussian_is_learned():
    model = small()
    history = fastflow.fit(model, gaussian(4000), batch_size=500, lr=1e-2, patience=5, progress=False)
    entropy = 2 * 0.5 * (1 + np.log(2 * np.pi)) + np.log(abs(torch.linalg.det(MIXING).item()))
    with torch.no_grad():
        assert -model.log_prob(gaussian(20_000, seed=1)).mean().item() == pytest.approx(entropy, abs=0.03)
    assert not model.training and history.best == max(history.validation)
    assert len(history.validation) - 1 - history.best_epoch == 5, (
        "it stopped after five epochs without a new best"
    )


def test_the_best_weights_are_kept(monkeypatch):
    model, seen = small(), []
    scores = iter([1.0, 3.0, float("nan"), 2.0])

    def score(model, *_):
        seen.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    monkeypatch.setattr(fitting, "_log_prob", score)
    history = fastflow.fit(model, gaussian(50), patience=2, progress=False)
    assert history.best_epoch == 1 and history.best == 3 and len(history.validation) == 4
    assert "best epoch 2" in str(history)
    torch.testing.assert_close(model.state_dict(), seen[1], rtol=0, atol=0)


def test_the_same_seed_gives_the_same_model():
    x, models = gaussian(200).numpy(), [small() for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fastflow.fit(model, x, max_epochs=2, batch_size=64, seed=seed, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    one, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5] * 4),
        ("exponential", [0.5, 0.25, 0.125, 0.0625]),
        ("cosine", [0.5, 0.426777, 0.25, 0.073223]),
    ],
)
def test_the_learning_rate_follows_the_schedule(schedule, expected, monkeypatch):
    rates = []

    def epoch(model, optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        return 0.0

    monkeypatch.setattr(fitting, "_epoch", epoch)
    fastflow.fit(small(), gaussian(20), lr=0.5, max_epochs=4, schedule=schedule, gamma=0.5, progress=False)
    assert rates == pytest.approx(expected, abs=1e-6)


def test_images_with_classes():
    model = Glow((1, 4, 4), levels=1, steps=1, hidden=4, classes=2)
    x = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8)
    history = fastflow.fit(model, x, torch.arange(12) % 2, max_epochs=2, batch_size=5, progress=False)
    assert len(history.train) == len(history.validation) == 2 and np.isfinite(history.train).all()


def test_ctrl_c_keeps_the_best_weights(monkeypatch):
    model, log_prob = small(), fitting._log_prob

    def interrupted(*args):
        if interrupted.calls:
            raise KeyboardInterrupt
        interrupted.calls += 1
        return log_prob(*args)

    interrupted.calls = 0
    monkeypatch.setattr(fitting, "_log_prob", interrupted)
    history = fastflow.fit(model, gaussian(50), progress=False)
    assert history.best_epoch == 0 and len(history.validation) == 1 and not model.training


@pytest.mark.parametrize(
    "make",
    [
        small,
        lambda: FlowModel(fnn.Sequential(fnn.ActNorm(2), fnn.InvertibleConv1x1(2)), fnn.GaussianPrior((2,))),
    ],
    ids=["VectorGlow", "FlowModel"],
)
def test_standardize_is_part_of_the_model(make):
    """Statistics of the training samples; log_prob, coding and samples are those of x as given."""
    units, shift = torch.tensor([1000.0, 0.01]), torch.tensor([5000.0, -3.0])
    x = gaussian(400) * units + shift
    model = make()
    fastflow.fit(model, x, standardize=True, max_epochs=2, batch_size=100, lr=1e-2, progress=False)
    held_out = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:40]
    train = torch.ones(400, dtype=torch.bool).index_fill(0, held_out, False)
    torch.testing.assert_close(model.standardize.mean, x[train].mean(0))
    torch.testing.assert_close(model.standardize.scale, x[train].std(0, correction=0))

    plain = make().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("standardize.")})
    z = (x - model.standardize.mean) / model.standardize.scale
    with torch.no_grad():
        expected = plain.log_prob(z) - model.standardize.scale.log().sum()
        torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.encode(x), plain.encode(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=1e-4, atol=1e-4)
    new, log_prob = model.double().sample_and_log_prob(500)
    torch.testing.assert_close(model.log_prob(new), log_prob, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new.std(0).float(), x.std(0), rtol=0.3, atol=0)


def test_standardized_contexts_are_part_of_the_model():
    x, context = gaussian(200) * 100, torch.randn(200, 1) * 1e3 + 5e4
    model = VectorGlow(features=2, steps=2, hidden=8, context_features=1)
    plain = VectorGlow(features=2, steps=2, hidden=8, context_features=1).eval()
    fastflow.fit(model, x, context, standardize=True, max_epochs=1, lr=1e-2, progress=False)
    layer = model.standardize_context
    assert layer.mean == pytest.approx(5e4, rel=0.1) and layer.scale == pytest.approx(1e3, rel=0.3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("standardize")})
    z, c = (x - model.standardize.mean) / model.standardize.scale, (context - layer.mean) / layer.scale
    expected = plain.log_prob(z, c) - model.standardize.scale.log().sum()
    torch.testing.assert_close(model.log_prob(x, context), expected, rtol=1e-4, atol=1e-3)
    one = context[:1].expand(3, 1)
    model, generator = model.double(), torch.Generator()
    rows = (
        model.sample(3, context=c.double(), generator=generator.manual_seed(0)) for c in (one, context[:1])
    )
    torch.testing.assert_close(*rows, rtol=0, atol=0)
    with pytest.raises(ValueError, match="context: got constant feature 0, expected features that vary"):
        VectorGlow(features=2, context_features=1).standardize_by(x, torch.ones(200, 1))


def test_a_standardized_model_is_saved_and_loaded(tmp_path):
    model, x = small(), gaussian(50) * 100
    fastflow.fit(model, x, standardize=True, max_epochs=1, progress=False)
    fastflow.save(tmp_path / "model.pt", model)
    loaded = fastflow.load(tmp_path / "model.pt")
    assert torch.equal(loaded.log_prob(x), model.log_prob(x)) and loaded.config["standardize"]
    again = fastflow.fit(loaded, x / 100, standardize=True, max_epochs=1, progress=False)
    assert np.isfinite(again.best) and loaded.standardize.scale.max() < 3


def test_what_cannot_be_standardized():
    model, before = small(), small().state_dict()
    with pytest.raises(ValueError, match="x: got constant feature 1, expected features that vary"):
        fastflow.fit(model, torch.tensor([[1.0, 2], [3, 2], [4, 2]]), standardize=True)
    assert model.standardize is None
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="standardize: got a model of uint8 samples, expected one of cont"):
        glow = Glow((1, 4, 4), levels=1, steps=1, hidden=4)
        fastflow.fit(glow, torch.zeros(4, 1, 4, 4, dtype=torch.uint8), standardize=True)


@pytest.mark.parametrize(
    "part, said",
    [
        ("net", "the first output that is not finite: flows.0.*net"),
        ("log_s", "lu_weight: diagonal of matrix 0: got nan"),
    ],
)
def test_a_loss_that_is_not_finite_names_the_layer(part, said):
    model = small()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=f"epoch 1, batch 1: .*{said}"):
        fastflow.fit(model, gaussian(50), progress=False)
    assert not model.training


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"validation": 1.0}, "validation: got 1.0, expected a share between 0 and 1"),
        ({"batch_size": 0}, "batch_size: got 0, expected a positive integer"),
        ({"lr": 0.0}, "lr: got 0.0, expected a positive number"),
        ({"patience": -1}, "patience: got -1"),
        ({"max_epochs": 0}, "max_epochs: got 0"),
        ({"schedule": "linear"}, "schedule: got 'linear', expected"),
        ({"gamma": 0.0}, "gamma: got 0.0, expected a factor above 0 and at most 1"),
        ({"schedule": "cosine"}, "max_epochs: got None, expected a number with schedule 'cosine'"),
        ({"standardize": None}, "standardize: got None, expected True or False"),
        ({"x": torch.zeros(5, 3)}, r"x: got shape \[5, 3\], expected \[N, 2\]"),
        ({"x": torch.full((5, 2), torch.nan)}, "x: got inf or NaN"),
        ({"x": torch.zeros(1, 2)}, "x: got 1 samples, expected at least 2"),
        ({"context": torch.zeros(4, 1)}, "context: got 4 rows, expected 50 rows"),
        ({"model": torch.nn.Linear(2, 2)}, "model: got Linear"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments(changed, said):
    with pytest.raises(ValueError, match=said):
        fastflow.fit(**{"model": small(), "x": gaussian(50), "progress": False} | changed)
