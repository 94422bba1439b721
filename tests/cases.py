"""What the tests of ops and modules share: combinations drawn pairwise, layouts, the Jacobian's log-det."""

from itertools import combinations, product

import torch
from torch import Tensor


def pairwise(**axes) -> list[dict]:
    """Few combinations of ``axes`` in which every pair of values of two axes occurs."""
    cases = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if len(axes) < 3:
        return cases

    def pairs(case: dict) -> set:
        return set(combinations(((name, repr(value)) for name, value in case.items()), 2))

    covered = [pairs(case) for case in cases]
    missing, chosen = set().union(*covered), []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(covered[i] & missing))
        missing -= covered[best]
        chosen.append(cases[best])
    return chosen


def name(case: dict) -> str:
    """A test's id: the values, and the names of those that are True or False."""
    return "-".join(f"{'' if v else 'no_'}{k}" if isinstance(v, bool) else str(v) for k, v in case.items())


STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")  # what opcheck tells of a layout, without tracing
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """``x`` in another layout; "expanded" repeats its first sample."""
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.cat([x.flip(1), x], dim=1).chunk(2, dim=1)[1]
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x.contiguous()


def leaf(x: Tensor) -> Tensor:
    """``x`` as it lies, requiring a gradient where it can."""
    return x.detach().requires_grad_(x.is_floating_point())


def jacobian_log_det(f, x: Tensor) -> Tensor:
    """log|det dz/dx| ``[N]`` of z = f(x), by one backward pass for each element of a sample."""
    x = x.detach().clone().requires_grad_()
    z = f(x).flatten(1)
    rows = [torch.autograd.grad(z[:, d].sum(), x, retain_graph=True, materialize_grads=True)[0].flatten(1) for d in range(z.shape[1])]
    return torch.linalg.slogdet(torch.stack(rows, dim=1)).logabsdet


def randomize(module: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Adds noise to every parameter, so that nothing is at its special first value."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return module


def assert_no_worse(found: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Errors at most twice those of eager PyTorch in the same dtypes, where those exceed float32's rounding."""
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        for size in (torch.Tensor.norm, lambda v: v.abs().max()):
            assert size(ours.double() - truth) <= max(2 * size(theirs.double() - truth), 1e-6 * size(truth))
