"""A student learns the density of a teacher: an IAF, whose samples take one pass, from a MAF that was fitted to data.

From a clean clone, after `make setup` (about three minutes of one core):

    .venv/bin/python docs/examples/distillation.py --out distillation.png

Prints both KL divergences between student and teacher, in two dimensions and in six.
"""

import argparse

import torch
from matplotlib.figure import Figure

import fastflow
from fastflow import explore
from fastflow.models import IAF, MAF

LIMITS = (-2.7, 2.7), (-2.2, 2.2)


def moons(n):
    """Two half circles, roughly standardized."""
    angle, side = torch.pi * torch.rand(n), torch.randint(0, 2, (n,)) * 2.0 - 1
    x = torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], 1)
    return 1.4 * x + 0.13 * torch.randn(n, 2)


def chain(n, features=6):
    """Each feature is a curved function of the one before, with noise."""
    columns = [torch.randn(n)]
    for _ in range(features - 1):
        columns.append((1.5 * columns[-1]).sin() + 0.5 * torch.randn(n))
    return torch.stack(columns, 1)


def taught(x, steps, epochs, hidden):
    """A MAF fitted to x, an IAF that is distilled from it, and the divergences of all steps."""
    features = x.shape[1]
    teacher = MAF(features=features, steps=5, hidden=hidden, activation="silu", scale="soft_clamp")
    print(fastflow.fit(teacher, x, lr=2e-3, max_epochs=epochs, schedule="cosine", progress=False))
    student = IAF(features=features, steps=5, hidden=hidden, activation="silu")
    return teacher, student, explore.distill(teacher, student, steps, lr=2e-3)


def both_divergences(teacher, student, samples):
    reverse, reverse_error = explore.kl_divergence(student, teacher, samples)
    forward, forward_error = explore.kl_divergence(teacher, student, samples)
    features = teacher.shape[0]
    print(f"{features} features: KL(student, teacher) {reverse:.4f} +- {reverse_error:.4f} nats")
    print(f"{features} features: KL(teacher, student) {forward:.4f} +- {forward_error:.4f} nats")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/distillation.png")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--size", type=int, default=300, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    torch.manual_seed(0)
    x = moons(options.samples)
    teacher, student, divergences = taught(x, options.steps, options.epochs, 64)
    both_divergences(teacher, student, options.samples)
    both_divergences(*taught(chain(options.samples), options.steps, options.epochs, 64)[:2], options.samples)

    figure = Figure(figsize=(12, 3.3), layout="constrained")
    data, density, samples, curve = figure.subplots(1, 4)
    (left, right), (low, high) = LIMITS
    data.scatter(*x[:5000].T, s=1, linewidths=0, color="tab:blue")
    values, integral = explore.density(teacher, LIMITS, options.size)
    print(f"density of the teacher: integral {integral:.4f}")
    density.imshow(values, extent=(left, right, low, high), origin="lower", cmap="magma")
    samples.scatter(*student.sample(5000).T, s=1, linewidths=0, color="tab:orange")
    titles = "data", "density of the teacher, a MAF", "samples of the student, an IAF"
    for axes, title in zip((data, density, samples), titles, strict=True):
        axes.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
    width = max(1, len(divergences) // 60)
    means = torch.tensor(divergences)[: len(divergences) // width * width].view(-1, width).mean(1)
    curve.plot(width * (0.5 + torch.arange(len(means))), means.clamp_min(1e-4))
    curve.set(yscale="log", xlabel="step")
    curve.set_title("KL(student, teacher), nats", fontsize=10)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
