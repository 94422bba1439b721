"""Images in memory."""

import numpy as np
import torch
from torch import Tensor

from fastflow.trainer.data.memory import InMemory


class Images(InMemory):
    """Images in memory: uint8 ``[N, C, H, W]``, and optionally labels ``[N]``."""

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
        super().__init__(
            name,
            (_images(train), _labels(labels)),
            (_images(test), _labels(test_labels)),
            (None if validation is None else _images(validation), _labels(validation_labels)),
        )
        self.horizontal_flip = horizontal_flip
        self.classes = None if labels is None else int(labels.max()) + 1


def _images(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images))


def _labels(labels: np.ndarray | None) -> Tensor | None:
    return None if labels is None else torch.from_numpy(labels.astype(np.int64))
