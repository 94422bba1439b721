"""What every source of data provides."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastflow.seeds import Stream, derive
from fastflow.trainer.free_memory import free_bytes
from fastflow.validation import printable

_MOST_COMPRESSED = 200  # times; zeros are 1000 times smaller


class DataError(ValueError):
    """Data that cannot be used; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Source(Protocol):
    """Samples to train on and to test on: images, uint8 ``[N, C, H, W]``, or rows of a table, ``[N, D]``.

    Labels are classes, int64 ``[N]``, or the context of rows, ``[N, context_features]``, or None.

    Attributes:
        name: name for messages.
        shape: ``(C, H, W)`` or ``(D,)``.
        length: number of training samples in an epoch.
        classes: number of classes, or None without labels.
        context_features: number of columns of the context, or None.
        horizontal_flip: whether training samples are usually flipped.
        notes: lines that are printed before training.
        test: test samples.
        test_labels: their labels.
        validation: validation samples, which the source has of its own or :meth:`hold_out` took; or None.
        validation_labels: their labels.
    """

    name: str
    shape: tuple[int, ...]
    length: int
    classes: int | None
    context_features: int | None
    horizontal_flip: bool
    test: Tensor
    test_labels: Tensor | None
    validation: Tensor | None
    validation_labels: Tensor | None

    @property
    def notes(self) -> tuple[str, ...]: ...

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Samples and labels of ``indices`` ``[N]``; ``uniform`` ``[N, 3]`` is the only randomness."""
        ...

    def hold_out(self, fraction: float, seed: int) -> None:
        """Move this share of the training samples to ``validation``; ``seed`` chooses them."""
        ...


def check_size(path: Path, needed: int, stored: int) -> None:
    """Refuse arrays of ``needed`` bytes in ``stored`` ones that are larger than the memory, or those of a zip bomb.

    It is called before they are unpacked.
    """
    got, free = f"{path}: got arrays of {needed / 1e9:.3g} GB", free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise DataError(f"{got}, expected at most the free memory, {free / 1e9:.3g} GB")
    if needed > 2**30 and needed > _MOST_COMPRESSED * stored:
        raise DataError(
            f"{got} in {stored / 1e6:.3g} MB, as a zip bomb has; expected at most {_MOST_COMPRESSED} times as much"
        )


def set_validation(source: Source, fraction: float | None, seed: int) -> None:
    """Hold out a validation set; None: keep the source's own, if it has one; 0: use none."""
    if fraction == 0:
        source.validation = source.validation_labels = None
    elif fraction is not None:
        if source.validation is not None:
            got = f"validation: got {fraction}, expected none or 0"
            raise DataError(f"{got}: {source.name} has a validation set of its own")
        source.hold_out(fraction, seed)


def held_out(length: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples that stay, in order, and of a share that is held out, in random order."""
    count = max(1, round(fraction * length))
    if count >= length:
        raise DataError(f"validation: got {fraction} of {length} samples, expected some left to train on")
    order = np.random.default_rng(derive(seed, Stream.VALIDATION)).permutation(length)
    return np.sort(order[count:]), order[:count]
