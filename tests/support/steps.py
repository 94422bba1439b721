"""Training steps of a small Glow, by the trainer's Step and in the plainest way, and their comparison."""

import torch

from fastflow.models import Glow
from fastflow.trainer.ranks import Ranks
from fastflow.trainer.step import Step
from tests.support.cases import randomize

STEPS, CLIP, ADAM = 6, 2.0, {"betas": (0.9, 0.95), "eps": 1e-6}


def model(device="cpu", classes=None, **options):
    made = Glow((3, 8, 8), levels=2, steps=2, hidden=8, classes=classes, **options).to(device)
    x, labels = batch(0, device, classes)
    made.initialize(x, labels, seed=0)
    return randomize(made, std=0.05).train().to(memory_format=torch.channels_last)


def batch(step, device="cpu", classes=None, n=6):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8).to(device)
    return x, None if classes is None else torch.randint(0, classes, (n,), generator=generator).to(device)


def rate(step):
    return 1e-3 * (step + 1) / 3


def static(trained, classes=None, **options):
    """The reports, and the optimizer, of some steps."""
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.0, fused=True, **ADAM)
    step = Step(trained, optimizer, Ranks(), batch_size=6, clip=CLIP, **options)
    where = next(trained.parameters()).device
    return [step(*batch(i, where, classes), 100 + i, rate(i))[:2] for i in range(STEPS)], optimizer


def ordinary(trained, classes=None, bf16=False):
    """The same in the plainest way: new tensors, a float for a rate, no flags."""
    optimizer, reports = torch.optim.Adam(trained.parameters(), lr=0.0, fused=True, **ADAM), []
    for i in range(STEPS):
        x, labels = batch(i, classes=classes)
        for group in optimizer.param_groups:
            group["lr"] = rate(i)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            bits = trained(x.contiguous(memory_format=torch.channels_last), labels, seed=100 + i)
        (bits.sum() * (1 / 6)).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
        optimizer.step()
        reports.append((bits.sum().item() / 6, norm.item()))
    return reports, optimizer


def assert_same_bits(a, b):
    (first, one), (second, other) = a, b
    assert first == second
    pairs = zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
    for p, q in pairs:
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)
        assert all(
            torch.equal(one.state[p][k].cpu(), other.state[q][k].cpu())
            for k in ("exp_avg", "exp_avg_sq", "step")
        )
