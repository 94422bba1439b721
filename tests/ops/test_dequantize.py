"""fastflow::dequantize and its inverse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import fastflow
from fastflow import ops, reference
from fastflow.ops.squeeze import ORDERS
from tests.support.cases import (
    CUDA,
    LAYOUTS,
    STATIC,
    TRACED,
    TRITON_AND_CPU,
    compared_triton_and_cpu,
    every_value,
    lay_out,
    leaf,
    name,
    pairwise,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*TRITON_AND_CPU),
]

OP = torch.ops.fastflow.dequantize.default
BACKWARD = torch.ops.fastflow.dequantize_backward.default
INVERSE = torch.ops.fastflow.dequantize_inverse.default


def assert_same_sum(found, expected, backend):
    """Bit for bit in PyTorch; a kernel that cuts a sample into other tiles adds up in another order."""
    torch.testing.assert_close(found, expected, rtol=0 if backend == "reference" else 1e-6, atol=0)


ALPHAS = (0.05, 1e-5)
MAPS = {
    "plain": {"scale": 1.0, "shift": 0.0, "logit": False},
    "glow": {"scale": 1.0, "shift": -0.5, "logit": False},
    **{f"realnvp-{a}": {"scale": 1 - a, "shift": a, "logit": True} for a in ALPHAS},
    **{f"tutorial-{a}": {"scale": 1 - a, "shift": a / 2, "logit": True} for a in ALPHAS},
}
LOGITS = [k for k, v in MAPS.items() if v["logit"]]
every_map = pytest.mark.parametrize("preset", MAPS)
AXES = {
    "preset": ["glow", "realnvp-0.05", "tutorial-0.05"],
    "n_bits": [8, 5, 1],
    "squeeze_order": [None, *ORDERS],
}


def variant(preset, n_bits=8, squeeze_order=None):
    """The op's trailing arguments."""
    m = MAPS[preset]
    return n_bits, m["scale"], m["shift"], m["logit"], squeeze_order


def image(n_bits=8, shape=(2, 3, 4, 2)):
    return torch.randint(0, 2**n_bits, shape, dtype=torch.uint8)


def all_values(n_bits=8):
    return torch.arange(2**n_bits, dtype=torch.uint8).view(2, -1)


@pytest.mark.parametrize("n_bits", [8, 5, 1])
@every_map
def test_formula_and_log_det(preset, n_bits):
    """log_det against the derivative of y with respect to x + u, which is that with respect to u."""
    x, m = image(n_bits), MAPS[preset]
    noise = leaf(torch.rand(x.shape, dtype=torch.float64))
    y, log_det = ops.dequantize(x, noise=noise, n_bits=n_bits, **m)
    p = m["scale"] * (x + noise) / 2**n_bits + m["shift"]
    torch.testing.assert_close(y, torch.logit(p) if m["logit"] else p, rtol=1e-11, atol=1e-12)
    (slope,) = torch.autograd.grad(y.sum(), noise)
    torch.testing.assert_close(log_det, slope.log().flatten(1).sum(1), rtol=1e-12, atol=1e-12)
    back, log_det_back = ops.dequantize_inverse(y.detach(), n_bits=n_bits, **m)
    assert back.dtype == torch.uint8 and torch.equal(back, x)
    torch.testing.assert_close(log_det_back, -log_det.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n_bits", range(1, 9))
@every_map
def test_every_value_comes_back_from_its_bins_centre(preset, n_bits, each_backend):
    x = all_values(n_bits)
    dtypes = torch.float32, torch.float64
    if each_backend == "interpreter":  # one of the two, in turns
        dtypes = dtypes[(n_bits + list(MAPS).index(preset)) % 2 :][:1]
    for dtype in dtypes:
        y, _ = ops.dequantize(x, noise=torch.full(x.shape, 0.5, dtype=dtype), n_bits=n_bits, **MAPS[preset])
        back, _ = ops.dequantize_inverse(y, n_bits=n_bits, **MAPS[preset])
        assert y.dtype == dtype and torch.equal(back, x)


@pytest.mark.parametrize("preset", ["plain", "glow"])
def test_without_logit_every_value_and_noise_comes_back(preset, each_backend):
    """Exact in float32 for each of the 256 values and each of the 65536 noises: x + u has 24 binary digits."""
    noise = torch.arange(65536) / 65536
    if each_backend == "interpreter":  # minutes for all of them
        noise = torch.cat([noise[::1021], noise[-8:]])
    noise = noise.expand(2, 128, -1)
    x = all_values().unsqueeze(2).expand(noise.shape)
    y, _ = ops.dequantize(x, noise=noise, **MAPS[preset])
    assert y.max() < MAPS[preset]["shift"] + 1  # 255 + u stays below 256
    assert torch.equal(ops.dequantize_inverse(y, **MAPS[preset])[0], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_bits", [8, 5, 1])
@pytest.mark.parametrize("u", [0.0, 65535 / 65536])
@pytest.mark.parametrize("preset", LOGITS)
def test_logit_is_finite_and_exact_at_the_ends(preset, u, n_bits, dtype):
    x = torch.tensor([[0, 2**n_bits - 1]], dtype=torch.uint8)
    noise = leaf(torch.full((1, 2), u, dtype=dtype))
    y, log_det = ops.dequantize(x, noise=noise, n_bits=n_bits, **MAPS[preset])
    (dnoise,) = torch.autograd.grad(y.sum() + log_det.sum(), noise)
    assert y.isfinite().all() and log_det.isfinite().all() and dnoise.isfinite().all()
    if dtype == torch.float32:
        exact = ops.dequantize(x, noise=noise.double(), n_bits=n_bits, **MAPS[preset])
        torch.testing.assert_close((y.double(), log_det.double()), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", LOGITS)
def test_inverse_log_det_is_finite_far_out(preset):
    y = leaf(torch.tensor([[-200.0, 200.0, -1e4, 1e4]]))
    x, log_det = ops.dequantize_inverse(y, **MAPS[preset])
    assert x.tolist() == [[0, 255, 0, 255]]
    (dy,) = torch.autograd.grad(log_det.sum(), y)
    assert log_det.isfinite().all()
    torch.testing.assert_close(dy, torch.tensor([[1.0, -1, 1, -1]]))


@pytest.mark.parametrize("case", pairwise(**AXES), ids=name)
def test_seed_draws_the_library_noise(case, each_backend):
    x, kwargs = (
        image(case["n_bits"]),
        {"n_bits": case["n_bits"], "squeeze_order": case["squeeze_order"], **MAPS[case["preset"]]},
    )
    dtypes = torch.float32, torch.float64
    if each_backend == "interpreter":  # one of the two, in turns
        dtypes = dtypes[pairwise(**AXES).index(case) % 2 :][:1]
    for dtype in dtypes:
        noise = ops.uniform_noise(x.shape, seed=7, offset=3, dtype=dtype, device=x.device)
        y, log_det = ops.dequantize(x, seed=7, offset=3, dtype=dtype, **kwargs)
        y_given, log_det_given = ops.dequantize(x, noise=noise, **kwargs)
        assert torch.equal(y, y_given) and y.dtype == log_det.dtype == dtype
        assert_same_sum(log_det, log_det_given, each_backend)


@pytest.mark.parametrize("order", ORDERS)
def test_squeezed_at_once(order, each_backend):
    x, kwargs = image(shape=(2, 3, 4, 6)), MAPS["realnvp-0.05"]
    y, log_det = ops.dequantize(x, seed=1, **kwargs)
    squeezed, log_det_squeezed = ops.dequantize(x, seed=1, squeeze_order=order, **kwargs)
    assert torch.equal(squeezed, ops.squeeze2d(y, order))
    assert_same_sum(log_det_squeezed, log_det, each_backend)
    back = ops.dequantize_inverse(squeezed, squeeze_order=order, **kwargs)
    torch.testing.assert_close(back, ops.dequantize_inverse(y, **kwargs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", pairwise(**AXES), ids=name)
def test_gradients(case, each_backend):
    x, v, interpreted = image(case["n_bits"], (2, 1, 2, 4)), variant(**case), each_backend == "interpreter"
    noise = leaf(torch.rand(x.shape, dtype=torch.float64) * 0.9 + 0.05)
    y, log_det = reference.dequantize(x, noise, None, 0, *v, torch.float64)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)
    (expected,) = torch.autograd.grad((y * dy).sum() + (log_det * dlog_det).sum(), noise)
    torch.testing.assert_close(
        BACKWARD(x, noise.detach(), dy, dlog_det, *v), expected, rtol=1e-11, atol=1e-11
    )
    if not interpreted or case in every_value(pairwise(**AXES)):
        assert gradcheck(lambda u: OP(x, u, None, 0, *v, torch.float64), noise, fast_mode=interpreted)
        if v[3]:
            assert gradcheck(lambda z: INVERSE(z, *v)[1], leaf(y), fast_mode=interpreted)


OPCHECKED = pairwise(given=[True, False], **AXES)
TRACED_CASES = [("realnvp-0.05", 5, "channel"), ("tutorial-0.05", 5, None)]  # noise is given, drawn


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize("case", OPCHECKED, ids=name)
def test_opcheck(case):
    given, v = case["given"], variant(case["preset"], case["n_bits"], case["squeeze_order"])
    x = image(case["n_bits"])
    noise, seed = (leaf(torch.rand(x.shape)), None) if given else (None, torch.tensor(3))
    # test_squeeze.py traces each order, test_noise.py the numbers that are drawn
    tests = (*STATIC, *TRACED) if tuple(case.values())[1:] in TRACED_CASES else STATIC
    torch.library.opcheck(OP, (x, noise, seed, 2, *v, torch.float32), test_utils=tests)
    y = OP(x, noise, seed, 2, *v, torch.float32)[0]
    # without gradients where it traces: opcheck adds up all outputs in place, and the first one is of integers
    torch.library.opcheck(INVERSE, (leaf(y), *v), test_utils=STATIC)
    torch.library.opcheck(INVERSE, (y.detach(), *v), test_utils=tests)


OF_TENSORS = pairwise(x=LAYOUTS, noise=LAYOUTS, squeeze_order=[None, *ORDERS])


@pytest.mark.parametrize("case", OF_TENSORS, ids=name)
def test_layouts(case, each_backend):
    x, noise = lay_out(image(shape=(2, 4, 4, 2)), case["x"]), lay_out(torch.rand(2, 4, 4, 2), case["noise"])
    v = variant("tutorial-0.05", 8, case["squeeze_order"])
    y, log_det = OP(x, noise, None, 0, *v, torch.float32)
    torch.testing.assert_close(
        (y, log_det), OP(x.contiguous(), noise.contiguous(), None, 0, *v, torch.float32), rtol=1e-6, atol=1e-6
    )
    dy, z = lay_out(torch.randn(y.shape), case["noise"]), lay_out(torch.randn(2, 4, 4, 2), case["x"])
    # the reference is the fake, and test_images_as_reference compares strides with it in all pairs
    if each_backend in ("compiled", "cuda") and case in every_value(OF_TENSORS):
        torch.library.opcheck(OP, (x, leaf(noise), None, 0, *v, torch.float32), test_utils=STATIC)
        torch.library.opcheck(BACKWARD, (x, noise, dy, log_det, *v), test_utils=STATIC)
        torch.library.opcheck(INVERSE, (leaf(z), *v), test_utils=STATIC)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3),
    rest=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    n_bits=st.integers(1, 8),
    preset=st.sampled_from(sorted(MAPS)),
)
def test_shapes(n, rest, n_bits, preset):
    x = image(n_bits, (n, *rest))
    y, log_det = ops.dequantize(x, noise=torch.full(x.shape, 0.5), n_bits=n_bits, **MAPS[preset])
    assert y.shape == x.shape and log_det.shape == (n,)
    assert torch.equal(ops.dequantize_inverse(y, n_bits=n_bits, **MAPS[preset])[0], x)


def test_log_det_by_hand():
    """-D log 2^n nats without logit."""
    _, log_det = ops.dequantize(image(5), seed=1, n_bits=5, dtype=torch.float64, **MAPS["glow"])
    torch.testing.assert_close(
        log_det, torch.full((2,), -24 * 5 * math.log(2), dtype=torch.float64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    x, m = image(shape=(4, 3, 16, 16)), MAPS["realnvp-0.05"]
    noise = torch.rand(x.shape).to(dtype)
    y, log_det = ops.dequantize(x, noise=noise, **m)
    exact, exact_log_det = ops.dequantize(x, noise=noise.double(), **m)
    assert y.dtype == dtype and log_det.dtype == torch.float32
    assert ((y.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()
    torch.testing.assert_close(log_det.double(), exact_log_det, rtol=1e-5, atol=0)


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
def test_same_bits_twice():
    x, noise = image(shape=(16, 3, 16, 16)), leaf(torch.rand(16, 3, 16, 16))

    def run():
        y, log_det = ops.dequantize(x, noise=noise, **MAPS["realnvp-0.05"])
        return y, log_det, *torch.autograd.grad(y.sum() + log_det.sum(), noise)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# without W a multiple of 8; with; in several tiles, of which some are idle in part; in more than one program a sample; channels_last with
# more channels than a tile's; in tiles of C++ that start within a block of noise; vectors and others than images, which squeeze none
SHAPES = [
    (2, 3, 6, 10),
    (1, 1, 2, 2),
    (3, 3, 4, 16),
    (1, 3, 32, 40),
    (1, 2, 70, 64),
    (2, 20, 4, 4),
    (2, 6, 16, 8),
    (1, 18, 10, 14),
]
OTHERS = [(3, 5), (2, 24), (2, 3, 7), (1, 1, 1, 1), (2, 3, 5, 7), (2, 2, 3, 2, 5), (1, 9001)]
GLOW = [(2, 3, 32, 32), (2, 1, 28, 28)]  # CIFAR-10, MNIST


TOLERANCES = {
    torch.uint8: 0,
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # halves': one rounding


def assert_as_reference(op, *args):
    """The same values within tolerance, the same integers, the same layout."""
    found = op(*args)
    with fastflow.backend("reference"):
        expected = op(*args)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for ours, theirs in pairs:
        assert ours.stride() == theirs.stride()
        tolerance = TOLERANCES[ours.dtype]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# in a layout, one number for all, or drawn from a seed
NOISES = ["given", "number", "seed"]


def with_noises(body, case):
    """``case`` with all kinds of noise instead of its one, which suffices for Triton's interpreter."""
    rest = {axis: value for axis, value in case.items() if axis != "noise"}
    return {"noises": [case["noise"]] if body == "interpreter" else NOISES, **rest}


def assert_all_as_reference(noises, shape, preset, n_bits, squeeze_order, dtype, x_layout, layout):
    x, v, dtype = (
        lay_out(image(n_bits, shape), x_layout),
        variant(preset, n_bits, squeeze_order),
        getattr(torch, dtype),
    )
    drawn = lay_out(torch.rand(shape, dtype=torch.float64).to(dtype), layout)
    centre = torch.full((), 0.5, dtype=dtype).expand(shape)
    for noise in noises:
        if noise == "seed":
            assert_as_reference(OP, x, None, torch.tensor(2**40 + 7), 2**33 + 1, *v, dtype)
        else:
            assert_as_reference(OP, x, drawn if noise == "given" else centre, None, 0, *v, dtype)
    with fastflow.backend("reference"):
        y = OP(x, centre, None, 0, *v, dtype)[0]
    assert_as_reference(INVERSE, lay_out(y, layout), *v)
    dy, dlog_det = (
        lay_out(torch.randn(y.shape, dtype=torch.float64).to(dtype), layout),
        torch.randn(shape[0]).to(ops.acc_dtype(dtype)),
    )
    assert_as_reference(BACKWARD, x, centre if noises == ["number"] else drawn, dy, dlog_det, *v)


KERNEL_AXES = {
    "preset": ["glow", "realnvp-0.05", "tutorial-1e-05"], "n_bits": [8, 5], "dtype": ["float64", "float32", "bfloat16", "float16"],
    "x_layout": LAYOUTS, "layout": LAYOUTS, "noise": NOISES,
}  # fmt: skip
STRIDED = ("contiguous", "sliced", "transposed", "expanded")


@compared_triton_and_cpu
@pytest.mark.parametrize(
    "case", pairwise(shape=SHAPES, squeeze_order=[None, *ORDERS], **KERNEL_AXES), ids=name
)
def test_images_as_reference(case, each_backend):
    assert_all_as_reference(**with_noises(each_backend, case))


@compared_triton_and_cpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        **KERNEL_AXES | {"shape": OTHERS, "squeeze_order": [None], "x_layout": STRIDED, "layout": STRIDED}
    ),
    ids=name,
)
def test_others_as_reference(case, each_backend):
    assert_all_as_reference(**with_noises(each_backend, case))


@compared_triton_and_cpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=GLOW,
        preset=["glow", "tutorial-0.05"],
        squeeze_order=[None, "channel"],
        layout=["contiguous", "channels_last"],
        noise=NOISES,
    ),
    ids=name,
)
def test_glow_as_reference(case, each_backend):
    rest = {"n_bits": 8, "dtype": "float32", "x_layout": case["layout"]}
    assert_all_as_reference(**with_noises(each_backend, case), **rest)


DRAWN = {
    "shape": st.tuples(st.integers(1, 3), st.integers(1, 18), st.integers(1, 5), st.integers(1, 20)),
    "squeeze_order": st.sampled_from(ORDERS),
    "preset": st.sampled_from(["glow", "realnvp-0.05"]),
    "layout": st.sampled_from(LAYOUTS),
}


@pytest.mark.bodies("compiled", CUDA)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_shapes_as_reference(shape, squeeze_order, preset, layout):
    assert_shape_as_reference(NOISES, shape, squeeze_order, preset, layout)


@pytest.mark.bodies("interpreter")
@settings(max_examples=12, deadline=None)
@given(noise=st.sampled_from(NOISES), **DRAWN)
def test_interpreted_shapes_as_reference(noise, shape, squeeze_order, preset, layout):
    assert_shape_as_reference([noise], shape, squeeze_order, preset, layout)


def assert_shape_as_reference(noises, shape, squeeze_order, preset, layout):
    n, c, h, w = shape
    rest = ("float64", layout, layout)
    assert_all_as_reference(noises, (n, c, h, w), preset, 8, None, *rest)
    assert_all_as_reference(noises, (n, c, 2 * h, 2 * w), preset, 8, squeeze_order, *rest)
