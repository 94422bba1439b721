"""Every registered op, by the cases of its spec: second derivatives, and the transforms of torch.func."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflow import ops
from fastflow.ops import spec
from fastflow.ops.registry import OPS
from tests.support.cases import functional

SHAPE = (2, 4, 2, 2)
NAMES = [str(case) for case in spec.cases(spec.Make(), SHAPE)]
CONSTANTS = ("sign_s",)  # signs, which have no gradient


def case_of(name: str, seed: int = 0) -> spec.Case:
    torch.manual_seed(seed)
    folder = OPS[name.split()[0]].folder
    return next(c for c in spec.cases(spec.Make(torch.float64), SHAPE, folder) if str(c) == name)


def is_real(v: object) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def of_reals(case: spec.Case):
    """``(f, values)``: the op as a function of its floating-point tensors that returns those of its results."""
    op = getattr(torch.ops.fastflow, case.op).default
    names = [argument.name for argument in op._schema.arguments]
    places = [i for i, v in enumerate(case.args) if is_real(v) and names[i] not in CONSTANTS]

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        args = list(case.args)
        for i, v in zip(places, values, strict=True):
            args[i] = v
        return tuple(v for v in tree_leaves(functional(op)(*args)) if is_real(v) and v.numel())

    # ReLU has no derivative at an output of 0, so -1 replaces it
    return f, tuple(torch.where(case.args[i] == 0, -1.0, case.args[i]) for i in places)


def differentiable(name: str) -> bool:
    """Whether an op has real arguments; the statistics that initialize ActNorm have no gradient."""
    return any(map(is_real, case_of(name).args))


DIFFERENTIABLE = [name for name in NAMES if differentiable(name)]


def scalar(f, weights):
    """A function of which first derivatives are not constant."""
    return lambda *values: sum(
        (w * v + v.square() / 2).sum() for w, v in zip(weights, f(*values), strict=True)
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives(name):
    """Against differences of first derivatives; those of a backward are an op's third derivatives."""
    f, values = of_reals(case_of(name))
    variables = tuple(v.clone().requires_grad_() for v in values)
    assert torch.autograd.gradcheck(f, variables, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, variables, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_equal_autograd(name):
    f, values = of_reals(case_of(name))
    weights = [torch.randn_like(v) for v in f(*values)]
    g = scalar(f, weights)
    variables = tuple(v.clone().requires_grad_() for v in values)
    first = torch.autograd.grad(g(*variables), variables, create_graph=True, materialize_grads=True)
    directions = tuple(torch.randn_like(v) for v in values)
    slope = sum((d * v).sum() for d, v in zip(directions, first, strict=True))
    slope = slope + sum(0 * v.sum() for v in variables)  # where first derivatives are constant
    second = torch.autograd.grad(slope, variables, materialize_grads=True)

    gradient = torch.func.grad(g, argnums=tuple(range(len(values))))
    torch.testing.assert_close(gradient(*values), first)
    torch.testing.assert_close(torch.func.jvp(g, values, directions)[1], slope.detach())
    torch.testing.assert_close(torch.func.jvp(gradient, values, directions)[1], second)


def looped(f, dims: tuple[int | None, ...], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    size = next(v.shape[d] for v, d in zip(values, dims, strict=True) if d is not None)
    found = [
        f(*(v if d is None else v.select(d, i) for v, d in zip(values, dims, strict=True)))
        for i in range(size)
    ]
    return tuple(map(torch.stack, zip(*found, strict=True)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_equals_a_loop(name):
    """Over all real arguments, over each alone, and over gradients; an op of samples folds them into its batch."""
    f, values = of_reals(case_of(name))
    others = [of_reals(case_of(name, seed))[1] for seed in (1, 2)]
    stacks = [torch.stack(each, dim=-1) for each in zip(values, *others, strict=True)]
    every = tuple(range(len(values)))
    in_place = name.split()[0].endswith("_")  # what vmap does not map cannot be written
    for mapped in {every, *((i,) for i in (every[:1] if in_place else every))}:
        given = tuple(stacks[i] if i in mapped else v for i, v in enumerate(values))
        dims = tuple(-1 if i in mapped else None for i in every)
        found = torch.vmap(f, dims)(*given)
        torch.testing.assert_close(found, looped(f, dims, given))
        g = torch.func.grad(scalar(f, [torch.ones_like(v) for v in f(*values)]), argnums=every)
        torch.testing.assert_close(torch.vmap(g, dims)(*given), looped(g, dims, given))


class Recorder(TorchDispatchMode):
    """Records the ops that run and the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[list[int]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.name(), [list(v.shape) for v in args if isinstance(v, Tensor)]))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("error")
def test_vmap_over_samples_runs_the_op_once():
    x, parameter = torch.randn(5, 3, 4, 2), torch.randn(4)
    with Recorder() as recorder:
        torch.vmap(functools.partial(ops.actnorm, log_scale=parameter, bias=parameter))(x)
    calls = [shapes for name, shapes in recorder.calls if name.startswith("fastflow")]
    assert calls == [[[15, 4, 2], [4], [4]]]
