"""The function that torch.compile must not trace, in its own file: the decorator imports the compiler."""

import torch

from fastflow.reversible import segments

run_segments = torch.compiler.disable(
    segments.run_segments,
    reason="torch.compile cannot trace the backward pass of a reversible chain; pass reversible=False",
)
