"""The function that torch.compile does not trace. A file of its own: the decorator imports the compiler, which takes a second."""

import torch

from fastflow.reversible import chain

run_chains = torch.compiler.disable(
    chain.run_chains,
    reason="the backward pass of a reversible chain is a program of its own; reversible=False can be traced",
)
