"""fastflow::actnorm and the statistics that initialise it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fastflow import ops, reference
from tests.support.cases import (
    CUDA,
    LAYOUTS,
    STATIC,
    TRITON_AND_CPU,
    assert_as_reference,
    assert_no_worse,
    by_body,
    compared_triton_and_cpu,
    lay_out,
    leaf,
    name,
    pairwise,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*TRITON_AND_CPU),
]

OP = torch.ops.fastflow.actnorm.default
SHAPES = [(3, 4), (2, 3, 4, 2), (1, 1, 1, 1), (2, 3, 5), (0, 3, 2, 2), (0, 3)]
both_directions = pytest.mark.parametrize("inverse", [False, True])
any_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape, dtype=torch.float64, parameters=None):
    x, log_scale, bias = torch.randn(shape), 0.5 * torch.randn(shape[1]), torch.randn(shape[1])
    return x.to(dtype), log_scale.to(parameters or dtype), bias.to(parameters or dtype)


@any_shape
def test_formula_and_inverse(shape):
    x, s, b = inputs(shape)
    y, log_det = ops.actnorm(x, s, b)
    for c in range(shape[1]):
        torch.testing.assert_close(y[:, c], s[c].exp() * (x[:, c] + b[c]), rtol=1e-13, atol=1e-13)
    positions = x[0, 0].numel() if shape[0] else 1
    torch.testing.assert_close(log_det, (positions * s.sum()).expand(shape[0]), rtol=1e-13, atol=1e-13)
    back, log_det_back = ops.actnorm(y, s, b, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=0)


def test_log_det_of_several_blocks_of_vectors():
    x, s, b = inputs((700, 7))
    _, log_det = ops.actnorm(x, s, b)
    torch.testing.assert_close(log_det, s.sum().expand(700), rtol=1e-13, atol=1e-13)


GRADIENTS = [{"shape": shape, "inverse": inverse} for shape in SHAPES for inverse in (False, True)]


@by_body(GRADIENTS, reference=GRADIENTS, compiled=GRADIENTS, interpreter=GRADIENTS[::4] + GRADIENTS[3::4])
def test_gradients(case, each_backend):
    (shape, inverse), fast = case.values(), each_backend == "interpreter"
    assert gradcheck(lambda *a: OP(*a, inverse), [leaf(v) for v in inputs(shape)], fast_mode=fast)


@both_directions
@any_shape
def test_backward_is_that_of_the_reference(shape, inverse):
    args = [leaf(v) for v in inputs(shape)]
    y, log_det = reference.actnorm(*args, inverse)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)
    expected = torch.autograd.grad([y, log_det], args, [dy, dlog_det])
    detached = [a.detach() for a in args]
    torch.testing.assert_close(
        reference.actnorm_backward(*detached, dy, dlog_det, inverse), expected, rtol=1e-12, atol=1e-12
    )
    if not inverse:
        found = ops.actnorm_inverse_backward(y.detach(), *detached[1:], dy, dlog_det)
        torch.testing.assert_close(found, (detached[0], *expected), rtol=1e-12, atol=1e-12)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize("shape, inverse", [((3, 4), False), ((2, 3, 4, 2), True)], ids=str)
def test_opcheck(shape, inverse):
    torch.library.opcheck(OP, (*(leaf(v) for v in inputs(shape)), inverse))


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 4, 2, 3)], ids=str)
def test_opcheck_layouts(shape, layout):
    x, s, b = inputs(shape)
    x, dy, dlog_det = (
        lay_out(x, layout),
        lay_out(torch.randn(shape, dtype=x.dtype), layout),
        torch.randn(shape[0], dtype=x.dtype),
    )
    torch.library.opcheck(OP, (leaf(x), leaf(s), leaf(b), True), test_utils=STATIC)
    for op, rest in (("actnorm_backward", (False,)), ("actnorm_inverse_backward", ())):
        torch.library.opcheck(
            getattr(torch.ops.fastflow, op).default, (x, s, b, dy, dlog_det, *rest), test_utils=STATIC
        )
    torch.library.opcheck(torch.ops.fastflow.actnorm_statistics.default, (x,), test_utils=STATIC)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout):
    x, s, b = inputs((3, 6, 4, 5))
    x = lay_out(x, layout)
    found, expected = ops.actnorm(x, s, b), ops.actnorm(x.contiguous(), s, b)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0].stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(
        ops.actnorm_statistics(x), ops.actnorm_statistics(x.contiguous()), rtol=1e-13, atol=1e-13
    )


@both_directions
@pytest.mark.parametrize("parameters", ["float32", None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, parameters, inverse):
    dtype, parameters = getattr(torch, dtype), getattr(torch, parameters or dtype)
    args = inputs((2, 6, 16, 16), dtype, parameters)
    weights = torch.randn(2, 6, 16, 16, dtype=torch.float64)

    def eager(x, s, b):
        s, b = s.view(1, -1, 1, 1), b.view(1, -1, 1, 1)
        y = x * torch.exp(-s) - b if inverse else (x + b) * torch.exp(s)
        log_det = (-256 if inverse else 256) * s.sum()
        return y.to(x.dtype), log_det.expand(2)

    def run(f, *args):
        args = [leaf(a) for a in args]
        y, log_det = f(*args)
        return [y, log_det, *torch.autograd.grad((y.double() * weights).sum() + log_det.double().sum(), args)]

    exact = run(eager, *(a.double() for a in args))
    ours = run(lambda *a: ops.actnorm(*a, inverse=inverse), *args)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    assert_no_worse(ours, run(eager, *args), exact)


@compared_triton_and_cpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        dtype=["float64", "float32", "bfloat16", "float16"],
        x=LAYOUTS,
        dy=LAYOUTS,
        shape=[
            (1, 1),
            (5, 7),
            (3, 5, 9),
            (2, 3, 5, 7),
            (2, 12, 16, 16),
            (2, 48, 4, 4),
            (1, 2, 70, 33),
            (2, 600, 2, 1),
        ],
        inverse=[False, True],
    ),
    ids=lambda c: name(c).replace(" ", ""),
)
def test_every_body_is_the_reference(case, each_backend):
    dtype, shape = getattr(torch, case["dtype"]), case["shape"]
    # NumPy's bits repeat; test_specs.py runs twice in the interpreter, too
    twice = each_backend != "interpreter"
    x, s, b = inputs(shape, dtype)
    x, dy = lay_out(x, case["x"]), lay_out(torch.randn(shape).to(dtype), case["dy"])
    dlog_det = torch.randn(shape[0], dtype=reference.acc_dtype(dtype))
    ours = torch.ops.fastflow
    backward = ours.actnorm_backward.default
    assert_as_reference(OP, x, s, b, case["inverse"], twice=twice)
    assert_as_reference(backward, x, s, b, dy, dlog_det, case["inverse"], twice=twice)
    assert_as_reference(ours.actnorm_inverse_backward.default, x, s, b, dy, dlog_det, twice=twice)
    assert_as_reference(ours.actnorm_statistics.default, x, twice=twice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics(dtype):
    x = (5 + 3 * torch.randn(16, 3, 8, 8)).to(dtype)
    mean, var = ops.actnorm_statistics(x)
    rows = x.double().transpose(0, 1).flatten(1)
    assert mean.dtype == var.dtype == reference.acc_dtype(dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(mean.double(), rows.mean(1), rtol=tolerance, atol=0)
    torch.testing.assert_close(var.double(), rows.var(1, correction=0), rtol=tolerance, atol=0)


def test_statistics_far_from_zero_keep_their_digits():
    """The naive E[x^2] - E[x]^2 would lose all of them in float32."""
    x = torch.randn(4096, 2)
    _, var = ops.actnorm_statistics(x + 1e4)
    torch.testing.assert_close(var, x.var(0, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("first", [1e3, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_statistics_of_a_first_value_far_from_the_others(first, layout):
    """A body that takes the first value for its pivot loses no digits by it; from infinity there is no variance."""
    x = torch.randn(8, 3, 20, 20)
    x[0, :, 0, 0] = first
    mean, var = ops.actnorm_statistics(lay_out(x, layout))
    rows = x.double().transpose(0, 1).flatten(1)
    if first == torch.inf:
        assert not mean.isfinite().any() and var.isnan().all()
    else:
        torch.testing.assert_close(
            (mean.double(), var.double()), (rows.mean(1), rows.var(1, correction=0)), rtol=1e-6, atol=0
        )


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 4), c=st.integers(1, 9), spatial=st.lists(st.integers(1, 7), max_size=3))
def test_shapes(n, c, spatial):
    x, s, b = inputs((n, c, *spatial))
    y, log_det = ops.actnorm(x, s, b)
    assert y.shape == x.shape and log_det.shape == (n,)
    torch.testing.assert_close(ops.actnorm(y, s, b, inverse=True)[0], x, rtol=1e-12, atol=1e-12)


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
def test_same_bits_twice():
    args = [leaf(v) for v in inputs((16, 12, 16, 16), torch.float32)]

    def run():
        y, log_det = ops.actnorm(*args)
        return y, log_det, *torch.autograd.grad((y * y).sum() + log_det.sum(), args)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# torch.func ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("error")
def test_vmap_over_parameters(requires_grad):
    x, s, b = inputs((3, 4, 2, 2))
    scales = torch.stack([s, s + 1]).requires_grad_(requires_grad)
    y, log_det = torch.func.vmap(lambda v: ops.actnorm(x, v, b))(scales)
    for i in range(2):
        torch.testing.assert_close((y[i], log_det[i]), ops.actnorm(x, scales[i], b), rtol=1e-15, atol=1e-15)
    if requires_grad:
        expected = sum(ops.actnorm(x, v, b)[0].square().sum() for v in scales)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, scales)[0] for loss in (y.square().sum(), expected)),
            rtol=1e-13,
            atol=1e-13,
        )


def test_forward_mode():
    x, s, b = inputs((3, 4))
    for wanted in (True, False):  # no_grad disables reverse mode only
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(wanted):
            y, _ = ops.actnorm(torch.autograd.forward_ad.make_dual(x, x), s, b)
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(tangent, x * s.exp(), rtol=1e-15, atol=1e-15)


def test_batched_gradients_of_autograd_are_right():
    x, s, b = (leaf(v) for v in inputs((2, 3)))
    y = ops.actnorm(x, s, b)[0]
    rows = torch.eye(6, dtype=x.dtype).view(6, 2, 3)
    (jacobian,) = torch.autograd.grad(y, x, rows, is_grads_batched=True)
    torch.testing.assert_close(
        jacobian.view(6, 6), torch.diag(s.detach().exp().repeat(2)), rtol=1e-13, atol=0
    )


def test_backward_keeps_the_inputs_alone():
    """What backward needs is the input itself: no copy of it is kept."""
    kept = []
    x, s, b = (leaf(v) for v in inputs((3, 4, 2, 2)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        for inverse in (False, True):
            ops.actnorm(x, s, b, inverse=inverse)
    assert set(kept) == {x.data_ptr(), s.data_ptr(), b.data_ptr()}


@pytest.mark.bodies("compiled", CUDA)
def test_gradients_of_more_samples_than_one_sum_takes():
    """On the CPU, 100 samples are summed in three parts, which are then added."""
    x, dy = torch.randn(100, 3, 2, 2, dtype=torch.float64), torch.randn(100, 3, 2, 2, dtype=torch.float64)
    s, b, dlog_det = torch.randn(3).double(), torch.randn(3).double(), torch.randn(100).double()
    assert_as_reference(torch.ops.fastflow.actnorm_backward.default, x, s, b, dy, dlog_det, False)
