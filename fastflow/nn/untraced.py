"""The function that torch.compile must not trace, in its own file: the decorator imports the compiler."""

import torch

from fastflow.nn import residual

update_norms = torch.compiler.disable(
    residual._update_norms, reason="the number of power iterations depends on values"
)
