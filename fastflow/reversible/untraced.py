"""The function that torch.compile must not trace, in its own file: the decorator imports the compiler."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fastflow.reversible import segments

run_segments = cast(
    "Callable[..., tuple[Tensor, Tensor]]",
    torch.compiler.disable(
        segments.run_segments,
        reason="torch.compile cannot trace the backward pass of a reversible chain; pass reversible=False",
    ),
)
