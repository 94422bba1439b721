"""Images in memory."""

import numpy as np
import torch
from torch import Tensor

from fastflow.trainer.data.source import held_out


class Images:
    """Images in memory, of the machine or of a GPU: uint8 ``[N, C, H, W]``, and optionally labels ``[N]``."""

    def __init__(
        self,
        name: str,
        train: np.ndarray,
        test: np.ndarray,
        labels: np.ndarray | None = None,
        test_labels: np.ndarray | None = None,
        horizontal_flip: bool = False,
        validation: np.ndarray | None = None,
        validation_labels: np.ndarray | None = None,
    ) -> None:
        self.name, self.horizontal_flip, self.length = name, horizontal_flip, len(train)
        self.image_shape = tuple(train.shape[1:])
        self.classes = None if labels is None else int(labels.max()) + 1
        self.test, self.test_labels = _images(test), _labels(test_labels)
        self.validation, self.validation_labels = _images(validation), _labels(validation_labels)
        self._train, self._labels = _images(train), _labels(labels)

    def to(self, device: torch.device | str) -> "Images":
        """Move the training images to a device; batches are then made there."""
        self._train = self._train.to(device)
        self._labels = None if self._labels is None else self._labels.to(device)
        return self

    @property
    def nbytes(self) -> int:
        """Size of the training images."""
        return self._train.nbytes

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor | None]:
        indices = torch.from_numpy(indices).to(self._train.device)
        return self._train[indices], None if self._labels is None else self._labels[indices]

    def hold_out(self, fraction: float, seed: int) -> None:
        kept, chosen = map(torch.from_numpy, held_out(self.length, fraction, seed))
        self.validation, self._train, self.length = self._train[chosen], self._train[kept], len(kept)
        if self._labels is not None:
            self.validation_labels, self._labels = self._labels[chosen], self._labels[kept]


def _images(images: np.ndarray | None) -> Tensor | None:
    return None if images is None else torch.from_numpy(np.ascontiguousarray(images))


def _labels(labels: np.ndarray | None) -> Tensor | None:
    return None if labels is None else torch.from_numpy(labels.astype(np.int64))
