"""Samples in memory."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastflow.trainer.data.source import held_out


class InMemory:
    """Samples ``[N, ...]`` in memory, of the machine or of a GPU, and optionally what they are conditioned on.

    ``train``, ``test``, ``validation``: samples, and their labels or context or None.
    """

    classes: int | None = None
    context_features: int | None = None
    horizontal_flip: bool = False
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        train: tuple[Tensor, Tensor | None],
        test: tuple[Tensor, Tensor | None],
        validation: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self._train, self._labels = train
        self.test, self.test_labels = test
        self.validation, self.validation_labels = validation
        self.name, self.length, self.shape = name, len(self._train), tuple(self._train.shape[1:])

    def to(self, device: torch.device | str) -> Self:
        """Move the training samples to a device; batches are then made there."""
        self._train = self._train.to(device)
        self._labels = None if self._labels is None else self._labels.to(device)
        return self

    @property
    def nbytes(self) -> int:
        """Size of the training samples."""
        return self._train.nbytes

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor | None]:
        chosen = torch.from_numpy(indices).to(self._train.device)
        return self._train[chosen], None if self._labels is None else self._labels[chosen]

    def hold_out(self, fraction: float, seed: int) -> None:
        kept, chosen = map(torch.from_numpy, held_out(self.length, fraction, seed))
        self.validation, self._train, self.length = self._train[chosen], self._train[kept], len(kept)
        if self._labels is not None:
            self.validation_labels, self._labels = self._labels[chosen], self._labels[kept]
