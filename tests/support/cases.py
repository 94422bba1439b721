"""What the tests of ops and modules share: combinations drawn pairwise, layouts, the Jacobian's log-det."""

import ctypes
from collections.abc import Callable
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

import fastflow

# For ``@pytest.mark.bodies(*KERNELS)``; tests/conftest.py has what each name means.
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
KERNELS = ["interpreter", CUDA]
EXTENSION = ["reference", "compiled", "emulated", CUDA]  # of ops with CUDA kernels and C++
TRITON_AND_CPU = ["reference", "compiled", *KERNELS]  # of ops with Triton kernels and C++
# of a comparison with the reference
compared_extension = pytest.mark.bodies(*EXTENSION[1:])
compared_triton_and_cpu = pytest.mark.bodies(*TRITON_AND_CPU[1:])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def pairwise(**axes) -> list[dict]:
    """Few combinations of ``axes`` in which every pair of values of two axes occurs."""
    return _covering(2, axes)


def triples(**axes) -> list[dict]:
    """Combinations of ``axes`` in which every triple of values of three axes occurs."""
    return _covering(3, axes)


def _covering(strength: int, axes: dict) -> list[dict]:
    values = [list(v) for v in axes.values()]
    if len(axes) <= strength:
        return [dict(zip(axes, case, strict=True)) for case in product(*values)]
    places = [[(i, a) for a in range(len(v))] for i, v in enumerate(values)]
    missing = {found for chosen in combinations(places, strength) for found in product(*chosen)}
    cases = []
    while missing:
        case = dict(min(missing))
        for i, options in enumerate(places):
            if i not in case:  # the value that meets most of what is missing
                others = list(combinations(case.items(), strength - 1))
                case[i] = max(options, key=lambda o: sum(tuple(sorted((o, *v))) in missing for v in others))[
                    1
                ]
        missing -= set(combinations(sorted(case.items()), strength))
        cases.append(dict(zip(axes, (v[case[i]] for i, v in enumerate(values)), strict=True)))
    return cases


def every_value(cases: list[dict]) -> list[dict]:
    """A few of ``cases`` in which every value of every axis occurs."""
    missing = {item for case in cases for item in case.items()}
    found = []
    while missing:
        found.append(max(cases, key=lambda case: len(missing & case.items())))
        missing -= found[-1].items()
    return found


def by_body(cases: list[dict], **of_bodies: list[dict]):
    """Parametrizes by ``each_backend`` and ``case``: the cases of each body that is named, all of them on a device."""
    values = [(body, case) for body, few in of_bodies.items() for case in few]
    values += [pytest.param("cuda", case, marks=pytest.mark.gpu) for case in cases]
    return pytest.mark.parametrize(
        "each_backend, case",
        values,
        indirect=["each_backend"],
        ids=lambda v: v if isinstance(v, str) else name(v).replace(" ", ""),
    )


def name(case: dict) -> str:
    """A test's id: the values, and the names of those that are True or False."""
    return "-".join(f"{'' if v else 'no_'}{k}" if isinstance(v, bool) else str(v) for k, v in case.items())


# opcheck's tests without tracing, and the one that traces, which takes ten times as long
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = ("test_aot_dispatch_dynamic",)
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


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else leaf(t) for t in tensors]


def jacobian_log_det(f, x: Tensor) -> Tensor:
    """log|det dz/dx| ``[N]`` of z = f(x), by one backward pass for each element of a sample."""
    x = x.detach().clone().requires_grad_()
    z = f(x).flatten(1)
    rows = [
        torch.autograd.grad(z[:, d].sum(), x, retain_graph=True, materialize_grads=True)[0].flatten(1)
        for d in range(z.shape[1])
    ]
    return torch.linalg.slogdet(torch.stack(rows, dim=1)).logabsdet


def randomize(module: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Adds noise to every parameter, so that nothing is at its special first value."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return module


def functional(op: Callable, body: Callable | None = None) -> Callable:
    """``body`` (default: the op itself) without side effects: what writes its first argument gets a copy and returns it."""
    body = body or op
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.is_mutable:
        return body

    def run(x: Tensor, *args: object) -> Tensor:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        # a copy with gaps where x has them; elements that share memory get memory of their own
        copy = x.clone() if reach < x.numel() else x.new_empty_strided(x.shape, x.stride()).copy_(x)
        body(copy, *args)
        return copy

    return run


def assert_as_reference(op, *args, twice: bool = True, ill_conditioned: bool = False) -> None:
    """Compares ``op(*args)`` with the reference: values, strides, and, if ``twice``, its bits with those of a second run.

    Tensors are float64, float32 or half precision; where one is half, so may the results be. Errors of half
    precision, and of float32 if ``ill_conditioned``, are at most twice those of the reference.
    """

    op = functional(op)

    def run(*args):
        found = op(*args)
        return found if isinstance(found, tuple) else (found,)

    found = run(*args)
    if twice:
        assert all(torch.equal(first, second) for first, second in zip(found, run(*args), strict=True))
    with fastflow.backend("reference"):
        expected = run(*args)
    assert [(v.shape, v.dtype, v.stride()) for v in found] == [
        (v.shape, v.dtype, v.stride()) for v in expected
    ]
    floating = {a.dtype for a in (*args, *found) if isinstance(a, Tensor) and a.is_floating_point()}
    if floating <= TOLERANCE.keys() and not (ill_conditioned and torch.float32 in floating):
        tolerance = max(TOLERANCE[dtype] for dtype in floating)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    else:
        with fastflow.backend("reference"):
            exact = run(*map(in_float64, args))
        assert_no_worse(*([v.double() for v in results if v.numel()] for results in (found, expected, exact)))


def in_float64(argument: object) -> object:
    """A floating point tensor or dtype, or those in a list, in float64, anything else as it is."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    if isinstance(argument, list):
        return [in_float64(v) for v in argument]
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def assert_no_worse(found: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Errors at most twice those of eager PyTorch in the same dtypes, where those exceed float32's rounding."""
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        for size in (torch.Tensor.norm, lambda v: v.abs().max()):
            assert size(ours.double() - truth) <= max(2 * size(theirs.double() - truth), 1e-6 * size(truth))


def assert_same_bits_whatever_the_threads(run: Callable[[], tuple[Tensor, ...]]) -> None:
    threads, expected = torch.get_num_threads(), run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def assert_writes_everything(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """The same bits whatever memory held before: compiled bodies take theirs in a way that conftest's poison does not reach."""
    mallopt, perturb = (
        getattr(ctypes.CDLL(None), "mallopt", None),
        -6,
    )  # glibc's M_PERTURB: a byte to fill memory with
    if mallopt is None:
        pytest.skip("memory is poisoned by glibc, which is not here")
    try:
        found = [run() for byte in (0x80, 0x7F) if mallopt(perturb, byte)]
    finally:
        mallopt(perturb, 0)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
