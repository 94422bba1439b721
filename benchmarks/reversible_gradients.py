"""The gradient of a trained Glow by reversible backprop, and by stored activations, against the float64 gradient with stored ones.

    python -m benchmarks.reversible_gradients --data cifar10

Trains a Glow L=3 on images and takes the gradient of a batch of test images, and of uniform noise, after some steps: in float64, in
float32, and with the networks in bfloat16 (autocast, state in float32). Rows go to results/reversible_gradients.csv: ``error`` is the
2-norm of the difference over that of the float64 gradient, of all parameters together; ``drift`` the largest difference of a level's
input from the one walked back to, over the largest value of that input.
"""

import argparse
import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks import harness, training
from fastflow import data
from fastflow.models import Glow

# dtype of the state and of the networks, and how much larger than with stored activations the reversible error may be
KINDS = {"float64": (torch.float64, None), "float32": (torch.float32, None), "bfloat16 networks": (torch.float32, torch.bfloat16)}
MAY_BE = {"float32": 1.5, "bfloat16 networks": 2.0}
FLOAT64_ERROR = 1e-12


def gradient(model: Glow, x: Tensor, networks: torch.dtype | None) -> Tensor:
    model.zero_grad()
    with torch.autocast("cpu", dtype=networks or torch.bfloat16, enabled=networks is not None):
        loss = model(x, seed=1).mean()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@torch.no_grad()
def drift(model: Glow, x: Tensor, networks: torch.dtype | None) -> float:
    errors = []
    with torch.autocast("cpu", dtype=networks or torch.bfloat16, enabled=networks is not None):
        y, _ = model.dequantize(x, seed=1)
        for i, flow in enumerate(model.flows):
            z, _ = flow(y)
            errors.append(((flow.inverse(z)[0] - y).abs().max() / y.abs().max()).item())
            y = model.splits[i](z)[0] if i < len(model.splits) else z
    return max(errors)


def reversed_by(model: Glow, reversible: bool, checkpoint_every: int | None = None) -> Glow:
    for flow in model.flows:
        flow.reversible, flow.checkpoint_every = reversible, checkpoint_every
    return model


def measure(model: Glow, images: dict[str, Tensor]) -> list[dict]:
    """A row for each kind of numbers, kind of images and way to backprop; the model stays as it is."""
    rows = []
    for name, x in images.items():
        truth = gradient(reversed_by(copy.deepcopy(model).double(), False), x, None)
        for kind, (state, networks) in KINDS.items():
            one = copy.deepcopy(model).to(state)
            off = drift(one, x, networks)
            for way, reversible, every in (("stored", False, None), ("reversible", True, None), ("reversible, every 8", True, 8)):
                found = gradient(reversed_by(one, reversible, every), x, networks)
                error = ((found - truth).norm() / truth.norm()).item()
                rows.append({"images": name, "numbers": kind, "backprop": way, "error": error, "drift": off if reversible else 0.0})
    return rows


def failures(rows: Iterable[dict]) -> list[str]:
    """What is less exact than it should be."""
    error = {(r["images"], r["numbers"], r["backprop"]): r["error"] for r in rows}
    wrong = []
    for (images, numbers, way), e in error.items():
        bound = FLOAT64_ERROR if numbers == "float64" else MAY_BE[numbers] * error[images, numbers, "stored"]
        if not e <= bound:
            wrong.append(f"{images}, {numbers}, {way}: error {e:.1e}, expected at most {bound:.1e}")
    return wrong


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="photos", help="as in fastflow train")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--after", type=int, nargs="+", default=[100, 300], help="training steps")
    parser.add_argument("--steps-per-level", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--results", type=harness.Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args(argv)

    source = data.load(options.data, options.data_dir)
    test = source.test[: options.images]
    noise = torch.randint(0, 256, test.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Glow(image_shape=source.image_shape, levels=3, steps=options.steps_per_level, hidden=options.hidden)
    about, rows = harness.metadata("cpu"), []
    for step, _ in enumerate(training.train(model, source, max(options.after), desc="training"), start=1):
        if step in options.after:
            found = measure(model, {"test images": test, "uniform noise": noise})
            for row in found:
                print(
                    f"{step:>5} {row['images']:<14}{row['numbers']:<18}{row['backprop']:<20} {row['error']:.2e}, drift {row['drift']:.1e}"
                )
            print(*(f"WORSE THAN IT SHOULD BE: {line}" for line in failures(found)), sep="\n")
            size = {"data": source.name, "steps_per_level": options.steps_per_level, "hidden": options.hidden, "after": step}
            rows += [size | r | {"error": f"{r['error']:.3e}", "drift": f"{r['drift']:.1e}"} | about for r in found]
    harness.append(options.results / "reversible_gradients.csv", rows)
    return rows


if __name__ == "__main__":
    main()
