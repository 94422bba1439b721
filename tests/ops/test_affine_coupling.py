"""fastflow::affine_coupling: both masks, every scale function, order and layout of the network's output, both directions."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fastflow import ops, reference
from fastflow.ops.affine_coupling import AFFINE_ORDERS, MASKS, PARAMS_LAYOUTS, SCALES, WITH_FACTOR
from tests.support.cases import (
    CUDA,
    LAYOUTS,
    STATIC,
    TRACED,
    TRITON_AND_CPU,
    assert_as_reference,
    assert_no_worse,
    by_body,
    compared_triton_and_cpu,
    every_value,
    lay_out,
    leaves,
    name,
    pairwise,
    triples,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*TRITON_AND_CPU),
]

AXES = {
    "mask": MASKS,
    "swap_halves": [False, True],
    "scale": SCALES,
    "affine_order": AFFINE_ORDERS,
    "params_layout": PARAMS_LAYOUTS,
    "inverse": [False, True],
}
FULL = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
PAIRWISE = pairwise(**AXES)
TRIPLES = triples(**AXES)  # no branch of a kernel or of the C++ depends on more than three of these at once
FORWARD = [case for case in FULL if not case["inverse"]]
FORWARD_TRIPLES = triples(**AXES | {"inverse": [False]})
every_variant = by_body(FULL, reference=FULL, compiled=TRIPLES, interpreter=TRIPLES)
every_forward_variant = by_body(
    FORWARD, reference=FORWARD, compiled=FORWARD_TRIPLES, interpreter=FORWARD_TRIPLES
)
OP = torch.ops.fastflow.affine_coupling.default
BACKWARD = torch.ops.fastflow.affine_coupling_backward.default
INVERSE_BACKWARD = torch.ops.fastflow.affine_coupling_inverse_backward.default


def inputs(mask, scale, shape=(2, 4, 3, 2), dtype=torch.float64, h_dtype=None):
    x = torch.randn(shape, dtype=torch.float64)
    transformed = shape[1] if mask == "checkerboard" else shape[1] // 2
    h = torch.randn(shape[0], transformed * (1 if scale == "none" else 2), *shape[2:], dtype=torch.float64)
    factor = torch.rand(transformed, dtype=torch.float64) + 0.5 if scale in WITH_FACTOR else None
    return x.to(dtype), h.to(h_dtype or dtype), factor if factor is None else factor.to(dtype)


def log_s(raw, f, scale):
    if scale == "exp":
        return raw
    if scale == "sigmoid":
        return F.logsigmoid(raw + 2)
    return f * torch.tanh(raw / f) if scale == "soft_clamp" else f * torch.tanh(raw)


def by_hand(x, h, factor, mask, swap_halves, scale, affine_order, params_layout):
    """The textbook's formula, element by element, forward."""
    y, log_det = x.clone(), torch.zeros(x.shape[0], dtype=x.dtype)
    n, c, height, width = x.shape
    for i, k, a, b in product(range(n), range(c), range(height), range(width)):
        transformed = ((k < c // 2) == swap_halves) if mask == "halves" else (a + b) % 2 == swap_halves
        if not transformed:
            continue
        k_h = k % (c // 2) if mask == "halves" else k
        count = c // 2 if mask == "halves" else c
        at_t, at_raw = {
            "shift_scale": (k_h, k_h + count),
            "scale_shift": (k_h + count, k_h),
            "interleaved": (2 * k_h, 2 * k_h + 1),
        }[params_layout]
        if scale == "none":
            y[i, k, a, b] += h[i, k_h, a, b]
            continue
        t, raw = h[i, at_t, a, b], h[i, at_raw, a, b]
        f = None if factor is None else factor[k_h]
        s = torch.exp(log_s(raw, f, scale))
        y[i, k, a, b] = s * x[i, k, a, b] + t if affine_order == "scale_first" else s * (x[i, k, a, b] + t)
        log_det[i] += s.log()
    return y, log_det


@every_forward_variant
def test_formula_and_inverse(each_backend, case):
    x, h, factor = inputs(case["mask"], case["scale"], shape=(2, 4, 2, 3))
    variant = {k: v for k, v in case.items() if k != "inverse"}
    y, log_det = ops.affine_coupling(x, h, factor, **variant)
    torch.testing.assert_close((y, log_det), by_hand(x, h, factor, **variant), rtol=1e-12, atol=1e-12)
    back, log_det_back = ops.affine_coupling(y, h, factor, **variant, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-12, atol=1e-12)


@pytest.mark.bodies("reference", "compiled", CUDA)
@pytest.mark.parametrize("case", TRIPLES, ids=name)
def test_gradients(case):
    """test_backward_is_that_of_the_reference compares the gradients of every case."""
    check_gradients(case)


@pytest.mark.bodies("interpreter")
@pytest.mark.parametrize("case", every_value(PAIRWISE), ids=name)
def test_gradients_of_interpreted_kernels(case):
    check_gradients(case)


def check_gradients(case):
    args = leaves(*inputs(case["mask"], case["scale"]))
    assert gradcheck(lambda *a: OP(*a, *case.values()), args, fast_mode=True)


@every_variant
def test_backward_is_that_of_the_reference(each_backend, case):
    args = leaves(*inputs(case["mask"], case["scale"]))
    outputs = reference.affine_coupling(*args, *case.values())
    dy, dlog_det = (torch.randn_like(v) for v in outputs)
    given = [a for a in args if a is not None]
    # an additive coupling's log-det is a constant
    loss = (outputs[0] * dy).sum() + (outputs[1] * dlog_det).sum()
    expected = torch.autograd.grad(loss, given)
    found = BACKWARD(*(None if a is None else a.detach() for a in args), dy, dlog_det, *case.values())
    torch.testing.assert_close(found[: len(given)], expected, rtol=1e-12, atol=1e-12)


@every_forward_variant
def test_inverse_backward(each_backend, case):
    variant = {k: v for k, v in case.items() if k != "inverse"}
    args = leaves(*inputs(case["mask"], case["scale"]))
    given = [a for a in args if a is not None]
    y, log_det = reference.affine_coupling(*args, *case.values())
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)
    loss = (y * dy).sum() + (log_det * dlog_det).sum()  # an additive coupling's log-det is a constant
    expected = torch.autograd.grad(loss, given)
    x, *gradients = ops.affine_coupling_inverse_backward(
        y.detach(), *(a if a is None else a.detach() for a in args[1:]), dy, dlog_det, **variant
    )
    torch.testing.assert_close(x, args[0].detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tuple(gradients[: len(given)]), expected, rtol=1e-11, atol=1e-11)
    assert len(given) == 3 or gradients[2] is None


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize("case", PAIRWISE, ids=name)
def test_opcheck(case):
    # a trace sees the options as constants: both masks, every layout of h, with and without a factor suffice
    tests = (*STATIC, *TRACED) if case in every_value(PAIRWISE)[1:4] else STATIC
    torch.library.opcheck(
        OP, (*leaves(*inputs(case["mask"], case["scale"])), *case.values()), test_utils=tests
    )


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize(
    "mask, scale, layout",
    [(m, s, v) for m, s in [("halves", "soft_clamp"), ("checkerboard", "none")] for v in LAYOUTS],
)
def test_opcheck_layouts(mask, scale, layout):
    x, h, factor = inputs(mask, scale)
    x, h = lay_out(x, layout), lay_out(h, layout)
    variant = (mask, False, scale, "scale_first", "shift_scale")
    torch.library.opcheck(OP, (*leaves(x, h, factor), *variant, True), test_utils=STATIC)
    dy, dlog_det = lay_out(torch.randn(x.shape, dtype=x.dtype), layout), torch.randn(2, dtype=x.dtype)
    torch.library.opcheck(BACKWARD, (x, h, factor, dy, dlog_det, *variant, False), test_utils=STATIC)
    torch.library.opcheck(INVERSE_BACKWARD, (x, h, factor, dy, dlog_det, *variant), test_utils=STATIC)


@pytest.mark.parametrize(
    "case",
    pairwise(mask=MASKS, scale=SCALES, x_layout=LAYOUTS, h_layout=LAYOUTS, dtype=["float64", "bfloat16"]),
    ids=name,
)
def test_layout_changes_nothing(case):
    dtype = getattr(torch, case["dtype"])
    x, h, factor = inputs(case["mask"], case["scale"], shape=(3, 6, 4, 4), dtype=dtype)
    x, h = lay_out(x, case["x_layout"]), lay_out(h, case["h_layout"])
    variant = {"mask": case["mask"], "scale": case["scale"]}
    found = ops.affine_coupling(x, h, factor, **variant)
    expected = ops.affine_coupling(x.contiguous(), h.contiguous(), factor, **variant)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert found[0].stride() == torch.empty_like(x).stride()


def eager(x, h, factor, scale, inverse):
    """What a user's own coupling computes in the dtype of its tensors: halves, scale first, [shift, scale]."""
    x_a, x_b = x.chunk(2, dim=1)
    t, raw = (h, None) if scale == "none" else h.chunk(2, dim=1)
    f = None if factor is None else factor.view(1, -1, 1, 1)
    log_scale = torch.zeros_like(t) if scale == "none" else log_s(raw, f, scale)
    y_b = (x_b - t) * torch.exp(-log_scale) if inverse else x_b * torch.exp(log_scale) + t
    log_det = log_scale.flatten(1).sum(1)
    return torch.cat([x_a, y_b], dim=1), -log_det if inverse else log_det


HALVES = [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16"), ("float32", "float16")]


@pytest.mark.parametrize(
    "case",
    pairwise(dtypes=HALVES, scale=SCALES, inverse=[False, True]),
    ids=lambda c: name(c).replace(" ", ""),
)
def test_half_precision(case):
    (dtype, h_dtype), scale, inverse = case.values()
    shape = (2, 8, 16, 16)
    x, h, factor = inputs("halves", scale, shape, getattr(torch, dtype), getattr(torch, h_dtype))
    weights = torch.randn(shape, dtype=torch.float64)

    def run(coupling, *args):
        args = leaves(*args)
        y, log_det = coupling(*args)
        gradients = torch.autograd.grad(
            (y.double() * weights).sum() + log_det.double().sum(), [a for a in args if a is not None]
        )
        return [v.detach().double() for v in (y, log_det, *gradients)]

    exact = run(
        lambda *a: eager(*a, scale, inverse), *(a if a is None else a.double() for a in (x, h, factor))
    )
    theirs = run(lambda *a: eager(*a, scale, inverse), x, h, factor)
    ours = run(lambda *a: ops.affine_coupling(*a, scale=scale, inverse=inverse), x, h, factor)
    assert_no_worse(ours, theirs, exact)


def assert_all_three(x, h, factor, dy, dlog_det, variant, inverse, body):
    """Compares all three ops with the reference."""
    twice = body != "interpreter"  # NumPy's bits repeat; test_specs.py runs twice in the interpreter, too
    assert_as_reference(OP, x, h, factor, *variant, inverse, twice=twice)
    assert_as_reference(BACKWARD, x, h, factor, dy, dlog_det, *variant, inverse, twice=twice)
    if not inverse:
        assert_as_reference(INVERSE_BACKWARD, x, h, factor, dy, dlog_det, *variant, twice=twice)


DTYPES = [("float64",) * 2, ("float32",) * 2, ("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")]
SHAPES = [(1, 2, 1, 1), (3, 6, 5, 7), (2, 12, 16, 16), (2, 2, 70, 33), (5, 10), (2, 34, 3)]


@compared_triton_and_cpu
@pytest.mark.parametrize(
    "case",
    pairwise(**AXES, dtypes=DTYPES, x=LAYOUTS, h=LAYOUTS, dy=LAYOUTS, shape=SHAPES),
    ids=lambda c: name(c).replace(" ", ""),
)
def test_every_body_is_the_reference(case, each_backend):
    dtype, h_dtype = (getattr(torch, v) for v in case["dtypes"])
    x, h, factor = inputs(case["mask"], case["scale"], case["shape"], dtype, h_dtype)
    x, h, dy = (
        lay_out(v, case[layout])
        for v, layout in ((x, "x"), (h, "h"), (torch.randn(case["shape"]).to(dtype), "dy"))
    )
    dlog_det = torch.randn(case["shape"][0], dtype=reference.acc_dtype(dtype))
    variant = [case[k] for k in list(AXES)[:-1]]
    assert_all_three(x, h, factor, dy, dlog_det, variant, case["inverse"], each_backend)


AS_GLOW = pairwise(
    scale=SCALES,
    h_dtype=["float32", "bfloat16"],
    layout=["contiguous", "channels_last"],
    shape=[(2, 12, 16, 16), (2, 24, 8, 8), (2, 48, 4, 4)],
)


@by_body(AS_GLOW, compiled=AS_GLOW, interpreter=every_value(AS_GLOW))
def test_as_glow_calls_them(case, each_backend):
    shape, layout, h_dtype, scale = (case[axis] for axis in ("shape", "layout", "h_dtype", "scale"))
    x, h, factor = inputs("halves", scale, shape, torch.float32, getattr(torch, h_dtype))
    x, h, dy = (lay_out(v, layout) for v in (x, h, torch.randn(shape)))
    factor = None if factor is None else factor[:1].expand(shape[1] // 2)
    dlog_det = torch.randn(1).expand(shape[0])
    variant = ["halves", False, scale, "scale_first", "shift_scale"]
    for inverse in (False, True):
        assert_all_three(x, h, factor, dy, dlog_det, variant, inverse, each_backend)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3),
    half=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 5), max_size=3),
    case=st.sampled_from(PAIRWISE),
)
def test_shapes(n, half, spatial, case):
    x, h, factor = inputs(case["mask"], case["scale"], (n, 2 * half, *spatial))
    variant = {k: v for k, v in case.items() if k != "inverse"}
    y, log_det = ops.affine_coupling(x, h, factor, **variant)
    assert y.shape == x.shape and log_det.shape == (n,)
    torch.testing.assert_close(
        ops.affine_coupling(y, h, factor, **variant, inverse=True)[0], x, rtol=1e-10, atol=1e-10
    )
    for i in range(n):  # a sample does not depend on its batch
        alone = ops.affine_coupling(x[i : i + 1], h[i : i + 1], factor, **variant)
        torch.testing.assert_close(alone, (y[i : i + 1], log_det[i : i + 1]), rtol=1e-13, atol=1e-13)


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
@pytest.mark.parametrize("mask", MASKS)
def test_same_bits_twice(mask):
    def run():
        torch.manual_seed(1)
        args = leaves(*inputs(mask, "soft_clamp", (16, 12, 16, 16), torch.float32))
        y, log_det = ops.affine_coupling(*args, mask=mask, scale="soft_clamp")
        return y, log_det, *torch.autograd.grad((y * y).sum() + log_det.sum(), args)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("scale", WITH_FACTOR)
def test_what_lies_under_the_mask_is_not_read(scale):
    """At the positions that pass, the network's output may be anything."""
    x, h, factor = inputs("checkerboard", scale)
    passing = ~reference.checkerboard_transformed(h, False)
    args = leaves(x, h.masked_fill(passing, torch.inf), factor)
    y, log_det = ops.affine_coupling(*args, mask="checkerboard", scale=scale)
    dx, dh, dfactor = torch.autograd.grad(y.sum() + log_det.sum(), args)
    assert (
        y.isfinite().all() and log_det.isfinite().all() and dx.isfinite().all() and dfactor.isfinite().all()
    )
    assert (dh[passing] == 0).all() and torch.equal(y[passing[:, :4]], x[passing[:, :4]])
