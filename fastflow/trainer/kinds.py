"""What differs between images and rows of a table: units, defaults, pictures of samples, tables of results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastflow.models.model import Model
from fastflow.trainer import picture
from fastflow.trainer.config import Config
from fastflow.trainer.data import Source, Table


@dataclass(frozen=True)
class Unit:
    """A unit of losses: its name in messages, in names of columns, and its value of one bit/dim."""

    name: str
    key: str
    of_bits_per_dim: float = 1.0


class Kind(Protocol):
    """A kind of samples.

    Attributes:
        noun: word for several samples.
        bf16: whether networks run in bfloat16 on a GPU by default.
        defaults: values of options that the user leaves open.
    """

    noun: str
    bf16: bool
    defaults: dict[str, Any]

    def unit(self, shape: tuple[int, ...]) -> Unit:
        """The unit of losses of samples of this shape."""
        ...

    def save_samples(self, path: Path, samples: Tensor, source: Source, config: Config) -> np.ndarray | None:
        """Write a picture of samples; also give it for TensorBoard, if it is a plain grid."""
        ...

    def result(self, test: Tensor, bounds: list[float], n_bits: int | None) -> dict[str, Any]:
        """Losses of test samples with 1, 2, ... importance samples as entries of result.json."""
        ...

    def report(self, result: dict[str, Any]) -> str:
        """The table of results, from the contents of result.json."""
        ...


class ImageKind:
    """uint8 images."""

    noun, bf16 = "images", True
    defaults = {"model": "glow", "temperature": 0.7, "samples": 64, "validation": None}

    def unit(self, shape: tuple[int, ...]) -> Unit:
        return Unit("bits/dim", "bits_per_dim")

    def save_samples(self, path: Path, samples: Tensor, source: Source, config: Config) -> np.ndarray:
        picture.save_grid(path, samples, config.n_bits)
        return picture.grid(samples, config.n_bits)

    def result(self, test: Tensor, bounds: list[float], n_bits: int | None) -> dict[str, Any]:
        return {
            "test_images": len(test),
            "importance_samples": len(bounds),
            "test_bits_per_dim": bounds[-1],
            "test_bits_per_dim_1_sample": bounds[0],
            "codecs_bits_per_dim": picture.codec_bits_per_dim(test[:1000]) if n_bits == 8 else {},
        }

    def report(self, result: dict[str, Any]) -> str:
        bits, one = result["test_bits_per_dim"], result["test_bits_per_dim_1_sample"]
        k = result["importance_samples"]
        samples = f"{k} importance samples, {one:.3f} with one" if k > 1 else "one sample of the noise"
        width = max(5, len(result["model"]))
        lines = [
            f"bits/dim on {result['test_images']} test images",
            f"  {result['model']:{width}s} {bits:.3f}  ({samples})",
        ]
        notes = {"PNG": "optimize=True", "WebP": "lossless, quality 100, method 6"}
        for name, value in result["codecs_bits_per_dim"].items():
            first = ", the first 1000 images" if result["test_images"] > 1000 else ""
            lines.append(f"  {name:{width}s} {value:.3f}  ({notes[name]}, each image alone{first})")
        return "\n".join([*lines, *_chosen(result, "bits_per_dim", self.noun)])


class RowKind:
    """Rows of a table, of floating point numbers. Losses are the mean of -log p(x), in nats per row."""

    noun, bf16 = "rows", False
    defaults = {"model": "vector_glow", "temperature": 1.0, "samples": 1000, "validation": 0.1}

    def unit(self, shape: tuple[int, ...]) -> Unit:
        return Unit("nats", "nats", float(shape[0] * np.log(2)))

    def save_samples(self, path: Path, samples: Tensor, source: Source, config: Config) -> None:
        rows = {"test rows": source.test[: len(samples)], "samples": samples}
        names = source.columns.x if isinstance(source, Table) else tuple(map(str, range(samples.shape[1])))
        picture.save_corner(path, rows, names)

    def result(self, test: Tensor, bounds: list[float], n_bits: int | None) -> dict[str, Any]:
        return {"test_rows": len(test), "test_nats": bounds[-1]}

    def report(self, result: dict[str, Any]) -> str:
        lines = [
            f"-log p(x) in nats, mean of {result['test_rows']} test rows",
            f"  {result['model']} {result['test_nats']:.4f}",
        ]
        return "\n".join([*lines, *_chosen(result, "nats", self.noun)])


def _chosen(result: dict[str, Any], key: str, noun: str) -> list[str]:
    if f"validation_{key}" not in result:
        return []
    found = f"{result[f'validation_{key}']:.3f} on {result[f'validation_{noun}']} {noun}"
    return [f"best.pt of step {result['step']}, chosen by the validation set: {found}"]


def kind_of(shape: tuple[int, ...]) -> Kind:
    """The kind of samples of a shape: ``(C, H, W)`` or ``(D,)``."""
    return ImageKind() if len(shape) == 3 else RowKind()


def sample_dtype(model: Model) -> torch.dtype:
    """dtype of the samples that a model takes."""
    return model.dequantize.like.dtype if model.n_bits is None else torch.uint8


def empty_batch(model: Model, n: int, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """Uninitialized samples, and labels or context, of the shapes and dtypes that a model takes."""
    x = torch.empty((n, *model.shape), dtype=sample_dtype(model), device=device)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if model.classes is not None:
        return x, torch.empty(n, dtype=torch.int64, device=device)
    if model.context_shape is not None:
        return x, torch.empty((n, *model.context_shape), dtype=model.dequantize.like.dtype, device=device)
    return x, None
