"""Times residual networks of vectors, forward and backward.

    python -m benchmarks.ops.residual_network

Rows go to results/residual_network.csv. The shape is N x D x C x hidden x outputs x blocks: samples, features, features
of the context. Provider `eager` is the network in PyTorch's operators.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.tools import harness
from fastflow import ops
from fastflow.ops.residual_network.reference import residual_network
from fastflow.ops.residual_network.spec import parameters_of

SIZES = (
    (200, 3, 10, 50, 58, 2),  # sbi's default NSF
    (1000, 3, 10, 50, 58, 2),
    (256, 7, 128, 512, 161, 5),  # dingo's size
)


def of_size(sizes: tuple[int, ...], batch_norm: bool) -> harness.Case:
    n, features, contexts, hidden, outputs, blocks = sizes

    def inputs() -> tuple[Tensor, ...]:
        parameters = parameters_of(
            features, contexts, hidden, outputs, blocks, batch_norm, torch.get_default_dtype()
        )
        return torch.randn(n, features), torch.randn(n, contexts), *parameters

    def eager(x: Tensor, context: Tensor, *parameters: Tensor) -> Tensor:
        options = blocks, "relu", batch_norm, 1e-3, False, True
        return residual_network(x, context, parameters, [], *options)[0]

    def op(x: Tensor, context: Tensor, *parameters: Tensor) -> Tensor:
        return ops.residual_network(x, context, parameters, blocks=blocks, batch_norm=batch_norm, eps=1e-3)[0]

    # the gradient of a bias before a normalization is 0, of which only rounding would be compared
    zero = {7 + 10 * block for block in range(blocks)} if batch_norm else set()
    return harness.Case(
        name="batch norm" if batch_norm else "plain",
        shape="x".join(map(str, sizes)),
        dtype=torch.float32,
        inputs=inputs,
        providers={"eager": eager, "fastflow": op},
        gradients_of=tuple(i for i in range(len(inputs())) if i not in zero),
    )


def cases(options: argparse.Namespace) -> list[harness.Case]:
    sizes = [(20, 2, 3, 4, 5, 1)] if options.quick else SIZES
    return [of_size(s, batch_norm) for s in sizes for batch_norm in (False, True)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("residual_network", __doc__, cases, argv)


if __name__ == "__main__":
    main()
