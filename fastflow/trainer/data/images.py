"""Images in memory."""

import numpy as np
import torch
from torch import Tensor


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
    ) -> None:
        self.name, self.horizontal_flip, self.length = name, horizontal_flip, len(train)
        self.image_shape = tuple(train.shape[1:])
        self.classes = None if labels is None else int(labels.max()) + 1
        self.test = torch.from_numpy(np.ascontiguousarray(test))
        self.test_labels = None if test_labels is None else torch.from_numpy(test_labels.astype(np.int64))
        self._train = torch.from_numpy(np.ascontiguousarray(train))
        self._labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))

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
