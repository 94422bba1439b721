"""What every source of images provides."""

from typing import Protocol

import numpy as np
from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used; the message is one line."""


class Source(Protocol):
    """Images to train on and to test on, uint8 ``[N, C, H, W]``.

    Attributes:
        name: name for messages.
        image_shape: ``(C, H, W)``.
        length: number of training images in an epoch.
        classes: number of classes, or None without labels.
        horizontal_flip: whether training images are usually flipped.
        test: test images.
        test_labels: int64 ``[N]``, or None.
    """

    name: str
    image_shape: tuple[int, int, int]
    length: int
    classes: int | None
    horizontal_flip: bool
    test: Tensor
    test_labels: Tensor | None

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Images and labels of ``indices`` ``[N]``; ``uniform`` ``[N, 3]`` is the only randomness."""
        ...
