"""The README's Python runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_readme_shows_python_and_says_what_it_is():
    assert len(BLOCKS) >= 1 and "make train" in README.read_text() and "make test" in README.read_text()
    assert 10 <= len(BLOCKS[0].strip().splitlines()) <= 20


def test_the_first_block_trains_and_samples(capsys):
    names = {}
    exec(BLOCKS[0], names)
    model, samples, loss = (names[k] for k in ("model", "samples", "loss"))
    assert samples.dtype == torch.uint8 and samples.ndim == 4 and samples.shape[1:] == model.image_shape
    assert 7 < loss.item() < 10 and all(p.grad is not None for p in model.parameters())
    assert "bits/dim" in capsys.readouterr().out


def test_every_other_block_runs():
    for block in BLOCKS[1:]:
        exec(block, {})
