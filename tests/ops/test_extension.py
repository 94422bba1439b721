"""The compiled ops as torch.ops.fastflow_C has them: what they refuse, the same bits for any number of threads, all of it written."""

import pytest
import torch

import fastflow
from fastflow import ops
from fastflow.ops import extension
from fastflow.ops.noise import reference as plain_noise
from tests.support.cases import assert_same_bits_whatever_the_threads, assert_writes_everything
from tests.support.matrices import lu_inputs, triangular_inputs

pytestmark = pytest.mark.skipif(not extension.cpu, reason="the C++ extension was not built here: no compiler")
C = torch.ops.fastflow_C

X, W, PERM, LU = (
    torch.zeros(2, 3, 4, 4),
    torch.zeros(3, 3),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.zeros(2, 3, 3),
)
V = torch.zeros(2, 3)
ERRORS = [
    ("triangular_solve", (V, LU, False, False, False), "A has shape [2, 3], expected [K, n, n]"),
    (
        "triangular_solve",
        (torch.zeros(2, 3, 4), LU, False, False, False),
        "A has shape [2, 3, 4], expected [K, n, n]",
    ),
    (
        "triangular_solve",
        (LU, torch.zeros(2, 4, 1), False, False, False),
        "B has shape [2, 4, 1], expected [K, n, m] with K = 2 and n",
    ),
    (
        "triangular_solve",
        (LU, torch.zeros(1, 3, 1), False, False, False),
        "B has shape [1, 3, 1], expected [K, n, m] with K = 2 and n",
    ),
    (
        "triangular_solve",
        (LU.half(), LU.half(), False, False, False),
        "A has dtype Half, expected Float or Double",
    ),
    ("triangular_solve", (LU, LU.double(), False, False, False), "B has dtype Double, expected A's, Float"),
    ("conv1x1", (X[0, 0, 0], W, None), "x has shape [4], expected [N, C, ...]"),
    ("conv1x1", (X.int(), W, None), "x has dtype Int, expected Float"),
    ("conv1x1", (torch.zeros(2, 65), W, None), "x has shape [2, 65], expected 1 to 64 channels"),
    ("conv1x1", (X, W[:2], None), "weight has shape [2, 3], expected [3, 3], x has 3 channels"),
    ("conv1x1", (X, W.half(), None), "weight has dtype Half, expected Float for x of dtype Float"),
    ("conv1x1", (X, W, torch.zeros(2)), "bias has shape [2], expected [3], one for each channel of x"),
    ("conv1x1_backward", (X, W, X[:, :, 1:]), "dy has shape [2, 3, 3, 4], expected x's, [2, 3, 4, 4]"),
    ("conv1x1_backward", (X, W, X.double()), "dy has dtype Double, expected x's, Float"),
    ("conv1x1_inverse_backward", (X, W, W[:2], None, X), "weight_inverse has shape [2, 3], expected [3, 3]"),
    ("lu_weight", (PERM, V, LU, V, V), "lower has shape [2, 3], expected [K, C, C]"),
    (
        "lu_weight",
        (PERM, torch.zeros(1, 65, 65), LU, V, V),
        "lower has shape [1, 65, 65], expected [K, C, C] with C up to 64",
    ),
    ("lu_weight", (PERM, LU, LU[:1], V, V), "upper has shape [1, 3, 3], expected lower's, [2, 3, 3]"),
    ("lu_weight", (PERM, LU, LU, V[:, :2], V), "log_s has shape [2, 2], expected [2, 3]"),
    ("lu_weight", (PERM.int(), LU, LU, V, V), "perm has dtype Int, expected Long"),
    (
        "lu_weight_backward",
        (PERM, LU, LU, V, V, LU, LU, V, V[:, 0]),
        "dweight_inverse has shape [2, 3], expected lower's, [2, 3, 3]",
    ),
    ("lu_weight_backward", (PERM, LU, LU, V, V, LU, LU, LU, V), "dlog_det has shape [2, 3], expected [2]"),
]

H, F, DL, VARIANT = (
    torch.zeros(2, 4, 4, 4),
    torch.ones(2),
    torch.zeros(2),
    ("halves", False, "exp", "scale_first", "shift_scale"),
)
SOFT = ("halves", False, "soft_clamp", "scale_first", "shift_scale")
PIXELS, SEED, GLOW, SQUEEZED = (
    X.to(torch.uint8),
    torch.tensor(5),
    (8, 1.0, -0.5, False, None),
    (8, 1.0, -0.5, False, "space"),
)
CPU_ERRORS = [
    (
        "affine_coupling",
        (H, H, None, "thirds", *VARIANT[1:], False),
        "mask is thirds, expected one of halves, checkerboard",
    ),
    (
        "affine_coupling",
        (H, H, None, *VARIANT[:2], "cosh", *VARIANT[3:], False),
        "scale is cosh, expected one of exp, sigmoid, ",
    ),
    (
        "affine_coupling",
        (H, H, None, *VARIANT[:3], "last", VARIANT[4], False),
        "order is last, expected one of scale_first, shift_first",
    ),
    (
        "affine_coupling",
        (H, H, None, *VARIANT[:4], "mixed", False),
        "h_order is mixed, expected one of shift_scale, scale_shift, ",
    ),
    (
        "affine_coupling",
        (X, H, None, *VARIANT, False),
        "x has shape [2, 3, 4, 4], expected [N, C, ...] with an even C",
    ),
    (
        "affine_coupling",
        (F, H, None, "checkerboard", *VARIANT[1:], False),
        "x has shape [2], expected [N, C, ...]",
    ),
    (
        "affine_coupling",
        (H.int(), H, None, *VARIANT, False),
        "x has dtype Int, expected Float, Double, BFloat16 or Half",
    ),
    (
        "affine_coupling",
        (H, H.int(), None, *VARIANT, False),
        "h has dtype Int, expected Float, Double, BFloat16 or Half",
    ),
    (
        "affine_coupling",
        (H, H[:, 1:], None, *VARIANT, False),
        "h has shape [2, 3, 4, 4], expected that of x, [2, 4, 4, 4], with 4 ",
    ),
    (
        "affine_coupling",
        (H, H[:, :, 1:], None, *VARIANT, False),
        "h has shape [2, 4, 3, 4], expected that of x, [2, 4, 4, 4], with 4 ",
    ),
    ("affine_coupling", (H, H, None, *SOFT, False), "factor is None, scale is soft_clamp"),
    ("affine_coupling", (H, H, F, *VARIANT, False), "factor is given, scale is exp"),
    (
        "affine_coupling",
        (H, H, DL.new_zeros(3), *SOFT, False),
        "factor has shape [3], expected [2], one for each transformed channel",
    ),
    (
        "affine_coupling_backward",
        (H, H, None, X, DL, *VARIANT, False),
        "dy has shape [2, 3, 4, 4], expected x's, [2, 4, 4, 4]",
    ),
    (
        "affine_coupling_backward",
        (H, H, None, H, V, *VARIANT, False),
        "dlog_det has shape [2, 3], expected [2]",
    ),
    (
        "affine_coupling_inverse_backward",
        (X, H, None, X, DL, *VARIANT),
        "y has shape [2, 3, 4, 4], expected [N, C, ...] with an even C",
    ),
    (
        "affine_coupling_inverse_backward",
        (H, H, None, X, DL, *VARIANT),
        "dy has shape [2, 3, 4, 4], expected y's, [2, 4, 4, 4]",
    ),
    ("actnorm", (F, F, F, False), "x has shape [2], expected [N, C, ...]"),
    ("actnorm", (X.int(), F, F, False), "x has dtype Int, expected Float, Double, BFloat16 or Half"),
    (
        "actnorm",
        (X, F, torch.zeros(3), False),
        "log_scale has shape [2], expected [3], one for each channel of x",
    ),
    (
        "actnorm",
        (X, torch.zeros(3), V, True),
        "bias has shape [2, 3], expected [3], one for each channel of x",
    ),
    (
        "actnorm",
        (X, torch.zeros(3), V.int(), True),
        "bias has dtype Int, expected Float, Double, BFloat16 or Half",
    ),
    (
        "actnorm_backward",
        (X, V[0], V[0], H, DL, False),
        "dy has shape [2, 4, 4, 4], expected x's, [2, 3, 4, 4]",
    ),
    ("actnorm_backward", (X, V[0], V[0], X, V, False), "dlog_det has shape [2, 3], expected [2]"),
    (
        "actnorm_inverse_backward",
        (X, F, V[0], X, DL),
        "log_scale has shape [2], expected [3], one for each channel of y",
    ),
    (
        "actnorm_inverse_backward",
        (X, V[0], V[0], H, DL),
        "dy has shape [2, 4, 4, 4], expected y's, [2, 3, 4, 4]",
    ),
    ("actnorm_statistics", (F,), "x has shape [2], expected [N, C, ...]"),
    ("actnorm_statistics", (X.int(),), "x has dtype Int, expected Float, Double, BFloat16 or Half"),
    ("gaussian_log_prob", (F, None, None), "z has shape [2], expected [N, C, ...]"),
    ("gaussian_log_prob", (X.int(), None, None), "z has dtype Int, expected Float, Double, BFloat16 or Half"),
    (
        "gaussian_log_prob",
        (X, X[:1], None),
        "mean has shape [1, 3, 4, 4], expected z's, [2, 3, 4, 4], or [3], one for each channel",
    ),
    (
        "gaussian_log_prob",
        (X, None, F),
        "log_scale has shape [2], expected z's, [2, 3, 4, 4], or [3], one for each channel",
    ),
    (
        "gaussian_log_prob",
        (X, None, X.int()),
        "log_scale has dtype Int, expected Float, Double, BFloat16 or Half",
    ),
    (
        "gaussian_log_prob_backward",
        (X, X[:1], None, DL),
        "mean has shape [1, 3, 4, 4], expected z's, [2, 3, 4, 4], or [3], one for ",
    ),
    ("gaussian_log_prob_backward", (X, None, None, V), "dlog_prob has shape [2, 3], expected [2]"),
    ("dequantize", (X, X, None, 0, *GLOW, F.dtype), "x has dtype Float, expected Byte"),
    ("dequantize", (PIXELS[0, 0, 0], None, SEED, 0, *GLOW, F.dtype), "x has shape [4], expected [N, ...]"),
    (
        "dequantize",
        (PIXELS, None, None, 0, *GLOW, F.dtype),
        "noise and seed are neither given, expected one of them",
    ),
    (
        "dequantize",
        (PIXELS, X, SEED, 0, *GLOW, F.dtype),
        "noise and seed are both given, expected one of them",
    ),
    (
        "dequantize",
        (PIXELS, H, None, 0, *GLOW, F.dtype),
        "noise has shape [2, 4, 4, 4], expected x's, [2, 3, 4, 4]",
    ),
    (
        "dequantize",
        (PIXELS, PIXELS, None, 0, *GLOW, F.dtype),
        "noise has dtype Byte, expected Float, Double, BFloat16 or Half",
    ),
    (
        "dequantize",
        (PIXELS, None, PERM, 0, *GLOW, F.dtype),
        "seed has dtype Long and shape [2, 3], expected Long without dimensions",
    ),
    (
        "dequantize",
        (PIXELS, None, SEED, 0, *GLOW, torch.int32),
        "dtype is Int, expected Float, Double, BFloat16 or Half",
    ),
    (
        "dequantize",
        (PIXELS, None, SEED, 0, *GLOW[:4], "rows", F.dtype),
        "order is rows, expected one of channel, space, realnvp",
    ),
    (
        "dequantize",
        (PIXELS[:, :, 1:], None, SEED, 0, *SQUEEZED, F.dtype),
        "x has shape [2, 3, 3, 4], expected an even height and width",
    ),
    (
        "dequantize_backward",
        (PIXELS, X, H, DL, *GLOW),
        "dy has shape [2, 4, 4, 4], expected that of x, [2, 3, 4, 4]",
    ),
    (
        "dequantize_backward",
        (PIXELS, X, X, DL, *SQUEEZED),
        "dy has shape [2, 3, 4, 4], expected that of x, [2, 3, 4, 4], squeezed",
    ),
    ("dequantize_backward", (PIXELS, X, X, V, *GLOW), "dlog_det has shape [2, 3], expected [2]"),
    ("dequantize_inverse", (PIXELS, *GLOW), "y has dtype Byte, expected Float, Double, BFloat16 or Half"),
    ("dequantize_inverse", (DL, *GLOW), "y has shape [2], expected [N, ...]"),
    (
        "dequantize_inverse",
        (X, *SQUEEZED),
        "y has shape [2, 3, 4, 4], expected a number of channels that 4 divides",
    ),
    ("squeeze", (H, "rows", False), "order is rows, expected one of channel, space, realnvp"),
    ("squeeze", (LU, "space", False), "x has shape [2, 3, 3], expected [N, C, H, W]"),
    ("squeeze", (H[:, :, 1:], "space", False), "x has shape [2, 4, 3, 4], expected an even height and width"),
    (
        "squeeze",
        (H.to(torch.complex128), "space", False),
        "x has dtype ComplexDouble, expected elements of at most 8 bytes",
    ),
    ("squeeze", (X, "space", True), "x has shape [2, 3, 4, 4], expected a number of channels that 4 divides"),
    (
        "uniform_noise",
        (2, 3, DL, 0, False),
        "seed has dtype Float and shape [2], expected Long without dimensions",
    ),
    (
        "normal_noise",
        (2, 3, PERM, 0, True),
        "seed has dtype Long and shape [2, 3], expected Long without dimensions",
    ),
]
EVERY_ERROR = [(namespace, *error) for namespace in ("fastflow_C", "fastflow_emulated") for error in ERRORS]
EVERY_ERROR += [("fastflow_C", *error) for error in CPU_ERRORS]


@pytest.mark.parametrize(
    "namespace, op, args, message", EVERY_ERROR, ids=[f"{n}-{op}: {m}" for n, op, _, m in EVERY_ERROR]
)
def test_errors_say_what_came_and_what_was_expected(namespace, op, args, message):
    with pytest.raises(RuntimeError) as error:
        getattr(getattr(torch.ops, namespace), op)(*args)
    assert f"{op}: {message}" in str(error.value)


@pytest.mark.parametrize("wrong", [-1, 3, "twice"])
def test_a_perm_that_is_none_is_an_error(wrong):
    perm, *rest = lu_inputs(2, 3)
    perm[1, 2] = perm[1, 0] if wrong == "twice" else wrong
    with pytest.raises(
        ValueError,
        match=rf"lu_weight: perm of matrix 1 has {perm[1, 2]} at place 2, expected each of 0 to 2 once",
    ):
        ops.lu_weight(perm, *rest)
    with fastflow.backend("emulated"):
        ops.lu_weight(perm, *rest)
        with pytest.raises(
            ValueError, match="lu_weight: perm of matrix 1 names no row, or one twice, at place [02]"
        ):
            ops.raise_singular()


@pytest.mark.skipif(
    not extension.cuda, reason="the CUDA extension was not built here: no nvcc, or no CUDA build of torch"
)
@pytest.mark.parametrize(
    "capability, runs", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_a_gpu_that_nothing_was_compiled_for_runs_pytorch(capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(extension.build, "cuda_archs", "8.0;9.0;10.0+PTX")
    assert ops.dispatch.has_code_for.__wrapped__(torch.device("cuda", 0)) is runs


def runs():
    """Calls by name, large enough for several threads: vectors, matrices and layouts that test_specs.py has not."""
    x, dy, weight = (
        torch.randn(64, 12, 16, 16),
        torch.randn(64, 12, 16, 16),
        torch.linalg.qr(torch.randn(12, 12)).Q,
    )
    rows = torch.channels_last
    lu = lu_inputs(33, 48, torch.float32)
    upstream = torch.randn(33, 48, 48), torch.randn(33, 48, 48), torch.randn(33)
    A, B = triangular_inputs(3, 48, 333, torch.float32)
    factor = torch.rand(6) + 0.5
    vectors = (
        torch.randn(9000, 6),
        torch.randn(9000, 6),
        torch.rand(3) + 0.5,
        torch.randn(9000, 6),
        torch.randn(9000),
    )

    def normalized(x, dy, dlog_det):
        """ActNorm's four ops."""
        log_scale, bias = x[0].float() / 4, dy[0].float()
        return (
            *C.actnorm(x, log_scale, bias, False),
            *C.actnorm_backward(x, log_scale, bias, dy, dlog_det, True),
            *C.actnorm_inverse_backward(x, log_scale, bias, dy, dlog_det),
            *C.actnorm_statistics(x),
        )

    def log_prob(z, *terms):
        """The Gaussian's, and its gradients."""
        return C.gaussian_log_prob(z, *terms), *C.gaussian_log_prob_backward(z, *terms, vectors[4])

    pixels = torch.randint(0, 256, (9000, 6)).to(torch.uint8)

    def dequantized(noise, dy):
        """Noise drawn and given, backward, inverse."""
        variant = (8, 0.9, 0.05, True, None)
        y, log_det = C.dequantize(pixels, noise, None, 0, *variant, torch.float32)
        drawn = C.dequantize(pixels, None, SEED, 2**40, *variant, torch.float32)
        return (
            y,
            log_det,
            *drawn,
            C.dequantize_backward(pixels, noise, dy, log_det, *variant),
            *C.dequantize_inverse(y, *variant),
        )

    return {
        "dequantize of vectors": lambda: dequantized(vectors[0].sigmoid(), vectors[1]),
        "actnorm of vectors": lambda: normalized(vectors[0], vectors[3], vectors[4]),
        "uniform_noise": lambda: (
            C.uniform_noise(9, 3001, SEED, 2**40, False),
            C.uniform_noise(3001, 9, SEED, 0, True),
        ),
        "normal_noise": lambda: (
            C.normal_noise(9, 3001, SEED, 2**40, False),
            C.normal_noise(3001, 9, SEED, 0, True),
        ),
        "affine_coupling of vectors": lambda: (
            *C.affine_coupling(*vectors[:3], *SOFT, False),
            *C.affine_coupling_inverse_backward(*vectors, *SOFT),
        ),
        "gaussian_log_prob of vectors": lambda: log_prob(vectors[0], vectors[3], factor),
        "conv1x1": lambda: (C.conv1x1(x, weight, dy[0, :, 0, 0]),),
        "conv1x1_backward": lambda: C.conv1x1_backward(x, weight, dy),
        "conv1x1_backward of rows": lambda: C.conv1x1_backward(
            x.to(memory_format=rows), weight, dy.to(memory_format=rows)
        ),
        "conv1x1_inverse_backward": lambda: C.conv1x1_inverse_backward(x, weight, weight.mT, None, dy),
        "conv1x1_inverse_backward of bfloat16": lambda: C.conv1x1_inverse_backward(
            x.bfloat16(), weight, weight.mT, None, dy.bfloat16()
        ),
        "lu_weight": lambda: C.lu_weight(*lu),
        "lu_weight_backward": lambda: C.lu_weight_backward(*lu, upstream[0], *upstream),
        "triangular_solve": lambda: (C.triangular_solve(A, B, False, False, False),),
        "triangular_solve of a column": lambda: (C.triangular_solve(A, B[..., :1], True, False, False),),
    }


@pytest.mark.parametrize("name", runs())
def test_same_bits_for_any_number_of_threads_and_all_written(name):
    run = runs()[name]
    assert_same_bits_whatever_the_threads(run)
    assert_writes_everything(run)


# what a coupling of vectors with one transformed channel makes of raw scales: f, and 1 where it is in y
FUNCTIONS = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": lambda raw: torch.nn.functional.logsigmoid(raw + 2),
}


@pytest.mark.parametrize("scale", FUNCTIONS)
def test_scale_functions_are_exact_for_every_float(scale):
    """Within 3 units in the last place of what float64 gives, infinities, NaN and denormal numbers too."""
    bits = torch.randint(-(2**31), 2**31, (1_000_000,)).to(torch.int32)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 88.7, 88.8, -103.9, -87.5, 9.0, -9.1]
    )
    raw = torch.cat(
        [bits.view(torch.float32), special, torch.linspace(-110, 95, 500_000), torch.linspace(-3, 3, 500_000)]
    )
    if scale == "sigmoid":
        raw = raw + 2 - 2  # so that adding 2 is exact
    x, h = torch.ones(len(raw), 2), torch.stack([torch.zeros_like(raw), raw], dim=1)
    factor = torch.ones(1) if scale == "tanh" else None
    y, log_det = C.affine_coupling(x, h, factor, "halves", False, scale, "scale_first", "shift_scale", False)
    found, exact = y[:, 1] if scale == "exp" else log_det, FUNCTIONS[scale](raw.double())
    expected = exact.float()
    finite = expected.isfinite() & found.isfinite()
    torch.testing.assert_close(found[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    unit = torch.nextafter(expected.abs(), torch.tensor(torch.inf)) - expected.abs()
    assert ((found.double() - exact).abs() <= 3 * unit.double())[finite].all()


def test_normal_numbers_are_exact():
    """Within 5 units in the last place of what float64 makes of the same words: of logarithm, root, cosine and sine together."""
    seed, d = torch.tensor(3), 1_000_000
    words = plain_noise._words(1, d // 4, seed, 5, plain_noise.NORMAL).unflatten(2, (2, 2))
    u = (words[..., 0].float() + 0.5) * 2.0**-32  # rounded where the body rounds
    radius, angle = torch.sqrt(-2 * torch.log(u.double())), words[..., 1].double() * (2.0**-32 * 2 * torch.pi)
    exact = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=3).flatten()
    found = C.normal_noise(1, d, seed, 5, False).flatten()
    unit = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()
    assert ((found.double() - exact).abs() <= 5 * unit.double()).all()


def log_of(u):
    """The logarithm, by a map whose p is the noise: its logit is log p - log(1 - p), of which the latter is 0 for the smallest p."""
    y, log_det = C.dequantize(
        torch.zeros(len(u), 1, dtype=torch.uint8), u[:, None], None, 0, 8, 256.0, 0.0, True, None, u.dtype
    )
    assert torch.equal(y[:, 0], -log_det) or u.isnan().any()
    return y[:, 0]


def test_log_is_exact_for_every_small_float():
    """Within 3 units in the last place of what float64 gives, of denormal numbers too."""
    u = torch.randint(1, 0x32800000, (1_000_000,)).to(torch.int32).view(torch.float32)  # up to 2^-26
    exact = u.double().log()
    unit = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()
    assert ((log_of(u).double() - exact).abs() <= 3 * unit.double()).all()
    ends = torch.tensor([0.0, -0.0, -1e-40, -1e-30, torch.nan, -torch.inf])
    torch.testing.assert_close(log_of(ends), ends.log(), rtol=0, atol=0, equal_nan=True)
