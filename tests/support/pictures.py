"""Image files of random pixels."""

import os
from pathlib import Path

import numpy as np


def save_images(folder, names):
    """Write a color image of 4x4 pixels for each name, which may be of no encoding."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in names:
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
