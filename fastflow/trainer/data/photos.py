"""Crops of the two photographs in scikit-learn."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastflow.trainer.data.source import DataError


class Photos:
    """32x32 color crops of scikit-learn's two photographs, china.jpg and flower.jpg, of 427x640 pixels.

    Training crops are taken at random positions in columns 0 to 511. The test set is the 104 tiles of the
    32x32 grid over columns 512 to 639 (rows 0 to 415), the tiles of the first photograph first.
    """

    name: str = "photos"
    shape: tuple[int, ...]
    classes: int | None = None
    context_features: int | None = None
    horizontal_flip: bool = True
    notes: tuple[str, ...] = ()
    test_labels: Tensor | None = None
    validation: Tensor | None = None
    validation_labels: Tensor | None = None

    def __init__(self, size: int = 32) -> None:
        from PIL import Image

        # scikit-learn is not imported: that takes longer than reading the photographs.
        spec = importlib.util.find_spec("sklearn")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        folder = Path(spec.submodule_search_locations[0]) / "datasets" / "images"
        photos = []
        for name in ("china.jpg", "flower.jpg"):
            if not (folder / name).is_file():
                raise DataError(f"photos: got no file {name} in {folder}, expected scikit-learn's")
            photos.append(np.asarray(Image.open(folder / name).convert("RGB")))
        photos = np.stack(photos).transpose(0, 3, 1, 2)  # [2, 3, 427, 640]
        tiles = photos[:, :, : 427 // size * size, 512:].reshape(2, 3, 427 // size, size, 128 // size, size)
        tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3, size, size)
        self.test = torch.from_numpy(tiles.copy())
        self.shape = (3, size, size)
        # one epoch has as many crops as there are tiles in the training columns
        self.length = 2 * (427 // size) * (512 // size)
        self._windows = np.lib.stride_tricks.sliding_window_view(photos[..., :512], (size, size), axis=(2, 3))

    def draw(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, None]:
        photos, _, rows, columns = self._windows.shape[:4]
        photo, row, column = (uniform * (photos, rows, columns)).astype(np.int64).T
        return torch.from_numpy(self._windows[photo, :, row, column]), None

    def hold_out(self, fraction: float, seed: int) -> None:
        raise DataError(f"validation: got {fraction}, expected 0 for photos, whose training crops overlap")
