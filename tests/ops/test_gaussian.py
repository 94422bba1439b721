"""fastflow::gaussian_log_prob and fastflow::gaussian_sample."""

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal

from fastflow import ops, reference
from tests.support.cases import (
    CUDA,
    LAYOUTS,
    STATIC,
    TRACED,
    TRITON_AND_CPU,
    assert_as_reference,
    compared_triton_and_cpu,
    every_value,
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

LOG_PROB = torch.ops.fastflow.gaussian_log_prob.default
BACKWARD = torch.ops.fastflow.gaussian_log_prob_backward.default
SAMPLE = torch.ops.fastflow.gaussian_sample.default
TERMS = ("none", "channel", "full")
EACH_TERM = [("none", "channel"), ("channel", "full"), ("full", "none")]
every_term = pytest.mark.parametrize("mean, log_scale", list(product(TERMS, TERMS)))


def term(kind, shape, dtype=torch.float64):
    return {
        "none": None,
        "channel": torch.randn(shape[1], dtype=dtype),
        "full": torch.randn(shape, dtype=dtype),
    }[kind]


def inputs(mean, log_scale, shape=(3, 4, 2, 2)):
    return torch.randn(shape, dtype=torch.float64), term(mean, shape), term(log_scale, shape)


def broadcast(v, z):
    return (
        torch.zeros_like(z)
        if v is None
        else (v.view(1, -1, *[1] * (z.ndim - 2)) if v.ndim == 1 else v).expand_as(z)
    )


@every_term
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 4), (4, 4), (1, 1), (0, 3, 2, 2), (2, 3, 5)], ids=str)
def test_is_torchs_normal(mean, log_scale, shape):
    z, m, s = inputs(mean, log_scale, shape)
    expected = Normal(broadcast(m, z), broadcast(s, z).exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(ops.gaussian_log_prob(z, m, s), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.bodies("reference", "compiled", CUDA)
@every_term
def test_gradients(mean, log_scale):
    check_gradients(mean, log_scale)


@pytest.mark.bodies("interpreter")
@pytest.mark.parametrize("mean, log_scale", EACH_TERM)
def test_gradients_of_interpreted_kernels(mean, log_scale):
    """test_backward_is_that_of_the_reference compares the gradients of all nine."""
    check_gradients(mean, log_scale, fast_mode=True)


def check_gradients(mean, log_scale, **options):
    args = leaves(*inputs(mean, log_scale, (2, 3, 1, 2)))
    assert gradcheck(LOG_PROB, args, **options)
    z, *terms = args
    if mean != "none" or log_scale != "none":

        def sample(m, s):
            return SAMPLE(list(z.shape), m, s, 0.7, torch.tensor(1), 2, torch.float64)

        assert gradcheck(sample, terms, **options)


@every_term
def test_backward_is_that_of_the_reference(mean, log_scale):
    args = leaves(*inputs(mean, log_scale))
    given = [a for a in args if a is not None]
    dlog_prob = torch.randn(3, dtype=torch.float64)
    expected = iter(torch.autograd.grad(reference.gaussian_log_prob(*args), given, dlog_prob))
    found = BACKWARD(*(None if a is None else a.detach() for a in args), dlog_prob)
    for a, gradient in zip(args, found, strict=True):
        if a is None:
            assert gradient.numel() == 0
        else:
            torch.testing.assert_close(gradient, next(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@every_term
def test_opcheck(mean, log_scale):
    z, m, s = leaves(*inputs(mean, log_scale))
    tests = (*STATIC, *TRACED) if (mean, log_scale) in EACH_TERM[1:] else STATIC  # each kind of term
    torch.library.opcheck(LOG_PROB, (z, m, s), test_utils=tests)
    torch.library.opcheck(
        SAMPLE, (list(z.shape), m, s, 0.7, torch.tensor(1), 2, torch.float64), test_utils=STATIC
    )


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
def test_opcheck_traces_the_sample():
    z, m, s = leaves(*inputs("channel", "full"))
    torch.library.opcheck(SAMPLE, (list(z.shape), m, s, 0.7, torch.tensor(1), 2, torch.float64))


OF_TENSORS = pairwise(z=LAYOUTS, mean=LAYOUTS, log_scale=LAYOUTS)


@pytest.mark.parametrize("case", OF_TENSORS, ids=name)
def test_layouts(case, each_backend):
    z, m, s = (lay_out(v, layout) for v, layout in zip(inputs("full", "full"), case.values(), strict=True))
    # the reference is the fake, and test_every_body_is_the_reference compares strides with it in all pairs
    if each_backend in ("compiled", "cuda") and case in every_value(OF_TENSORS):
        torch.library.opcheck(LOG_PROB, (leaf(z), leaf(m), leaf(s)), test_utils=STATIC)
        torch.library.opcheck(BACKWARD, (z, m, s, torch.randn(3, dtype=z.dtype)), test_utils=STATIC)
    expected = ops.gaussian_log_prob(z.contiguous(), m.contiguous(), s.contiguous())
    torch.testing.assert_close(ops.gaussian_log_prob(z, m, s), expected, rtol=1e-13, atol=1e-13)


@compared_triton_and_cpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        dtype=["float64", "float32", "bfloat16", "float16"],
        mean=TERMS,
        log_scale=TERMS,
        z_layout=LAYOUTS,
        mean_layout=LAYOUTS,
        log_scale_layout=LAYOUTS,
        shape=[(1, 1), (5, 7), (3, 5, 9), (2, 3, 5, 7), (2, 6, 16, 16), (2, 48, 4, 4), (1, 2, 70, 33)],
    ),
    ids=lambda c: name(c).replace(" ", ""),
)
def test_every_body_is_the_reference(case, each_backend):
    # NumPy's bits repeat; test_specs.py runs twice in the interpreter, too
    assert_every_body_is_the_reference(case, twice=each_backend != "interpreter")


@pytest.mark.bodies("compiled", CUDA)
@pytest.mark.parametrize(
    "dtype, mean, log_scale",
    [("float32", "channel", "channel"), ("float64", "full", "channel"), ("bfloat16", "none", "full")],
)
def test_more_vectors_than_a_thread_of_the_cpu_takes(dtype, mean, log_scale):
    case = {"dtype": dtype, "mean": mean, "log_scale": log_scale, "shape": (300, 3)}
    layouts = dict.fromkeys(("z_layout", "mean_layout", "log_scale_layout"), "contiguous")
    assert_every_body_is_the_reference(case | layouts)


def assert_every_body_is_the_reference(case, twice=True):
    dtype, shape = getattr(torch, case["dtype"]), case["shape"]
    z, m, s = (None if v is None else v.to(dtype) for v in inputs(case["mean"], case["log_scale"], shape))
    z = lay_out(z, case["z_layout"])
    m, s = (
        v if v is None or v.ndim == 1 else lay_out(v, case[layout])
        for v, layout in ((m, "mean_layout"), (s, "log_scale_layout"))
    )
    dlog_prob = torch.randn(shape[0], dtype=reference.acc_dtype(dtype))
    assert_as_reference(LOG_PROB, z, m, s, twice=twice)
    assert_as_reference(BACKWARD, z, m, s, dlog_prob, twice=twice)
    if dtype in (torch.float64, torch.float32):

        def sample(m, s, seed):
            return SAMPLE(list(shape), m, s, 0.7, seed, 2**33, dtype)

        assert_as_reference(sample, m, s, torch.tensor(3), twice=twice)


def test_half_precision():
    z, m, s = (v.bfloat16() for v in inputs("full", "full", (8, 6, 8, 8)))
    log_prob = ops.gaussian_log_prob(z, m, s)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(
        log_prob.double(), ops.gaussian_log_prob(z.double(), m.double(), s.double()), rtol=1e-5, atol=0
    )


def test_log_density_of_zero():
    """D (-1/2 log 2 pi) nats."""
    assert ops.gaussian_log_prob(torch.zeros(1, 3, 2, 2)).item() == pytest.approx(
        -6 * math.log(2 * math.pi), rel=1e-6
    )


@every_term
def test_sample_is_scaled_noise(mean, log_scale):
    z, m, s = inputs(mean, log_scale)
    noise = ops.gaussian_sample(z.shape, seed=4, offset=1, dtype=torch.float64)
    sample = ops.gaussian_sample(z.shape, m, s, seed=4, offset=1, temperature=0.7, dtype=torch.float64)
    torch.testing.assert_close(
        sample, broadcast(m, z) + 0.7 * broadcast(s, z).exp() * noise, rtol=1e-13, atol=1e-13
    )
    cold = ops.gaussian_sample(z.shape, m, s, seed=4, temperature=0.0, dtype=torch.float64)
    torch.testing.assert_close(cold, broadcast(m, z), rtol=0, atol=0)


def test_sample_of_numbers():
    """Samples without dimensions of their own are the first numbers of vectors."""
    assert torch.equal(ops.gaussian_sample((5,), seed=3), ops.gaussian_sample((5, 2), seed=3)[:, 0])


def test_sample_at_temperature_zero_has_its_gradient():
    s = leaf(torch.randn(3, dtype=torch.float64))
    sample = ops.gaussian_sample((2, 3), None, s, seed=1, temperature=0.0, dtype=torch.float64)
    assert torch.autograd.grad(sample.sum(), s)[0].abs().max() == 0


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
def test_same_bits_twice():
    z, m, s = leaves(*(v.float() for v in inputs("channel", "channel", (16, 12, 16, 16))))

    def run():
        return torch.autograd.grad(ops.gaussian_log_prob(z, m, s).sum(), (z, m, s))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.bodies("compiled", CUDA)
def test_gradients_of_more_samples_than_one_sum_takes():
    """On the CPU, 100 samples are summed in three parts, which are then added."""
    z, m, s = torch.randn(100, 3, 2, 2).double(), torch.randn(3).double(), torch.randn(3).double()
    assert_as_reference(BACKWARD, z, m, s, torch.randn(100).double())
