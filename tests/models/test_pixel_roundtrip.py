"""A trained Glow gives back every pixel, of images like its training data and of images unlike it, in float32."""

from pathlib import Path

import pytest
import torch

from benchmarks.models import training
from fastflow.models import Glow
from fastflow.trainer import data

CIFAR10 = Path(__file__).parents[2] / "data" / "cifar-10-batches-py"


def trained(source: str, steps: int, hidden: int) -> tuple[Glow, torch.Tensor]:
    """A Glow L=3 K=8 after some steps of Adam, and test images."""
    torch.manual_seed(0)
    images = data.load(source, str(CIFAR10.parent))
    model = Glow(levels=3, steps=8, hidden=hidden)
    losses = list(training.train(model, images, steps, batch_size=8))
    assert losses[-1] < losses[0] - 0.5, "the model did not train"
    return model.eval(), images.test


def assert_every_pixel_comes_back(model: Glow, x: torch.Tensor) -> None:
    wrong = (model.decode(model.encode(x)) != x).sum().item()
    assert wrong == 0, f"{wrong} of {x.numel()} values differ"


def assert_exact(model: Glow, images: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    assert_every_pixel_comes_back(model, images)
    assert_every_pixel_comes_back(
        model, torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator)
    )
    assert_every_pixel_comes_back(model, torch.zeros_like(images[:2]))


def test_photographs_and_noise():
    assert_exact(*trained("photos", steps=40, hidden=16))


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not in data/ (torchvision's layout)")
def test_cifar10_and_noise():
    model, images = trained("cifar10", steps=60, hidden=32)
    assert_exact(model, images[:128])
