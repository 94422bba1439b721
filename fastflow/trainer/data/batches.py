"""Batches as pure functions of (seed, step)."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from torch import Tensor

from fastflow.seeds import Stream, derive
from fastflow.trainer.data.folder import Folder
from fastflow.trainer.data.source import Source
from fastflow.trainer.data.workers import Batch, drawn_by_workers


def drop_bits(x: Tensor, n_bits: int) -> Tensor:
    """Samples without the lowest bits of 8."""
    return x if n_bits == 8 else x >> (8 - n_bits)


class Batches:
    """Training batches of a source: item ``step`` is ``(x, labels)``, a pure function of (seed, step).

    Images follow a new permutation in each epoch; a batch may end one epoch and begin the next.

    Args:
        source: the images.
        size: images per batch, over all ranks.
        seed: seed of permutations, crops and flips.
        n_bits: bits per value; lower bits are dropped.
        horizontal_flip: flip images at random; None: as usual for the source.
        part: first and end of the samples of each batch that are drawn, the same ones as in the whole batch.

    Shape: x uint8 ``[size, C, H, W]``, values in ``[0, 2^n_bits)``; labels int64 ``[size]``, or None. Rows of
    a table and their context are ``[size, D]`` and ``[size, C]``.
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
        self._epoch: int | None = None
        self._order = np.empty(0, np.int64)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor | None]:
        rng = np.random.default_rng(derive(self.seed, Stream.BATCH, step))
        uniform = rng.random((self.size, 4))[self.part]
        x, labels = self.source.draw(self._indices(step)[self.part], uniform[:, :3])
        if self.horizontal_flip:
            flipped = torch.from_numpy(uniform[:, 3] < 0.5).to(x.device)
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        return drop_bits(x, self.n_bits).contiguous(), labels

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

    @contextmanager
    def stream(self, start: int, stop: int, workers: int | None = None) -> Iterator[Iterator[Batch]]:
        """Give an iterator over the batches of steps ``start`` to ``stop - 1`` for the time of a block.

        ``workers``: number of processes that draw batches ahead. They end with the block. None: up to four
        for a folder, no process for images in memory.
        """
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if isinstance(self.source, Folder) else 0
        steps = range(start, stop)
        if not workers:
            yield map(self.__getitem__, steps)
            return
        with closing(drawn_by_workers(self.__getitem__, steps, workers)) as batches:
            yield batches
