"""fastflow.fit: a known density, early stopping, best weights, reproducibility, and errors that name the argument."""

import copy

import numpy as np
import pytest
import torch

import fastflow
from fastflow import fitting
from fastflow.models import Glow, VectorGlow
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
