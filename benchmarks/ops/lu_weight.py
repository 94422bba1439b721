"""Times assembling and inverting the LU weights of a stack of 1x1 convolutions.

    python -m benchmarks.ops.lu_weight

Rows go to results/lu_weight.csv; the shape is K x C x C. Providers:

- ``eager``: assembles and inverts each step's matrix in turn, then stacks them;
- ``eager_batched``: plain PyTorch on the stack;
- ``compile``: torch.compile of the loop, for K = 8 only, as K = 32 takes minutes to compile;
- ``compile_batched``: torch.compile of plain PyTorch on the stack.

In the case ``stack`` the parameters are stacks. In ``steps`` they are K tensors each, as layers hold them,
so that providers on stacks have to make the stacks first.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.tools import harness
from fastflow import ops, reference


def loop(P, perm, lower, upper, log_s, sign_s):
    """Each step's W, inverse and log-det as an eager Glow computes them, with the matrix P, not ``perm``."""
    unit = torch.eye(lower[0].shape[-1], dtype=lower[0].dtype, device=lower[0].device)
    steps = []
    for p, l, u, s, sign in zip(P, lower, upper, log_s, sign_s, strict=True):  # noqa: E741
        L, U = l.tril(-1) + unit, u.triu(1) + torch.diag(sign * s.exp())
        inverse = torch.linalg.solve_triangular(
            U, torch.linalg.solve_triangular(L, p.mT, upper=False, unitriangular=True), upper=True
        )
        steps.append((p @ (L @ U), inverse, s.sum()))
    return tuple(map(torch.stack, zip(*steps, strict=True)))


def on_stack(f: Callable) -> Callable:
    return lambda P, *stacks: f(*stacks)


def unbound(P, *stacks):
    return loop(*(v.unbind() for v in (P, *stacks)))


def of_steps(f: Callable, k: int) -> Callable:
    """``f`` on stacks of K tensors each. P is not used and not stacked."""
    return lambda *tensors: f(*(torch.stack(tensors[i * k : (i + 1) * k]) for i in range(1, 6)))


def loop_of_steps(k: int) -> Callable:
    return lambda *tensors: loop(*(tensors[i * k : (i + 1) * k] for i in range(6)))


def stack(k: int, c: int) -> tuple[torch.Tensor, ...]:
    perm = torch.stack([torch.randperm(c) for _ in range(k)])
    P = torch.nn.functional.one_hot(perm, c).float()
    return (
        P,
        perm,
        torch.randn(k, c, c) / c,
        torch.randn(k, c, c) / c,
        0.3 * torch.randn(k, c),
        torch.randn(k, c).sign(),
    )


def of_size(k: int, c: int, compiled: bool) -> list[harness.Case]:
    providers = {
        "eager": unbound,
        "eager_batched": on_stack(reference.lu_weight),
        "fastflow": on_stack(ops.lu_weight),
    }
    if compiled:
        providers["compile_batched"] = torch.compile(on_stack(reference.lu_weight), dynamic=False)
    about = {"shape": f"{k}x{c}x{c}", "dtype": torch.float32}
    of_stack = harness.Case(
        "stack",
        inputs=lambda: stack(k, c),
        providers=providers,
        gradients_of=(2, 3, 4),
        compiled=k <= 8,
        **about,
    )
    steps = harness.Case(
        "steps",
        inputs=lambda: tuple(v.clone() for s in stack(k, c) for v in s),
        providers={
            "eager": loop_of_steps(k),
            "eager_batched": of_steps(reference.lu_weight, k),
            "fastflow": of_steps(ops.lu_weight, k),
        },
        gradients_of=tuple(range(2 * k, 5 * k)),
        compiled=False,  # takes minutes with hundreds of tensors
        **about,
    )
    return [of_stack, steps]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    sizes = [(2, 3)] if options.quick else [(k, c) for k in (8, 32) for c in (12, 24, 48)]
    return [case for size in sizes for case in of_size(*size, options.compiled)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("lu_weight", __doc__, cases, argv)


if __name__ == "__main__":
    main()
