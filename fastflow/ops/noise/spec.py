"""Cases of uniform noise."""

from collections.abc import Iterator

import torch

from fastflow.ops.spec import Case, Make


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    yield Case("uniform_noise", "", (list(shape), torch.tensor(1), 2**40, make.dtype), make.dtype.itemsize)
