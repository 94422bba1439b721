"""fastflow::spline: every convention and tails, both directions, its backward and its inverse + backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastflow import ops, reference
from fastflow.ops.spline import CONVENTIONS, TAILS, parameters_per_element
from fastflow.ops.spline.reference import Form, _elementwise, knots_of
from tests.support.cases import (
    CUDA,
    LAYOUTS,
    STATIC,
    TRITON_AND_CPU,
    assert_as_reference,
    assert_no_worse,
    by_body,
    compared_triton_and_cpu,
    every_value,
    jacobian_log_det,
    lay_out,
    leaf,
    leaves,
    name,
    pairwise,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*TRITON_AND_CPU),
]

OP = torch.ops.fastflow.spline.default
BACKWARD = torch.ops.fastflow.spline_backward.default
INVERSE_BACKWARD = torch.ops.fastflow.spline_inverse_backward.default
VARIANTS = [(convention, tails) for convention in CONVENTIONS for tails in TAILS[convention]]
IN_KERNEL = [variant for variant in VARIANTS if variant[0] != "freia"]
IDENTITY = ("linear", "circular")  # tails
BOUND = 3.0
each_variant = pytest.mark.parametrize("convention, tails", VARIANTS)
each_kernel_variant = pytest.mark.parametrize("convention, tails", IN_KERNEL)
each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def options(convention, tails, bins=5, **other):
    return {
        "bins": bins,
        "bound": BOUND,
        "tails": tails,
        "convention": convention,
        "factor": 1.0,
        "min_bin": 1e-3,
        "min_slope": 1e-3,
        **other,
    }


def inputs(form, shape=(3, 4), transformed=None, scale=1.0, dtype=torch.float64):
    """x inside and outside of the interval, and raw parameters."""
    x = torch.randn(shape, dtype=torch.float64)
    x = 0.4 * x + 0.5 if form["tails"] == "none" else 2 * x
    each = parameters_per_element(form["bins"], form["tails"], form["convention"])
    params = scale * torch.randn(shape[0], (transformed or shape[1]) * each, *shape[2:], dtype=torch.float64)
    return x.to(dtype), params.to(dtype)


def elements(form, count, **kwargs):
    """A sample each: its log-det is the log-derivative."""
    return inputs(form, (count, 1), **kwargs)


# parameters that the samples share ------------------------------------------------------------------------------------------


SHARED = [
    {"variant": variant, "shape": shape, "transformed": transformed}
    for variant in VARIANTS
    for shape, transformed in [((300, 3), 2), ((2, 4, 3, 2), 4), ((0, 2), 1), ((6, 2, 5), 1)]
]


# a kernel adds the gradients of samples whatever the convention: the interpreter has each convention and each shape
@by_body(SHARED, reference=SHARED, compiled=SHARED, interpreter=every_value(SHARED))
def test_shared_parameters_are_those_of_every_sample(each_backend, case):
    (convention, tails), shape, transformed = case.values()
    form = options(convention, tails, factor=0.7)
    x, params = inputs(form, shape, transformed, dtype=torch.float64)
    shared = params[:1].clone() if len(params) else inputs(form, (1, *shape[1:]), transformed)[1]
    dy, dlog_det = torch.randn_like(x), torch.randn(shape[0], dtype=torch.float64)
    each, first = shared.expand(shape[0], *shared.shape[1:]), shape[1] - transformed
    for inverse in (False, True):
        found = ops.spline(x, shared, first_channel=first, **form, inverse=inverse)
        wanted = ops.spline(x, each, first_channel=first, **form, inverse=inverse)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        leaves_ = x.clone().requires_grad_(), shared.clone().requires_grad_()
        results = ops.spline(*leaves_, first_channel=first, **form, inverse=inverse)
        found = torch.autograd.grad(results, leaves_, (dy, dlog_det))
        wanted = BACKWARD(x, each, None, first, dy, dlog_det, *form.values(), inverse)
        wanted = wanted[0], wanted[1].sum(0, keepdim=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    found = INVERSE_BACKWARD(x, shared, None, first, dy, dlog_det, *form.values())
    *wanted, dparams = INVERSE_BACKWARD(x, each, None, first, dy, dlog_det, *form.values())
    torch.testing.assert_close(found, (*wanted, dparams.sum(0, keepdim=True)), rtol=1e-10, atol=1e-10)


def test_shared_parameters_of_vectors_of_functions():
    form = options("fastflow", "linear")
    x, params = inputs(form, (4, 6, 3), 3)
    shared = params[:1, :, 0]  # [1, T P], of all functions
    mapped = torch.vmap(lambda v: ops.spline(v, shared, **form), in_dims=2, out_dims=(2, 1))(x)
    one_by_one = [ops.spline(x[..., i], shared, **form) for i in range(3)]
    wanted = [torch.stack(v, -1) for v in zip(*one_by_one, strict=True)]
    torch.testing.assert_close(list(mapped), wanted)


# values -----------------------------------------------------------------------------------------------------------------------

WIDTHS, HEIGHTS = [0.5, -1.0, 0.25, 1.5], [-0.5, 0.75, 1.0, -1.25]
# float64 results of nflows 0.14 (and normflows 1.7.3), zuko 1.6.0 and FrEIA: the raw parameters after WIDTHS and HEIGHTS,
# options, and x, y, log dy/dx
GOLDEN = {
    "nflows linear": (
        [0.3, -0.7, 1.1],
        {"convention": "nflows"},
        [
            (-4, -4, 0),
            (-3, -3, 0),
            (-2.5, -2.713631442339, -0.980071647590),
            (-0.7, 2.092413628509, 1.238220318541),
            (0, 2.837809038151, -2.598277795291),
            (0.4, 2.855822761304, -3.582849000997),
            (2.9, 2.942875777594, -1.118659139137),
            (3, 3, 0),
            (3.5, 3.5, 0),
        ],
    ),
    "nflows without tails": (
        [-0.4, 0.3, -0.7, 1.1, 0.6],
        {"convention": "nflows", "tails": "none"},
        [
            (0, 0, -0.665502340037),
            (0.1, 0.043043536957, -0.870793725308),
            (0.33, 0.627508937906, 1.394361412303),
            (0.5, 0.972666360249, -2.623224374674),
            (0.77, 0.978699969631, -4.370989123845),
            (0.999, 0.999007053459, -0.051918625499),
            (1, 1, 0.037765761461),
        ],
    ),
    "normflows circular": (
        [0.3, -0.7, 1.1, 0.2],
        {"convention": "nflows", "tails": "circular"},
        [
            (-3.1, -3.1, 0),
            (-3, -3, -0.156238405731),
            (-2.5, -2.680484841822, -0.711599047239),
            (-0.7, 2.257930155485, 1.018003216390),
            (0, 2.804667154187, -2.567511626537),
            (0.4, 2.824255972615, -3.438756397778),
            (2.9, 2.943348105472, -0.979432286554),
            (3, 3, -0.156238405731),
            (3.1, 3.1, 0),
        ],
    ),
    "zuko": (
        [0.3, -0.7, 1.1],
        {"convention": "zuko"},
        [
            (-3.5, -3.5, 0),
            (-3, -3, 0),
            (-2.5, -2.735473581640, -1.118663684456),
            (-0.7, 0.301223299259, 0.452516933748),
            (0, 1.967413404406, 1.013437520548),
            (0.4, 2.735418672104, -0.780377882803),
            (2.9, 2.941610129776, -1.072579780822),
            (3, 3, 0),
            (3.5, 3.5, 0),
        ],
    ),
    "zuko, bound 5": (
        [0.3, -0.7, 1.1],
        {"convention": "zuko", "bound": 5.0},
        [
            (-4, -4.506520481749, -1.180753894309),
            (-3, -4.153537932740, -0.680979198321),
            (-2.5, -3.764356879464, 0.211080370147),
            (-0.7, 1.428243082889, 0.855274606499),
            (0, 3.279022340677, 1.013437520548),
            (0.4, 4.322742444532, 0.539952326695),
            (2.9, 4.771470021566, -3.589401419526),
            (3, 4.774213584216, -3.600960396950),
            (3.5, 4.788178660051, -3.512681761817),
        ],
    ),
    "FrEIA": (
        [0.2, -0.3, 0.3, -0.7, 1.1],
        # FrEIA keeps its smallest bin of 0.1 in float32, also beside float64 parameters
        {"convention": "freia", "tails": "affine", "min_bin": torch.tensor(0.1).item()},
        [
            (-4, -3.411525576033, -0.135123555716),
            (-3, -2.590439477078, -0.558048691232),
            (-2.5, -2.348672739037, -0.819454636276),
            (-0.7, 0.283597525188, 0.570653976597),
            (0, 0.957614492471, 0.176093202267),
            (0.4, 1.507025285757, 0.429862193324),
            (2.9, 3.290754615856, -2.484858632540),
            (3, 3.299263273870, -2.439448568916),
            (3.5, 3.357018782248, -1.778555853788),
        ],
    ),
    "FrEIA, identity tails": (
        [0.25, 0.3, -0.7, 1.1],
        {"convention": "freia"},
        [
            (-4, -4, 0),
            (-3, -3.226570755657, -1.080070078244),
            (-2.5, -3.063298538985, -0.989082777816),
            (-0.7, 2.754520710935, 1.033930387382),
            (0, 3.333864429693, -2.658733590680),
            (0.4, 3.351544141387, -3.568347321307),
            (2.9, 3.388912654663, -3.391305277405),
            (3, 3.392774830128, -3.114832732423),
            (3.5, 3.5, 0),
        ],
    ),
}


@pytest.mark.parametrize("library", GOLDEN)
def test_values_of_libraries(library):
    rest, other, rows = GOLDEN[library]
    x, y, log_slope = torch.tensor(rows, dtype=torch.float64).unsqueeze(-1).unbind(1)
    params = torch.tensor(WIDTHS + HEIGHTS + rest, dtype=torch.float64).expand(len(x), -1)
    found = ops.spline(x, params, bins=4, **other)
    torch.testing.assert_close(found, (y, log_slope[:, 0]), rtol=0, atol=1e-11)
    back, log_det = ops.spline(found[0], params, bins=4, **other, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-11)
    # where y is at an open end, its x may be outside
    inside = (x[:, 0].abs() != BOUND) | (log_slope[:, 0] == 0)
    torch.testing.assert_close(log_det[inside], -found[1][inside], rtol=0, atol=1e-11)


def softplus(v):
    return max(v, 0) + math.log1p(math.exp(-abs(v)))


def by_hand(x, raw, bins, bound, tails, convention, factor, min_bin, min_slope):
    """One element by the textbook's formula: knots, the bin, the rational quadratic."""
    start, length = (0.0, 1.0) if tails == "none" else (-bound, 2 * bound)
    log_range = math.log(min_slope)

    def knots(raw):
        u = [factor * v for v in raw]
        if convention == "zuko":
            u = [v / (1 + abs(2 * v / log_range)) for v in u]
        e = [math.exp(v) for v in u]
        smallest = 0 if convention == "zuko" else min_bin
        shares = [smallest + (1 - smallest * bins) * v / sum(e) for v in e]
        return [start + length * sum(shares[:i]) for i in range(bins + 1)]

    def slope(v):
        if convention == "zuko":
            return math.exp(v / (1 + abs(v / log_range)))
        one = math.log(math.exp(1 - min_slope) - 1) if convention == "fastflow" else 0
        return min_slope + softplus(v + one)

    xs, ys, slopes = knots(raw[:bins]), knots(raw[bins : 2 * bins]), [slope(v) for v in raw[2 * bins :]]
    slopes = {"linear": [1, *slopes, 1], "circular": slopes + slopes[:1], "none": slopes}[tails]
    if not start <= x <= start + length:
        if tails != "none":
            return x, 0.0
        end = 0 if x < start else bins
        return ys[end] + slopes[end] * (x - xs[end]), math.log(slopes[end])
    k = max(i for i in range(bins) if i == 0 or xs[i] <= x)
    s, d0, d1 = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k]), slopes[k], slopes[k + 1]
    xi = (x - xs[k]) / (xs[k + 1] - xs[k])
    bottom = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
    y = ys[k] + (ys[k + 1] - ys[k]) * (s * xi**2 + d0 * xi * (1 - xi)) / bottom
    return y, math.log(s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / bottom**2)


@each_kernel_variant
def test_formula(convention, tails):
    form = options(convention, tails, bound=2.0, factor=0.6, min_bin=0.05, min_slope=0.02)
    x, params = elements(form, 40)
    rows = [by_hand(v, raw, **form) for v, raw in zip(x[:, 0].tolist(), params.tolist(), strict=True)]
    y, log_slope = torch.tensor(rows, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(ops.spline(x, params, **form), (y[:, None], log_slope), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "convention, tails", [v for v in VARIANTS if v[0] != "nflows"]
)  # nflows' slope is 0.694 there
def test_parameters_of_zero_are_the_identity(convention, tails):
    form = options(convention, tails, min_bin=0.1)
    x, params = inputs(form, (20, 4))
    for inverse in (False, True):
        y, log_det = ops.spline(x, torch.zeros_like(params), **form, inverse=inverse)
        torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(log_det, torch.zeros(20, dtype=x.dtype), rtol=0, atol=1e-13)


@each_variant
def test_inverse_both_ways(convention, tails):
    form = options(convention, tails)
    x, params = elements(form, 300)
    for first, second in ((False, True), (True, False)):
        y, log_det = ops.spline(x, params, **form, inverse=first)
        back, log_det_back = ops.spline(y, params, **form, inverse=second)
        torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(log_det_back, -log_det, rtol=1e-11, atol=1e-11)


@each_variant
def test_is_increasing(convention, tails):
    form = options(convention, tails)
    x, params = elements(form, 400)
    y, _ = ops.spline(x.sort(0).values, params[:1].expand(400, -1), **form)
    assert (y.diff(dim=0) > 0).all()


@each_variant
def test_log_det_is_that_of_the_jacobian(convention, tails):
    form = options(convention, tails)
    x, params = inputs(form, (4, 3), transformed=2)
    order = torch.tensor([2, 0, 1])
    for inverse in (False, True):
        expected = jacobian_log_det(
            lambda v, i=inverse: ops.spline(v, params, order, **form, inverse=i)[0], x
        )
        found = ops.spline(x, params, order, **form, inverse=inverse)[1]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# gradients --------------------------------------------------------------------------------------------------------------------

CASES = pairwise(variant=VARIANTS, inverse=[False, True], half=[False, True], bins=[1, 3, 6])
GRADIENTS = by_body(CASES, reference=CASES, compiled=CASES, interpreter=every_value(CASES)[:2])


def of_case(case, shape=(2, 4)):
    form = options(*case["variant"], bins=case["bins"], factor=0.7, min_bin=0.02, min_slope=0.05)
    x, params = inputs(form, shape, shape[1] // 2 if case["half"] else None)
    return form, x, params, torch.randperm(shape[1]) if case["half"] else None


@GRADIENTS
def test_gradients(each_backend, case):
    form, x, params, order = of_case(case)
    args = leaves(x, params)
    assert gradcheck(lambda x, h: OP(x, h, order, 0, *form.values(), case["inverse"]), args, fast_mode=True)


@pytest.mark.bodies(
    "reference", "compiled", CUDA
)  # second derivatives are PyTorch's, of the reference's backward
@pytest.mark.parametrize("case", every_value(CASES), ids=name)
def test_second_gradients(case):
    form, x, params, order = of_case(case)
    args = leaves(x, params)
    assert gradgradcheck(
        lambda x, h: OP(x, h, order, 0, *form.values(), case["inverse"]), args, fast_mode=True
    )


@pytest.mark.parametrize("case", CASES, ids=name)
def test_backward_is_that_of_the_reference(case):
    form, x, params, order = of_case(case, (4, 6))
    args = leaves(x, params)
    outputs = reference.spline(*args, order, 0, *form.values(), case["inverse"])
    upstream = [torch.randn_like(v) for v in outputs]
    expected = torch.autograd.grad(outputs, args, upstream)
    found = BACKWARD(x, params, order, 0, *upstream, *form.values(), case["inverse"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if not case["inverse"]], ids=name)
def test_inverse_backward(case):
    form, x, params, order = of_case(case, (4, 6))
    args = leaves(x, params)
    outputs = reference.spline(*args, order, 0, *form.values(), False)
    upstream = [torch.randn_like(v) for v in outputs]
    expected = torch.autograd.grad(outputs, args, upstream)
    back, *found = ops.spline_inverse_backward(outputs[0].detach(), params, order, *upstream, **form)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-9, atol=1e-9)


# special values ---------------------------------------------------------------------------------------------------------------


@each_direction
@each_variant
def test_knots(convention, tails, inverse):
    """At a knot, the bin on either side is right: values and slopes agree, the log-slope's derivative is that of a side."""
    form = options(convention, tails)
    _, params = elements(form, 1)
    knots = knots_of(params[:, None], Form(**form))
    ends = [
        torch.cat([low, low[..., -1:] + size[..., -1:]], -1).flatten()
        for low, size in ((knots.x, knots.width), (knots.y, knots.height))
    ]
    if convention != "freia":  # both bounds exactly
        low, high = (0.0, 1.0) if tails == "none" else (-BOUND, BOUND)
        for end in ends:
            end[0], end[-1] = low, high
    v, image = (e.unsqueeze(-1) for e in (reversed(ends) if inverse else ends))
    params = params.expand(len(v), -1)
    y, log_det = ops.spline(v, params, **form, inverse=inverse)
    torch.testing.assert_close(y, image, rtol=1e-12, atol=1e-12)
    log_slope = knots.slope.flatten().log() * (-1 if inverse else 1)
    inner = (
        slice(1, -1) if tails == "circular" else slice(None)
    )  # at its ends, the identity's slope is right, too
    torch.testing.assert_close(log_det[inner], log_slope[inner], rtol=1e-11, atol=1e-11)
    at_end = torch.minimum((log_det - log_slope).abs(), log_det.abs())
    assert (at_end <= 1e-11).all()

    def by_input(v):
        zero, one = torch.zeros_like(v), torch.ones(len(v), dtype=v.dtype)
        return BACKWARD(v, params, None, 0, zero, one, *form.values(), inverse)[0]

    sides = [by_input(v + step) for step in (-1e-10, 1e-10)]
    found = by_input(v)
    error = torch.minimum(*((found - side).abs() for side in sides))
    assert (error <= 1e-6 * (1 + found.abs())).all()


@each_direction
@each_variant
def test_nan_stays_in_its_place(convention, tails, inverse):
    form = options(convention, tails)
    x, params = inputs(form, (3, 4))
    each = params.shape[1] // 4

    def run(x, params):
        args = leaves(x, params)
        y, log_det = ops.spline(*args, **form, inverse=inverse)
        gradients = torch.autograd.grad(y.sum() + log_det.sum(), args)
        return [v.detach() for v in (y, log_det, *gradients)]

    clean = run(x, params)
    element, its_params = (torch.zeros_like(v, dtype=torch.bool) for v in (x, params))
    element[1, 2] = True
    its_params[1, 2 * each : 3 * each] = True
    sample = element.any(1)
    found = run(x.masked_fill(element, torch.nan), params)
    for v, expected, touched in zip(found, clean, (element, sample, element, its_params), strict=True):
        assert torch.equal(v[~touched], expected[~touched])
    assert found[0][element].isnan().all() and found[1][sample].isnan().all()
    assert found[2][element].isnan().all()
    x[1, 2] = 0.4  # inside
    clean = run(x, params)
    for place in (0, form["bins"]):  # a width and a height
        wrong = params.clone()
        wrong[1, 2 * each + place] = torch.nan
        found = run(x, wrong)
        assert found[0][element].isnan().all()
        if tails != "affine":  # the sizes of those bins are independent
            assert found[1][sample].isnan().all()
        for v, expected, touched in zip(found, clean, (element, sample, element, its_params), strict=True):
            assert torch.equal(v[~touched], expected[~touched])


@each_direction
@each_variant
def test_infinity(convention, tails, inverse):
    form = options(convention, tails)
    _, params = elements(form, 2)
    args = leaves(torch.tensor([[-torch.inf], [torch.inf]], dtype=torch.float64), params)
    y, log_det = ops.spline(*args, **form, inverse=inverse)
    assert torch.equal(y, args[0]) and log_det.isfinite().all()
    dx, dparams = torch.autograd.grad(y.sum() + log_det.sum(), args)
    assert dx.isfinite().all()
    if tails in IDENTITY:  # the slope of a line has an infinite effect
        assert torch.equal(log_det, torch.zeros_like(log_det))
        assert torch.equal(dx, torch.ones_like(dx)) and torch.equal(dparams, torch.zeros_like(dparams))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_direction
@pytest.mark.parametrize("convention, tails", [v for v in VARIANTS if v != ("freia", "linear")])
def test_extreme_parameters(convention, tails, inverse, dtype):
    """Raw values of 1e4 in magnitude have finite values and gradients; FrEIA's linear tails have no smallest bin."""
    form = options(convention, tails)
    x, params = elements(form, 100, dtype=dtype)
    args = leaves(x, 1e4 * params.sign())
    y, log_det = ops.spline(*args, **form, inverse=inverse)
    assert y.isfinite().all() and log_det.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + log_det.sum(), args))
    found = ops.spline_inverse_backward(
        x, args[1].detach(), None, torch.ones_like(x), torch.ones_like(log_det), **form
    )
    assert all(v.isfinite().all() for v in found)


@each_kernel_variant
def test_a_discriminant_below_zero_is_rounding(convention, tails, each_backend):
    """With slopes of 1e-3 beside 1e3, float32 gives discriminants below 0; roots and gradients are finite nevertheless."""
    form = options(convention, tails, bins=4)
    x, params = elements(form, 1000 if each_backend == "interpreter" else 4000, dtype=torch.float32)
    steep = 1e4 if convention == "zuko" else 1e3
    params[:, 8:] = torch.where(params[:, 8:] > 0, steep, -steep)
    y, _ = ops.spline(x, params, **form)
    knots = knots_of(params.unsqueeze(1), Form(**form))
    k = (y.unsqueeze(-1) >= knots.y[..., 1:]).sum(-1, keepdim=True)
    low, height, width = (v.gather(-1, k).squeeze(-1) for v in (knots.y, knots.height, knots.width))
    d0, d1 = (knots.slope.gather(-1, k + i).squeeze(-1) for i in (0, 1))
    s, eta = height / width, y - low
    a, b = height * (s - d0) + eta * (d0 + d1 - 2 * s), height * d0 - eta * (d0 + d1 - 2 * s)
    assert (b * b + 4 * a * s * eta < 0).any()
    args = leaves(y, params)
    back, log_det = ops.spline(*args, **form, inverse=True)
    assert back.isfinite().all() and log_det.isfinite().all()
    # no derivative of a rounded root is right; none may be NaN
    assert not any(g.isnan().any() for g in torch.autograd.grad(back.sum() + log_det.sum(), args))


# accuracy ---------------------------------------------------------------------------------------------------------------------

ACCURACY = pairwise(variant=IN_KERNEL, scale=(1, 3, 6, 10))


@by_body(ACCURACY, compiled=ACCURACY, interpreter=ACCURACY[::3])
def test_float32_is_as_exact_as_the_reference(each_backend, case):
    """Errors against float64 of the same formula, both directions and the round trip: at most twice the reference's.

    Of the mean and of two quantiles: the largest error is a single element's, which rounding happens to meet.
    """
    form = options(*case["variant"], bins=8)
    x, params = elements(form, 3000, scale=case["scale"], dtype=torch.float32)
    values = list(form.values())

    def run(spline, x, params):
        y, log_det = spline(x, params, None, 0, *values, False)
        back, log_det_back = spline(x, params, None, 0, *values, True)
        return y, log_det, back, log_det_back, spline(y, params, None, 0, *values, True)[0]

    exact = run(reference.spline, x.double(), params.double())
    theirs, ours = run(reference.spline, x, params), run(OP, x, params)
    for found, plain, truth in zip(ours, theirs, exact, strict=True):
        error, allowed = ((v.double() - truth).abs() for v in (found, plain))
        for size in (torch.Tensor.mean, lambda v: v.quantile(0.9), lambda v: v.quantile(0.99)):
            assert size(error) <= 2 * size(allowed)


@pytest.mark.parametrize("convention", ["fastflow", "nflows", "zuko"])
def test_float32_beyond_the_interval(convention):
    """The slope of a line is that of the end, however much rounding moves the last knot."""
    form = options(convention, "none", bins=8)
    _, params = elements(form, 500, scale=6, dtype=torch.float32)
    x = 1 + torch.rand(500, 1)
    exact = reference.spline(x.double(), params.double(), None, 0, *form.values(), False)
    found = ops.spline(x, params, **form)
    torch.testing.assert_close(found, tuple(v.float() for v in exact), rtol=1e-5, atol=1e-5)
    exact = reference.spline(x.double(), params.double(), None, 0, *form.values(), True)
    found = ops.spline(x, params, **form, inverse=True)
    torch.testing.assert_close(found, tuple(v.float() for v in exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_direction
@each_kernel_variant
def test_half_precision(convention, tails, inverse, dtype):
    """Computed in float32; a user's own spline computes in the dtype of its tensors, and gets NaN in places."""
    form = options(convention, tails)
    x, params = elements(form, 500, dtype=getattr(torch, dtype))
    dy = torch.randn(x.shape, dtype=torch.float64)

    def own(x, params):
        y, log_slope = _elementwise(x, params.unsqueeze(1), Form(**form), inverse)
        return y, log_slope.flatten(1).sum(1)

    def run(spline, *args):
        args = leaves(*args)
        y, log_det = spline(*args)
        gradients = torch.autograd.grad((y.double() * dy).sum() + log_det.double().sum(), args)
        return [v.detach().double() for v in (y, log_det, *gradients)]

    exact, theirs = run(own, x.double(), params.double()), run(own, x, params)
    ours = run(lambda *a: ops.spline(*a, **form, inverse=inverse), x, params)
    assert all(v.isfinite().all() for v in ours)
    finite = [v.isfinite() for v in theirs]
    assert all(places.double().mean() > 0.9 for places in finite)
    assert_no_worse(*([v[at] for v, at in zip(each, finite, strict=True)] for each in (ours, theirs, exact)))


# channels, parameters, bins ---------------------------------------------------------------------------------------------------

ORDERS = [(1, 1), (2, 1), (5, 1), (5, 2), (5, 4), (5, 5), (8, 3), (34, 17)]  # channels, transformed


CHOSEN = [
    {"channels": order, "size": size, "neighbors": neighbors}
    for order in ORDERS
    for size in ((), (3, 2))
    for neighbors in (False, True)
]
IN_PAIRS = pairwise(channels=ORDERS, size=((), (3, 2)), neighbors=(False, True))


@by_body(CHOSEN, reference=CHOSEN, compiled=CHOSEN, interpreter=IN_PAIRS)
def test_channels(each_backend, case):
    """The first channels of the order, or neighbors, are transformed; the others keep their bits and their gradients."""
    (channels, transformed), size, neighbors = case.values()
    form = options("fastflow", "linear", bins=3)
    x, params = inputs(form, (3, channels, *size), transformed)
    order, first = torch.randperm(channels), 0
    if neighbors:
        first = (channels - transformed + 1) // 2
        order = torch.arange(channels).roll(-first)
    chosen, others = order[:transformed], order[transformed:]
    order = None if neighbors else order
    where = {"first_channel": first, **form}
    for inverse in (False, True):
        args = leaves(x, params)
        y, log_det = ops.spline(*args, order, **where, inverse=inverse)
        dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)
        dx, dparams = torch.autograd.grad((y, log_det), args, (dy, dlog_det))
        alone = leaves(x[:, chosen], params)
        expected = ops.spline(*alone, **form, inverse=inverse)
        gradients = torch.autograd.grad(expected, alone, (dy[:, chosen], dlog_det))
        torch.testing.assert_close((y[:, chosen], log_det), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close((dx[:, chosen], dparams), gradients, rtol=1e-12, atol=1e-12)
        assert torch.equal(y[:, others], x[:, others]) and torch.equal(dx[:, others], dy[:, others])
    y = ops.spline(x, params, order, **where)[0]
    back, dx, dparams = ops.spline_inverse_backward(y, params, order, dy, dlog_det, **where)
    expected = BACKWARD(x, params, order, first, dy, dlog_det, *form.values(), False)
    torch.testing.assert_close((back, dx, dparams), (x, *expected), rtol=1e-9, atol=1e-9)
    assert torch.equal(back[:, others], x[:, others]) and torch.equal(dx[:, others], dy[:, others])


@pytest.mark.parametrize("size", [(), (3, 2)], ids=["vectors", "images"])
def test_one_set_of_parameters_for_all_samples(size):
    form = options("fastflow", "linear")
    x, params = inputs(form, (6, 3, *size))
    one = leaf(params[:1])
    for inverse in (False, True):
        found = ops.spline(x, one.expand(6, *one.shape[1:]), **form, inverse=inverse)
        repeated = one.detach().repeat(6, *[1] * (1 + len(size))).requires_grad_()
        expected = ops.spline(x, repeated, **form, inverse=inverse)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        (gradient,) = torch.autograd.grad(found[0].square().sum() + found[1].sum(), one)
        (each,) = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), repeated)
        torch.testing.assert_close(gradient, each.sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


def assert_all_three(x, params, order, dy, dlog_det, form, inverse, body):
    """Compares all three ops with the reference."""
    twice = body != "interpreter"  # NumPy's bits repeat; test_specs.py runs twice in the interpreter, too
    kwargs = {"twice": twice, "ill_conditioned": True}
    values = list(form.values())
    assert_as_reference(OP, x, params, order, 0, *values, inverse, **kwargs)
    assert_as_reference(BACKWARD, x, params, order, 0, dy, dlog_det, *values, inverse, **kwargs)
    if not inverse:
        assert_as_reference(INVERSE_BACKWARD, x, params, order, 0, dy, dlog_det, *values, **kwargs)


@compared_triton_and_cpu
@pytest.mark.parametrize("bins", [1, 2, 7, 16, 64, 65])
@pytest.mark.parametrize("convention, tails", IN_KERNEL[::4])
def test_bins(convention, tails, bins, each_backend):
    """More than 64 run in PyTorch."""
    form = options(convention, tails, bins=bins)
    x, params = inputs(form, (2, 3), scale=0.5)
    dy, dlog_det = torch.randn_like(x), torch.randn(2, dtype=x.dtype)
    for inverse in (False, True):
        assert_all_three(x, params, None, dy, dlog_det, form, inverse, each_backend)


DTYPES = ["float64", "float32", "bfloat16", "float16"]
SHAPES = [
    (1, 2, 1, 1),
    (3, 6, 5, 7),
    (2, 4, 16, 16),
    (2, 2, 34, 33),
    (33, 10),
    (2, 34, 3),
    (0, 4),
    (0, 2, 3, 3),
]
CASES_OF_BODIES = pairwise(
    variant=IN_KERNEL,
    inverse=[False, True],
    half=[False, True],
    dtype=DTYPES,
    x=LAYOUTS,
    params=LAYOUTS,
    dy=LAYOUTS,
    shape=SHAPES,
)


@by_body(CASES_OF_BODIES, compiled=CASES_OF_BODIES, interpreter=CASES_OF_BODIES[1::4])
def test_every_body_is_the_reference(case, each_backend):
    dtype, shape = getattr(torch, case["dtype"]), case["shape"]
    form = options(*case["variant"], bins=3, factor=0.7)
    x, params = inputs(form, shape, shape[1] // 2 if case["half"] else None, scale=0.5, dtype=dtype)
    dy = torch.randn(shape).to(dtype)
    if shape[0]:
        x, params, dy = (lay_out(v, case[axis]) for v, axis in ((x, "x"), (params, "params"), (dy, "dy")))
    order = torch.randperm(shape[1]) if case["half"] else None
    dlog_det = torch.randn(shape[0], dtype=reference.acc_dtype(dtype))
    assert_all_three(x, params, order, dy, dlog_det, form, case["inverse"], each_backend)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3),
    channels=st.integers(1, 6),
    spatial=st.lists(st.integers(1, 5), max_size=3),
    variant=st.sampled_from(VARIANTS),
    data=st.data(),
)
def test_shapes(n, channels, spatial, variant, data):
    form = options(*variant, bins=3)
    transformed = data.draw(st.integers(1, channels))
    order = torch.tensor(data.draw(st.permutations(range(channels))))
    x, params = inputs(form, (n, channels, *spatial), transformed)
    y, log_det = ops.spline(x, params, order, **form)
    assert y.shape == x.shape and log_det.shape == (n,)
    back = ops.spline(y, params, order, **form, inverse=True)[0]
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    for i in range(n):  # a sample does not depend on its batch
        alone = ops.spline(x[i : i + 1], params[i : i + 1], order, **form)
        torch.testing.assert_close(alone, (y[i : i + 1], log_det[i : i + 1]), rtol=1e-13, atol=1e-13)


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
@pytest.mark.parametrize("shape", [(200, 12), (16, 12, 8, 8)], ids=str)
def test_same_bits_twice(shape):
    form = options("fastflow", "linear", bins=8)

    def run():
        torch.manual_seed(1)
        args = leaves(*inputs(form, shape, 6, dtype=torch.float32))
        y, log_det = ops.spline(*args, torch.arange(12).flip(0), **form)
        return y, log_det, *torch.autograd.grad((y * y).sum() + log_det.sum(), args)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_layouts(layout):
    form = options("fastflow", "linear", bins=3)
    x, params = (lay_out(v, layout) for v in inputs(form, (2, 4, 3, 2), 2))
    values, order = list(form.values()), torch.tensor([3, 1, 0, 2])
    torch.library.opcheck(OP, (*leaves(x, params), order, 0, *values, True), test_utils=STATIC)
    dy, dlog_det = lay_out(torch.randn(x.shape, dtype=x.dtype), layout), torch.randn(2, dtype=x.dtype)
    torch.library.opcheck(BACKWARD, (x, params, order, 0, dy, dlog_det, *values, False), test_utils=STATIC)
    torch.library.opcheck(INVERSE_BACKWARD, (x, params, order, 0, dy, dlog_det, *values), test_utils=STATIC)
