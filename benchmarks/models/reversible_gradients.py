"""Compares gradients by reversible backprop and by stored activations with the float64 gradient.

    python -m benchmarks.models.reversible_gradients --data cifar10

Trains a Glow L=3 on images. After some steps it takes the gradients for batches of test images and of
uniform noise: in float64, in float32, and with bfloat16 networks (autocast, float32 state). Rows go to
results/reversible_gradients.csv, one per batch:

- ``error``: 2-norm of the difference from the float64 gradient over its 2-norm, all parameters together;
- ``over_stored``: that error over the error with stored activations;
- ``drift``: largest difference between a level's input and its reconstruction, over the largest value of
  the input.

``plain inverse`` is reversible with the inverse weights that lu_weight returns, which are not the inverse
of the folded weights as they were rounded. The table of docs/memory.md is rewritten.
"""

import argparse
import copy
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.models import training
from benchmarks.tools import harness, page
from fastflow.models import Glow
from fastflow.nn import glow_level
from fastflow.trainer import data

# dtypes of the state and of the networks
KINDS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16 networks": (torch.float32, torch.bfloat16),
}
MAY_BE = {"float32": 1.5, "bfloat16 networks": 2.0}  # bound of the reversible error over the stored one
FLOAT64_ERROR = 1e-12
WAYS = {
    "stored": (False, None),
    "reversible": (True, None),
    "every 8": (True, 8),
    "plain inverse": (True, None),
}


def untrained(source: data.Source, k: int, hidden: int) -> Glow:
    torch.manual_seed(0)
    return Glow(image_shape=source.shape, levels=3, steps=k, hidden=hidden, output_start=1.0)


def test_and_noise(test: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, test.shape, dtype=torch.uint8, generator=generator)
    return {"test images": test, "uniform noise": noise}


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


def reversed_by(model: Glow, reversible: bool, activation_checkpoint_every: int | None = None) -> Glow:
    for flow in model.flows:
        flow.reversible, flow.activation_checkpoint_every = reversible, activation_checkpoint_every
    return model


def measure(
    model: Glow,
    images: dict[str, Tensor],
    batch: int,
    numbers: Iterable[str] = tuple(KINDS),
    ways: Iterable[str] = tuple(WAYS),
    with_drift: bool = True,
) -> list[dict]:
    """A row for each kind of numbers, kind of images, batch and way to backprop; the model stays as it is."""
    rows = []
    models = {kind: copy.deepcopy(model).to(KINDS[kind][0]) for kind in ("float64", *numbers)}
    for name, several in images.items():
        for number, x in enumerate(tqdm(several.split(batch), desc=name)):
            truth = gradient(reversed_by(models["float64"], False), x, None)
            for kind in numbers:
                networks, one, stored = KINDS[kind][1], models[kind], None
                for way in ways if kind == "float32" else [w for w in ways if w != "plain inverse"]:
                    reversible, every = WAYS[way]
                    with (
                        mock.patch.object(glow_level, "_correction", lambda *_: 0.0)
                        if way == "plain inverse"
                        else nullcontext()
                    ):
                        of_drift = with_drift and reversible and every is None
                        off = drift(one, x, networks) if of_drift else None
                        is_truth = kind == "float64" and way == "stored"
                        found = (
                            truth if is_truth else gradient(reversed_by(one, reversible, every), x, networks)
                        )
                    error = ((found - truth).norm() / truth.norm()).item()
                    stored = error if way == "stored" else stored
                    row = {"images": name, "batch": number, "numbers": kind, "backprop": way, "error": error}
                    rows.append(row | {"over_stored": error / stored if stored else None, "drift": off})
    return rows


def groups(rows: Iterable[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """The rows by (steps of training, images, numbers) and way."""
    found = {}
    for row in rows:
        found.setdefault((row["after"], row["images"], row["numbers"]), {}).setdefault(
            row["backprop"], []
        ).append(row)
    return found


def failures(rows: Iterable[dict]) -> list[str]:
    """Groups of rows whose median error exceeds its bound."""
    wrong = []
    for (after, images, numbers), ways in groups(rows).items():
        error = {way: median(float(row["error"]) for row in found) for way, found in ways.items()}
        bound = FLOAT64_ERROR if numbers == "float64" else MAY_BE[numbers] * error["stored"]
        if not error["reversible"] <= bound:
            wrong.append(
                f"after {after} steps, {images}, {numbers}: error {error['reversible']:.1e}, "
                f"expected at most {bound:.1e}"
            )
    return wrong


def table(rows: list[dict]) -> str:
    def cell(found: list[dict], stored: list[dict]) -> str:
        error = median(float(row["error"]) for row in found)
        if found is stored or not all(row["over_stored"] for row in found):
            return f"{error:.1e}"
        ratios = [float(row["over_stored"]) for row in found]
        return f"{error:.1e}; {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    lines = []
    for (after, images, numbers), ways in groups(rows).items():
        cells = [cell(ways[way], ways["stored"]) if way in ways else "" for way in WAYS]
        drifts = [
            f"{max(float(row['drift']) for row in ways[way]):.1e}" if way in ways else ""
            for way in ("reversible", "plain inverse")
        ]
        lines.append([str(after), images, numbers, *cells, *drifts])
    return page.table(["steps", "images", "numbers", *WAYS, "drift", "drift, plain inverse"], lines)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="photos", help="as in fastflow train")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--after", type=int, nargs="+", default=[100, 300], help="training steps")
    parser.add_argument("--steps-per-level", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows")
    parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of memory.md")
    options = parser.parse_args(argv)

    source = data.load(options.data, options.data_dir)
    images = test_and_noise(source.test[: options.batch * options.batches])
    model = untrained(source, options.steps_per_level, options.hidden)
    size = {"data": source.name, "steps_per_level": options.steps_per_level, "hidden": options.hidden}
    about, rows = harness.metadata("cpu"), []
    for step, _ in enumerate(training.train(model, source, max(options.after), desc="training"), start=1):
        if step in options.after:
            rows += [{"after": step} | row for row in measure(model, images, options.batch)]

    def text(value: object) -> object:
        return "" if value is None else f"{value:.3e}" if isinstance(value, float) else value

    harness.append(
        options.results / "reversible_gradients.csv",
        [size | {k: text(v) for k, v in row.items()} | about for row in rows],
    )
    page.write(options.docs / "memory.md", {"gradients": table(rows)})
    print(table(rows), *(f"WORSE THAN IT SHOULD BE: {line}" for line in failures(rows)), sep="\n")
    return rows


if __name__ == "__main__":
    main()
