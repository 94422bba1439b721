"""Training runs in processes of their own, and images for them to learn."""

import multiprocessing
from pathlib import Path

import numpy as np

# One server imports torch once and forks the training processes: a test can kill each, and none imports torch.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "fastflow.trainer.cli",
        "fastflow.trainer.commands",
        "fastflow.trainer.train",
        "tyro",
        "tqdm",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "PIL.WebPImagePlugin",
    ]
)


def waves(folder: Path) -> Path:
    """Writes ``waves.npz``: 50 smooth 8x8 images, which a model can learn."""
    path = folder / "waves.npz"
    rng = np.random.default_rng(0)
    i, j = np.mgrid[:8, :8]
    angle, phase = rng.uniform(0, 6.3, (2, 50, 3, 1, 1))
    np.savez(path, x=(127 + 100 * np.sin(angle + i / 4 + phase * j / 8)).astype(np.uint8))
    return path
