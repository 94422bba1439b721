"""A short training run, for measurements on trained models."""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from fastflow.models import Glow
from fastflow.trainer import data


def train(model: Glow, source, steps: int, batch_size: int = 16, desc: str = "") -> Iterator[float]:
    """Initializes ``model`` and trains it with Adam; yields the bits/dim of each step.

    The learning rate is 1e-3 after 20 steps of warm-up.
    """
    batches = data.Batches(source, batch_size, seed=0)
    model.initialize(batches[0][0], seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in (bar := tqdm(range(steps), desc=desc)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20)
        loss = model(batches[step][0], seed=step).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        bar.set_postfix_str(f"{loss.item():.3f} bits/dim")
        yield loss.item()
