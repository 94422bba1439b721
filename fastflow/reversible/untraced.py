"""The function that torch.compile must not trace, in its own file: the decorator imports the compiler."""

import torch

from fastflow.reversible import chain

run_chains = torch.compiler.disable(
    chain.run_chains,
    reason="torch.compile cannot trace the backward pass of a reversible chain; pass reversible=False",
)
