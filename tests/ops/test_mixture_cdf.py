"""fastflow::mixture_cdf: values, both directions, its backward and its inverse + backward."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from fastflow import ops, reference
from fastflow.ops.mixture_cdf import mixture_cdf_parameters
from fastflow.ops.mixture_cdf import reference as mixture_cdf_reference
from tests.support.cases import (
    CUDA,
    STATIC,
    TRACED,
    TRITON_AND_CPU,
    assert_as_reference,
    by_body,
    compared_triton_and_cpu,
    every_value,
    jacobian_log_det,
    lay_out,
    leaves,
    name,
    pairwise,
)

mpmath = pytest.importorskip("mpmath", reason="mpmath comes with torch's sympy")

pytestmark = [pytest.mark.usefixtures("each_backend"), pytest.mark.bodies(*TRITON_AND_CPU)]

OP = torch.ops.fastflow.mixture_cdf.default
BACKWARD = torch.ops.fastflow.mixture_cdf_backward.default
INVERSE_BACKWARD = torch.ops.fastflow.mixture_cdf_inverse_backward.default
each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def inputs(components, shape=(3, 4), transformed=None, scale=0.7, dtype=torch.float64):
    x = 2 * torch.randn(shape, dtype=torch.float64)
    each = mixture_cdf_parameters(components)
    params = scale * torch.randn(shape[0], (transformed or shape[1]) * each, *shape[2:], dtype=torch.float64)
    return x.to(dtype), params.to(dtype)


# values -----------------------------------------------------------------------------------------------------------------------


def exact(x: float, params: list[float]) -> tuple:
    """y and log dy/dx with 100 digits, as Flow++ writes them, with its bounds."""
    with mpmath.workdps(100):
        a, b, *rest = (mpmath.mpf(v) for v in params)
        k = len(rest) // 3
        a, rest[2 * k :] = mpmath.tanh(a), [min(max(v, -7), 7) for v in rest[2 * k :]]
        weights = [mpmath.exp(v) for v in rest[:k]]
        f, above, density = mpmath.mpf(0), mpmath.mpf(0), mpmath.mpf(0)
        for weight, mean, width in zip(weights, rest[k : 2 * k], rest[2 * k :], strict=True):
            e = mpmath.exp((mpmath.mpf(x) - mean) * mpmath.exp(-width))
            f += weight / sum(weights) * e / (1 + e)
            above += weight / sum(weights) / (1 + e)  # 1 - f
            density += weight / sum(weights) * mpmath.exp(-width) * e / (1 + e) ** 2
        return mpmath.exp(a) * mpmath.log(f / above) + b, a + mpmath.log(density / (f * above))


def assert_exact(x, params, components, dtype, factor):
    """Values to so many units of rounding."""
    y, log_det = ops.mixture_cdf(x.to(dtype), params.to(dtype), components=components)
    rows = [
        exact(*row)
        for row in zip(x.to(dtype)[:, 0].double().tolist(), params.to(dtype).double().tolist(), strict=True)
    ]
    expected = [torch.tensor([float(row[i]) for row in rows], dtype=torch.float64) for i in (0, 1)]
    tolerance = factor * torch.finfo(dtype).eps
    for found, truth in ((y[:, 0], expected[0]), (log_det, expected[1])):
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_formula(components, dtype):
    assert_exact(*inputs(components, (30, 1)), components, dtype, 20)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tails(components, dtype):
    """F or 1 - F is 1e-30 and less: one of them rounds to 1, and neither y nor the slope loses digits by it."""
    _, params = inputs(components, (8, 1))
    x = torch.tensor([-5000.0, -80.0, -40.0, -15.0, 15.0, 40.0, 80.0, 5000.0], dtype=torch.float64)
    assert_exact(x[:, None], params, components, dtype, 200)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_between_distant_components(dtype):
    """The slope is as small as the density, down to e^-800; its logarithm has all digits."""
    distance = 100.0 if dtype == torch.float32 else 800.0
    x = torch.tensor([[0.0], [3.0], [-20.0], [60.0]], dtype=torch.float64)
    params = torch.tensor([0.3, -0.2, 0.5, -0.5, -distance, distance, 0.0, 0.1], dtype=torch.float64)
    assert_exact(x, params.expand(4, -1), 2, dtype, 100)


def test_parameters_of_zero_are_the_identity():
    x, params = inputs(4, (20, 4))
    for inverse in (False, True):
        y, log_det = ops.mixture_cdf(x, torch.zeros_like(params), components=4, inverse=inverse)
        torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(log_det, torch.zeros(20, dtype=x.dtype), rtol=0, atol=1e-13)


@pytest.mark.parametrize("components", [1, 4])
def test_inverse_both_ways(components):
    x, params = inputs(components, (200, 1))
    for first in (False, True):
        y, log_det = ops.mixture_cdf(x, params, components=components, inverse=first)
        back, log_det_back = ops.mixture_cdf(y, params, components=components, inverse=not first)
        torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(log_det_back, -log_det, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inverse_of_steps(dtype):
    """Narrow components far apart: F is a staircase, on which Newton's method fails without its bracket.

    The error of x is the rounding of x, of y and of logit F.
    """
    count, components = 400, 6
    _, params = inputs(components, (count, 1), scale=1.0)
    params[:, 2 + components : 2 + 2 * components] *= 10
    params[:, 2 + 2 * components :] = 1.5 * params[:, 2 + 2 * components :] - 2
    y, params = 3 * torch.randn(count, 1).to(dtype), params.to(dtype)
    x, log_det = ops.mixture_cdf(y, params, components=components, inverse=True)
    x, y, params, log_det = (v.double() for v in (x, y, params, log_det))
    rows = zip(x[:, 0].tolist(), params.tolist(), strict=True)
    image = torch.tensor([float(exact(*row)[0]) for row in rows], dtype=torch.float64)
    a, b = params[:, 0].tanh(), params[:, 1]
    z, slope = (y[:, 0] - b) * torch.exp(-a), torch.exp(-log_det)
    unit = torch.finfo(dtype).eps * (
        slope * x[:, 0].abs() + torch.exp(a) * (1 + z.abs()) + y[:, 0].abs() + b.abs()
    )
    assert ((image - y[:, 0]).abs() <= 4 * unit).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bounds(dtype):
    """The log-scale of y is in [-1, 1], those of components in [-7, 7], for any parameters."""
    x, params = inputs(3, (8, 1))
    params[:, 0] = torch.tensor([0.01, 1.0, -3.0, 30.0, -30.0, 1e4, -1e4, -torch.inf])
    params[:, 8:] = torch.tensor(
        [[-6.9, 0.0, 7.1], [-7.1, -6.9, 6.9], [-100.0, 0.5, -8.0], [-1e4, 1e4, 0.0]]
    ).repeat(2, 1)
    assert_exact(x, params, 3, dtype, 100)
    ends = torch.zeros(3, 5, dtype=dtype)
    ends[:, 0] = torch.tensor([torch.inf, -torch.inf, 0.0])
    ends[:, 4] = torch.tensor([0.0, -torch.inf, torch.inf])
    y, log_det = ops.mixture_cdf(torch.ones(3, 1, dtype=dtype), ends, components=1)
    slope = torch.tensor([1.0, 6.0, -7.0], dtype=dtype)
    torch.testing.assert_close((y[:, 0], log_det), (slope.exp(), slope))


def test_bounds_in_gradients():
    """Those of a decrease as tanh's derivative; those of a log-scale outside its bounds are 0."""
    x, params = inputs(2, (6, 1))
    params[:, 0] = torch.tensor([0.0, 2.0, -4.0, 10.0, -20.0, 1e4])
    params[:, 6:] = torch.tensor([[-7.1, -6.9], [-8.0, 0.5], [7.1, 6.9]]).repeat(2, 1)
    args = leaves(x, params)
    assert gradcheck(lambda x, h: OP(x, h, None, 0, 2, False), args, fast_mode=False)
    y, log_det = OP(*args, None, 0, 2, False)
    given = y.detach(), torch.randn_like(y), torch.randn_like(log_det)
    expected = torch.autograd.grad((y, log_det), args, given[1:])
    by_params = expected[1]
    assert (by_params[:, 6:] == 0).equal(params[:, 6:].abs() > 7)
    assert (by_params[:3, 0] != 0).all() and by_params[5, 0] == 0
    found = ops.mixture_cdf_inverse_backward(given[0], params, None, *given[1:], components=2)
    torch.testing.assert_close(found, (x, *expected), rtol=1e-9, atol=1e-9)


def test_is_increasing():
    x, params = inputs(5, (400, 1), scale=1.5)
    y, _ = ops.mixture_cdf(x.sort(0).values, params[:1].expand(400, -1), components=5)
    assert (y.diff(dim=0) > 0).all()


@each_direction
def test_log_det_is_that_of_the_jacobian(inverse):
    x, params = inputs(3, (4, 3), transformed=2)
    order = torch.tensor([2, 0, 1])

    def run(v):
        return ops.mixture_cdf(v, params, order, components=3, inverse=inverse)

    torch.testing.assert_close(run(x)[1], jacobian_log_det(lambda v: run(v)[0], x), rtol=1e-11, atol=1e-11)


@each_direction
def test_channels(inverse):
    """Of a part of the channels, the others are copied; neighbors need no order."""
    x, params = inputs(3, (4, 5, 2), transformed=2)
    given = {"components": 3, "inverse": inverse}
    alone, log_det = ops.mixture_cdf(x[:, [3, 1]], params, **given)
    y, found = ops.mixture_cdf(x, params, torch.tensor([3, 1, 4, 0, 2]), **given)
    assert torch.equal(y[:, [3, 1]], alone) and torch.equal(y[:, [0, 2, 4]], x[:, [0, 2, 4]])
    torch.testing.assert_close(found, log_det)
    alone, log_det = ops.mixture_cdf(x[:, 2:4], params, **given)
    y, found = ops.mixture_cdf(x, params, first_channel=2, **given)
    assert torch.equal(y, torch.cat([x[:, :2], alone, x[:, 4:]], 1))
    torch.testing.assert_close(found, log_det)


# gradients --------------------------------------------------------------------------------------------------------------------

CASES = pairwise(components=[1, 2, 5], inverse=[False, True], half=[False, True])
GRADIENTS = by_body(CASES, reference=CASES, compiled=CASES, interpreter=every_value(CASES)[:2])


def of_case(case, shape=(2, 4)):
    x, params = inputs(case["components"], shape, shape[1] // 2 if case["half"] else None)
    return x, params, torch.randperm(shape[1]) if case["half"] else None


@GRADIENTS
def test_gradients(each_backend, case):
    x, params, order = of_case(case)
    args = leaves(x, params)
    assert gradcheck(
        lambda x, h: OP(x, h, order, 0, case["components"], case["inverse"]), args, fast_mode=True
    )


@pytest.mark.bodies("reference", "compiled", CUDA)  # second derivatives are PyTorch's
@pytest.mark.parametrize("case", every_value(CASES), ids=name)
def test_second_gradients(case):
    x, params, order = of_case(case)
    args = leaves(x, params)
    assert gradgradcheck(
        lambda x, h: OP(x, h, order, 0, case["components"], case["inverse"]), args, fast_mode=True
    )


@pytest.mark.parametrize("case", CASES, ids=name)
def test_backward_is_that_of_the_reference(case):
    x, params, order = of_case(case, (4, 6))
    args = leaves(x, params)
    outputs = reference.mixture_cdf(*args, order, 0, case["components"], case["inverse"])
    upstream = [torch.randn_like(v) for v in outputs]
    expected = torch.autograd.grad(outputs, args, upstream)
    found = BACKWARD(x, params, order, 0, *upstream, case["components"], case["inverse"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if not case["inverse"]], ids=name)
def test_inverse_backward(case):
    x, params, order = of_case(case, (4, 6))
    args = leaves(x, params)
    outputs = reference.mixture_cdf(*args, order, 0, case["components"], False)
    upstream = [torch.randn_like(v) for v in outputs]
    expected = torch.autograd.grad(outputs, args, upstream)
    y = outputs[0].detach()
    back, *found = ops.mixture_cdf_inverse_backward(
        y, params, order, *upstream, components=case["components"]
    )
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-9, atol=1e-9)


def test_gradients_between_distant_components_are_finite():
    """The slope is e^-100, below float32's smallest number; the shares of the components in it have a sum of 1."""
    x = torch.zeros(1, 1)
    params = torch.tensor([[0.0, 0.0, 0.5, -0.5, -100.0, 100.0, 0.0, 0.1]])
    args = leaves(x, params)
    _, log_det = ops.mixture_cdf(*args, components=2)
    found = torch.autograd.grad(log_det.sum(), args)
    args = leaves(x.double(), params.double())
    expected = torch.autograd.grad(ops.mixture_cdf(*args, components=2)[1].sum(), args)
    torch.testing.assert_close([v.double() for v in found], list(expected), rtol=2e-5, atol=2e-5)


# special values, layouts, registration ----------------------------------------------------------------------------------------


@each_direction
def test_nan_stays_in_its_place(inverse):
    x, params = inputs(3)
    each = mixture_cdf_parameters(3)

    def run(x, params):
        args = leaves(x, params)
        y, log_det = ops.mixture_cdf(*args, components=3, inverse=inverse)
        return [v.detach() for v in (y, log_det, *torch.autograd.grad(y.sum() + log_det.sum(), args))]

    clean = run(x, params)
    element, its_params = (torch.zeros_like(v, dtype=torch.bool) for v in (x, params))
    element[1, 2] = True
    its_params[1, 2 * each : 3 * each] = True
    found = run(x.masked_fill(element, torch.nan), params)
    for v, expected, touched in zip(
        found, clean, (element, element.any(1), element, its_params), strict=True
    ):
        # lanes that step longer with others converge to the last bits
        torch.testing.assert_close(v[~touched], expected[~touched], rtol=1e-12, atol=1e-12)
    assert found[0][element].isnan().all() and found[1][element.any(1)].isnan().all()
    assert found[2][element].isnan().all()


def test_empty_batch():
    for inverse in (False, True):
        y, log_det = ops.mixture_cdf(torch.zeros(0, 4), torch.zeros(0, 20), components=1, inverse=inverse)
        assert y.shape == (0, 4) and log_det.shape == (0,)


SHAPES = {
    "vectors": (5, 6),
    "wide": (2, 300),
    "images": (2, 6, 5, 3),
    "one": (1, 1),
}
LAID_OUT = pairwise(
    components=[1, 4, 9],  # 9: two groups of a thread's parameters
    shape=list(SHAPES),
    layout=["contiguous", "channels_last", "sliced", "transposed"],
    dtype=["float64", "float32", "bfloat16"],
    half=[False, True],
)
OF_BODIES = by_body(LAID_OUT, compiled=LAID_OUT, interpreter=every_value(LAID_OUT))


@OF_BODIES
def test_as_reference(each_backend, case):
    shape, dtype = SHAPES[case["shape"]], getattr(torch, case["dtype"])
    half = case["half"] and shape[1] > 1
    x, params = inputs(case["components"], shape, shape[1] // 2 if half else None, dtype=dtype)
    dy = torch.randn(shape).to(dtype)
    x, params, dy = (v if v.ndim < 3 else lay_out(v, case["layout"]) for v in (x, params, dy))
    dlog_det = torch.randn(shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    order = torch.randperm(shape[1]) if half else None
    components = case["components"]
    for inverse in (False, True):
        assert_as_reference(OP, x, params, order, 0, components, inverse, ill_conditioned=True)
        args = x, params, order, 0, dy, dlog_det, components, inverse
        assert_as_reference(BACKWARD, *args, ill_conditioned=True)
    assert_as_reference(INVERSE_BACKWARD, x, params, order, 0, dy, dlog_det, components, ill_conditioned=True)


@compared_triton_and_cpu
def test_more_components_than_the_kernels_have():
    x, params = inputs(65, (2, 2))
    for inverse in (False, True):
        assert_as_reference(OP, x, params, None, 0, 65, inverse)


@pytest.mark.bodies("compiled", CUDA)
@each_direction
def test_opcheck(inverse):
    x, params = inputs(2, (3, 4), transformed=2)
    args = *leaves(x, params), torch.randperm(4), 0, 2, inverse
    torch.library.opcheck(OP, args, test_utils=(*STATIC, *TRACED))


@pytest.mark.bodies("reference")
def test_a_fake_takes_one_step_and_a_graph_has_all(monkeypatch):
    terms, calls = mixture_cdf_reference._terms, []
    monkeypatch.setattr(mixture_cdf_reference, "_terms", lambda *args: calls.append(args) or terms(*args))
    monkeypatch.setitem(mixture_cdf_reference.STEPS, torch.float64, 20)
    args = *inputs(2), None, 0, 2, True
    with FakeTensorMode(allow_non_fake_inputs=True):
        OP(*args)
    of_a_fake = len(calls)
    graph = make_fx(mixture_cdf_reference.mixture_cdf, tracing_mode="fake")(*args)
    assert len(calls) - of_a_fake == of_a_fake + 19
    monkeypatch.undo()
    torch.testing.assert_close(graph(*args), OP(*args))
