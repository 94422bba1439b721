"""Batches as pure functions of (seed, step)."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastflow.seeds import Stream, derive
from fastflow.trainer.data.folder import Folder
from fastflow.trainer.data.source import Source


class Batches(Dataset):
    """Training batches of a source: item ``step`` is ``(x, labels)``, a pure function of (seed, step).

    Images follow a new permutation in each epoch; a batch may end one epoch and begin the next.

    Args:
        source: the images.
        size: images per batch, over all ranks.
        seed: seed of permutations, crops and flips.
        n_bits: bits per value; lower bits are dropped.
        horizontal_flip: flip images at random; None: as usual for the source.
        part: first and end of the samples of each batch that are drawn, the same ones as in the whole batch.

    Shape: x uint8 ``[size, C, H, W]``, values in ``[0, 2^n_bits)``; labels int64 ``[size]``, or None.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        seed: int,
        n_bits: int = 8,
        horizontal_flip: bool | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.source, self.size, self.seed, self.n_bits = source, size, seed, n_bits
        self.horizontal_flip = source.horizontal_flip if horizontal_flip is None else horizontal_flip
        self.part = slice(*(part or (0, size)))
        self._epoch, self._order = None, None

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor | None]:
        rng = np.random.default_rng(derive(self.seed, Stream.BATCH, step))
        uniform = rng.random((self.size, 4))[self.part]
        x, labels = self.source.draw(self._indices(step)[self.part], uniform[:, :3])
        if self.horizontal_flip:
            flipped = torch.from_numpy(uniform[:, 3] < 0.5).to(x.device)
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        return (x >> (8 - self.n_bits)).contiguous(), labels

    def _indices(self, step: int) -> np.ndarray:
        epochs, places = np.divmod(np.arange(step * self.size, (step + 1) * self.size), self.source.length)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            if epoch != self._epoch:
                rng = np.random.default_rng(derive(self.seed, Stream.PERMUTATION, epoch))
                self._epoch, self._order = epoch, rng.permutation(self.source.length)
            here = epochs == epoch
            indices[here] = self._order[places[here]]
        return indices

    def stream(self, start: int, stop: int, workers: int | None = None) -> Iterator:
        """Iterate over the batches of steps ``start`` to ``stop - 1``.

        ``workers``: number of processes that draw batches ahead into pinned memory. None: up to four for a
        folder, no process for images in memory.
        """
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if isinstance(self.source, Folder) else 0
        if not workers:
            return map(self.__getitem__, range(start, stop))
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=range(start, stop),
                num_workers=workers,
                worker_init_fn=_ignore_signals,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # otherwise the loader draws from the global generator
            )
        )


def _ignore_signals(_: int) -> None:
    """Ctrl-C reaches the workers too, but only the trainer must act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
