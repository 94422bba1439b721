"""The function that torch.compile must not trace, in its own file: the decorator imports the compiler."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from fastflow.nn import residual

update_norms = cast(
    "Callable[[nn.Module, bool], None]",
    torch.compiler.disable(residual._update_norms, reason="the number of power iterations depends on values"),
)
