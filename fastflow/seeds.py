"""Derives seeds from one seed, with one stream per purpose, so that no two purposes draw the same noise."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """First integer of the path of :func:`derive`. Values never change: runs depend on them."""

    PERMUTATION = 1
    BATCH = 2
    VALIDATION = 3
    INITIALIZE = 10
    TRAINING_NOISE = 11
    TEST_NOISE = 12
    SAMPLES = 13
    EXPLORE = 14


def derive(seed: int, *path: int) -> int:
    """Returns a seed in ``[0, 2^63)`` for one purpose: a hash of ``seed`` and the integers of ``path``."""
    return int(
        np.random.SeedSequence((seed, *map(int, path))).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )
