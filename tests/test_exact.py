"""A trained Glow gives back every pixel, of images like its training data and of images unlike it, in float32."""

from pathlib import Path

import pytest
import torch

from fastflow import data
from fastflow.models import Glow

CIFAR10 = Path(__file__).parents[1] / "data" / "cifar-10-batches-py"


def trained(source: str, steps: int, hidden: int) -> tuple[Glow, torch.Tensor]:
    """A Glow L=3 K=8 after some steps of Adam, and test images."""
    torch.manual_seed(0)
    images = data.load(source, str(CIFAR10.parent))
    batches = data.Batches(images, 16, seed=0)
    model = Glow(levels=3, steps=8, hidden=hidden)
    model.initialize(batches[0][0], seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = None
    for step in range(steps):
        loss = model(batches[step][0], seed=step).mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    assert loss.item() < first - 0.5, "the model did not train"
    return model.eval(), images.test


def assert_every_pixel_comes_back(model: Glow, x: torch.Tensor) -> None:
    wrong = (model.decode(model.encode(x)) != x).sum().item()
    assert wrong == 0, f"{wrong} of {x.numel()} values differ"


def assert_exact(model: Glow, images: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    assert_every_pixel_comes_back(model, images)
    assert_every_pixel_comes_back(model, torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator))
    assert_every_pixel_comes_back(model, torch.zeros_like(images[:2]))


def test_photographs_and_noise():
    assert_exact(*trained("photos", steps=40, hidden=16))


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not in data/ (torchvision's layout)")
def test_cifar10_and_noise():
    model, images = trained("cifar10", steps=60, hidden=32)
    assert_exact(model, images[:128])
