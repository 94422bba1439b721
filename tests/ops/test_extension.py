"""The compiled ops, called directly: guards of memory, the same bits for any number of threads, accurate functions."""

from collections.abc import Iterator

import pytest
import torch

import fastflow
from fastflow import ops
from fastflow.ops import extension, spec
from fastflow.ops.noise import reference as plain_noise
from fastflow.ops.registry import OPS
from tests.support.cases import (
    assert_same_bits_whatever_the_threads,
    assert_writes_everything,
    functional,
)
from tests.support.matrices import lu_inputs, triangular_inputs

pytestmark = pytest.mark.skipif(
    not extension.emulator, reason="the emulator was not built here: no compiler, or no FASTFLOW_EMULATOR=1"
)
C = torch.ops.fastflow_C

X, VECTORS, COUNT = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3), torch.zeros(2)
W, CHANNELS, PERM = torch.zeros(3, 3), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)
MATRICES, PIXELS, SEED = torch.zeros(2, 3, 3), X.to(torch.uint8), torch.tensor(5)
EVEN = torch.zeros(2, 4, 4, 4)
COUPLING = ("halves", False, "exp", "scale_first", "shift_scale")
SOFT = ("halves", False, "soft_clamp", "scale_first", "shift_scale")
ADDITIVE = ("checkerboard", False, "none", "scale_first", "shift_scale")
NETWORK = (torch.zeros(2, 3, 3, 3), COUNT, torch.zeros(2, 2), COUNT, torch.zeros(2, 2, 3, 3), COUNT)
FLAT, SQUEEZED = (8, 1.0, -0.5, False, None), (8, 1.0, -0.5, False, "space")
TWO_BINS = (2, 3.0, "linear", "fastflow", 1.0, 1e-3, 1e-3)  # of splines, 5 parameters each
OF_EACH, OF_HALF = torch.zeros(2, 20, 4, 4), torch.zeros(2, 10, 4, 4)  # of EVEN's channels
# of a masked network of 3 features with affine transformers: a layer of 2 units, and of 2, 2 and 2 with a sum
MASKED = (torch.zeros(18), torch.zeros(8), None, torch.tensor([[0, 1, 2]]), torch.arange(3), [2], [4, 0])
AFFINE_MASKED = (
    "relu",
    "exp",
    "scale_first",
    "scale_shift",
    0.0,
    0,
    3.0,
    "linear",
    "fastflow",
    1.0,
    1e-3,
    1e-3,
)
SPLINE_MASKED = (*AFFINE_MASKED[:5], 2, *AFFINE_MASKED[6:])
SOLVED = VECTORS, torch.zeros(2, 3, 2), None, None, None, torch.zeros(18), MASKED[3], [2], [4, 0], None


def residual(x=None, context=None, hidden=None, dy=None, **wrong):
    """Arguments of residual_network, or of its backward, of which some are wrong."""
    shapes = (4, 3), (4,), (4, 4), (4,), (4, 4), (4,), (2, 4), (2,)
    parameters = [torch.zeros(s) for s in wrong.get("shapes", shapes)]
    given = torch.zeros(5, 3) if x is None else x, context, parameters, wrong.get("running", [])
    form = wrong.get("blocks", 1), "relu", wrong.get("batch_norm", False), 1e-5
    if hidden is None:
        return *given, *form, True, False
    return *given, hidden, torch.zeros(0), *form, False, torch.zeros(5, 2) if dy is None else dy


def masked(z=VECTORS, form=AFFINE_MASKED, waves=None, **wrong):
    """Arguments of masked_inverse, of which some are wrong."""
    names = "weights", "added", "gates", "ends", "order", "widths", "layers"
    return z, *(wrong.get(name, value) for name, value in zip(names, MASKED, strict=True)), *form, waves


# of two such networks with a context of one feature, and their places
SEVERAL = (
    torch.zeros(2, 1),
    torch.zeros(40),
    torch.zeros(2, 28, dtype=torch.int64),
    torch.tensor([[[0, 1, 2]]] * 2),
    torch.arange(3).expand(2, -1),
    [2],
    [4, 0],
)


def several(z=VECTORS, form=AFFINE_MASKED, **wrong):
    """Arguments of masked_inverses, of which some are wrong."""
    names = "context", "parameters", "places", "ends", "order", "widths", "layers"
    return z, *(wrong.get(name, value) for name, value in zip(names, SEVERAL, strict=True)), *form


FLOATING = "expected Float or Double or BFloat16 or Half"

CUDA_ERRORS = {  # of ops with a CUDA kernel, which the emulation runs
    "triangular_solve": [
        ((VECTORS, MATRICES, False, False, False), "A: got shape [2, 3], expected [*, *, *]"),
        ((MATRICES[:, 1:], MATRICES, False, False, False), "A: got shape [2, 2, 3], expected [*, 2, 2]"),
        ((MATRICES, MATRICES[:1], False, False, False), "B: got shape [1, 3, 3], expected [2, 3, *]"),
        ((MATRICES.half(), MATRICES, False, False, False), "A: got dtype Half, expected Float or Double"),
        ((MATRICES, MATRICES.double(), False, False, False), "B: got dtype Double, expected Float"),
    ],
    "conv1x1": [
        ((COUNT, W, None), "x: got shape [2], expected at least 2 dimensions"),
        ((X.int(), W, None), f"x: got dtype Int, {FLOATING}"),
        ((torch.zeros(2, 65), W, None), "x: got 65 channels, expected 1 to 64"),
        ((torch.zeros(2, 0), W, None), "x: got 0 channels, expected 1 to 64"),
        ((X, W[:2], None), "weight: got shape [2, 3], expected [3, 3]"),
        ((X.half(), W.half(), None), "weight: got dtype Half, expected Float"),
        ((X, W, COUNT), "bias: got shape [2], expected [3]"),
    ],
    "conv1x1_backward": [
        ((X, W, X[:, :, 1:]), "dy: got shape [2, 3, 3, 4], expected [2, 3, 4, 4]"),
        ((X, W, X.double()), "dy: got dtype Double, expected Float"),
    ],
    "conv1x1_inverse_backward": [
        ((X, W, W[:2], None, X), "weight_inverse: got shape [2, 3], expected [3, 3]"),
        ((X, W, W, CHANNELS.double(), X), "bias: got dtype Double, expected Float"),
        ((X, W, W, None, EVEN), "dy: got shape [2, 4, 4, 4], expected [2, 3, 4, 4]"),
    ],
    "lu_weight": [
        ((PERM, VECTORS, MATRICES, VECTORS, VECTORS), "lower: got shape [2, 3], expected [*, *, *]"),
        (
            (PERM, MATRICES[:, 1:], MATRICES, VECTORS, VECTORS),
            "lower: got shape [2, 2, 3], expected [2, 2, 2]",
        ),
        (
            (PERM, torch.zeros(1, 65, 65), MATRICES, VECTORS, VECTORS),
            "lower: got 65 channels, expected at most 64",
        ),
        (
            (PERM, MATRICES.half(), MATRICES, VECTORS, VECTORS),
            "lower: got dtype Half, expected Float or Double",
        ),
        ((PERM, MATRICES, MATRICES[:1], VECTORS, VECTORS), "upper: got shape [1, 3, 3], expected [2, 3, 3]"),
        ((PERM, MATRICES, MATRICES, VECTORS[:, :2], VECTORS), "log_s: got shape [2, 2], expected [2, 3]"),
        ((PERM, MATRICES, MATRICES, VECTORS, VECTORS.double()), "sign_s: got dtype Double, expected Float"),
        ((PERM.int(), MATRICES, MATRICES, VECTORS, VECTORS), "perm: got dtype Int, expected Long"),
    ],
    "lu_weight_backward": [
        (
            (PERM, MATRICES, MATRICES, *[VECTORS] * 3, *[MATRICES] * 2, COUNT),
            "weight_inverse: got shape [2, 3], expected [2, 3, 3]",
        ),
        (
            (PERM, MATRICES, MATRICES, *[VECTORS] * 2, MATRICES, VECTORS, MATRICES, COUNT),
            "dweight: got shape [2, 3], expected [2, 3, 3]",
        ),
        (
            (PERM, MATRICES, MATRICES, *[VECTORS] * 2, *[MATRICES] * 2, VECTORS, COUNT),
            "dweight_inverse: got shape [2, 3], expected [2, 3, 3]",
        ),
        (
            (PERM, MATRICES, MATRICES, *[VECTORS] * 2, *[MATRICES] * 3, VECTORS),
            "dlog_det: got shape [2, 3], expected [2]",
        ),
    ],
    "masked_inverse": [
        (masked(z=COUNT), "z: got shape [2], expected [*, *]"),
        (masked(z=VECTORS.half()), "z: got dtype Half, expected Float or Double"),
        (masked(z=torch.zeros(2, 0)), "z: got 0 features of 2 parameters, expected at least 1"),
        (masked(weights=torch.zeros(17)), "weights: got shape [17], expected [18]"),
        (masked(weights=torch.zeros(18).double()), "weights: got dtype Double, expected Float"),
        (masked(added=torch.zeros(7)), "added: got shape [7], expected [8]"),
        (masked(added=torch.zeros(3, 8)), "added: got shape [3, 8], expected [2, 8]"),
        (masked(gates=torch.zeros(2, 2)), "gates: got a tensor, expected 0 for each sample"),
        (masked(layers=[6, 0]), "gates: got None, expected 2 for each sample"),
        (masked(layers=[6, 0], gates=VECTORS), "gates: got shape [2, 3], expected [2, 2]"),
        (masked(ends=torch.tensor([[0, 1]])), "ends: got shape [1, 2], expected [1, 3]"),
        (masked(order=torch.tensor([0, 1])), "order: got shape [2], expected [3]"),
        (masked(waves=VECTORS), "waves: got shape [2, 3], expected [4, 3]"),
        (masked(widths=[0]), "widths: got 0, expected positive integers"),
        (masked(layers=[4]), "layers: got 1 numbers, expected 2"),
        (masked(layers=[1, 0]), "layers: got an activation of the features"),
        (masked(layers=[8, 0]), "layers: got a sum of units that differ in number"),
        (masked(layers=[4, 8]), "layers: got a sum of units that differ in number"),
        (masked(layers=[4, 4]), "layers: got an output with gates"),
        (masked(form=SPLINE_MASKED), "weights: got shape [18], expected [36]"),
        (masked(form=(*AFFINE_MASKED[:5], 65, *AFFINE_MASKED[6:])), "bins: got 65, expected 1 to 64"),
    ],
    "masked_solve": [
        ((VECTORS, *SOLVED[:1], VECTORS, *SOLVED[2:]), "jac: got shape [2, 3], expected [*, *, *]"),
        ((COUNT, *SOLVED), "v: got shape [2], expected [*, *]"),
        ((VECTORS, COUNT, *SOLVED[1:]), "slope: got shape [2], expected [2, 3]"),
        ((VECTORS[:1], VECTORS[:1], *SOLVED[1:]), "jac: got shape [2, 3, 2], expected [1, 3, 2]"),
        ((VECTORS, *SOLVED[:2], VECTORS, *SOLVED[3:]), "dparams: got shape [2, 3], expected [2, 3, 2]"),
        ((VECTORS, *SOLVED[:3], VECTORS, *SOLVED[4:]), "inner: got shape [2, 3], expected [2, 2]"),
        ((VECTORS, *SOLVED[:4], VECTORS, *SOLVED[5:]), "outer: got shape [2, 3], expected [2, 2]"),
        ((VECTORS, *SOLVED[:9], COUNT), "of_features: got shape [2], expected [2, 3]"),
        ((VECTORS, *SOLVED[:5], COUNT, *SOLVED[6:]), "weights: got shape [2], expected [18]"),
    ],
}
CPU_ERRORS = {
    "masked_inverses": [
        (several(z=COUNT), "z: got shape [2], expected [*, *]"),
        (several(context=torch.zeros(3, 1)), "context: got shape [3, 1], expected [2, *]"),
        (several(context=torch.zeros(2, 1).double()), "context: got dtype Double, expected Float"),
        (several(context=None), "places: got shape [2, 28], expected [2, 26]"),
        (several(parameters=torch.zeros(4, 10)), "parameters: got shape [4, 10], expected [*]"),
        (several(parameters=torch.zeros(40).double()), "parameters: got dtype Double, expected Float"),
        (several(places=SEVERAL[2].int()), "places: got dtype Int, expected Long"),
        (several(places=SEVERAL[2] + 40), "places: got 40, expected -1 to 39"),
        (several(places=SEVERAL[2] - 2), "places: got -2, expected -1 to 39"),
        (several(ends=torch.tensor([[0, 1, 2]])), "ends: got shape [1, 3], expected [*, *, *]"),
        (several(ends=torch.zeros(0, 1, 3).long()), "ends: got no transformation, expected at least 1"),
        (
            several(ends=torch.tensor([[[0, 1, 2]], [[0, 1, 3]]])),
            "ends: got 3 at [0, 2], expected ascending numbers to 2",
        ),
        (several(order=torch.arange(3)), "order: got shape [3], expected [2, 3]"),
        (
            several(order=torch.tensor([[0, 1, 2], [0, 1, 3]])),
            "order: got 3 at 2, expected each of 0 to 2 once",
        ),
        (several(layers=[2, 0]), "layers: got gates, expected none"),
    ],
    "residual_network": [
        (residual(COUNT), "x: got shape [2], expected [*, *]"),
        (residual(torch.zeros(5, 3).half()), "x: got dtype Half, expected Float or Double"),
        (residual(torch.zeros(0, 3)), "x: got no samples, expected at least one"),
        (residual(torch.zeros(5, 3).double()), "parameters: got dtype Float, expected Double"),
        (residual(torch.zeros(5, 4)), "parameters: got shape [4, 3], expected [4, 4]"),
        (
            residual(context=torch.zeros(4, 2), blocks=0, shapes=[(4, 5), (4,), (2, 4), (2,)]),
            "context: got shape [4, 2], expected [5, 2]",
        ),
        (residual(blocks=2), "parameters: got 8 tensors, expected 12"),
        (residual(blocks=-1), "parameters: got 8 tensors, expected 0"),
        (residual(running=[COUNT]), "running: got 1 tensors, expected none or 0"),
        (residual(shapes=[(4,), (4,)] * 4), "parameters[0]: got shape [4], expected at least 2 dimensions"),
        (
            residual(
                shapes=[(4, 3), (4,), *[(4,), (4,), (4, 4), (4,)] * 2, (2, 4), (2,)],
                batch_norm=True,
                running=[torch.zeros(3)] * 4,
            ),
            "parameters: got shape [3], expected [4]",
        ),
    ],
    "residual_network_backward": [
        (residual(hidden=torch.zeros(3, 5, 3)), "hidden: got shape [3, 5, 3], expected [3, 5, 4]"),
        (residual(hidden=torch.zeros(0), dy=torch.zeros(5, 3)), "dy: got shape [5, 3], expected [5, 2]"),
        (residual(torch.zeros(5, 4), hidden=torch.zeros(0)), "parameters: got shape [4, 3], expected [4, 4]"),
    ],
    "masked_inverse": [
        (masked(ends=torch.tensor([[0, 1, 3]])), "ends: got 3 at [0, 2], expected ascending numbers to 2"),
        (masked(ends=torch.tensor([[1, 0, 2]])), "ends: got 0 at [0, 1], expected ascending numbers to 2"),
        (masked(ends=torch.tensor([[-1, 0, 2]])), "ends: got -1 at [0, 0], expected ascending numbers to 2"),
        (masked(ends=torch.tensor([[0, 1, 1]])), "ends: got 1 at [0, 2], expected ascending numbers to 2"),
        (masked(order=torch.tensor([0, 1, 3])), "order: got 3 at 2, expected each of 0 to 2 once"),
        (masked(order=torch.tensor([0, 1, 0])), "order: got 0 at 2, expected each of 0 to 2 once"),
    ],
    "affine_coupling": [
        ((COUNT, EVEN, None, *ADDITIVE, False), "x: got shape [2], expected at least 2 dimensions"),
        ((X, EVEN, None, *COUPLING, False), "x: got 3 channels, expected a multiple of 2"),
        ((EVEN.int(), EVEN, None, *COUPLING, False), f"x: got dtype Int, {FLOATING}"),
        ((EVEN, EVEN.int(), None, *COUPLING, False), f"h: got dtype Int, {FLOATING}"),
        ((EVEN, EVEN[:, 1:], None, *COUPLING, False), "h: got shape [2, 3, 4, 4], expected [2, 4, 4, 4]"),
        ((EVEN, EVEN[:, :, 1:], None, *ADDITIVE, False), "h: got shape [2, 4, 3, 4], expected [2, 4, 4, 4]"),
        ((EVEN, EVEN, CHANNELS, *SOFT, False), "factor: got shape [3], expected [2]"),
    ],
    "affine_coupling_backward": [
        ((EVEN, EVEN, None, X, COUNT, *COUPLING, False), "dy: got shape [2, 3, 4, 4], expected [2, 4, 4, 4]"),
        ((EVEN, EVEN, None, EVEN, VECTORS, *COUPLING, False), "dlog_det: got shape [2, 3], expected [2]"),
    ],
    "affine_coupling_inverse_backward": [
        ((X, EVEN, None, X, COUNT, *COUPLING), "y: got 3 channels, expected a multiple of 2"),
        ((EVEN, EVEN, None, X, COUNT, *COUPLING), "dy: got shape [2, 3, 4, 4], expected [2, 4, 4, 4]"),
    ],
    "actnorm": [
        ((COUNT, COUNT, COUNT, False), "x: got shape [2], expected at least 2 dimensions"),
        ((X.int(), CHANNELS, CHANNELS, False), f"x: got dtype Int, {FLOATING}"),
        ((X, COUNT, CHANNELS, False), "log_scale: got shape [2], expected [3]"),
        ((X, CHANNELS, VECTORS, True), "bias: got shape [2, 3], expected [3]"),
        ((X, CHANNELS, CHANNELS.int(), True), f"bias: got dtype Int, {FLOATING}"),
    ],
    "actnorm_backward": [
        ((X, CHANNELS, CHANNELS, EVEN, COUNT, False), "dy: got shape [2, 4, 4, 4], expected [2, 3, 4, 4]"),
        ((X, CHANNELS, CHANNELS, X, VECTORS, False), "dlog_det: got shape [2, 3], expected [2]"),
    ],
    "actnorm_inverse_backward": [
        ((X, COUNT, CHANNELS, X, COUNT), "log_scale: got shape [2], expected [3]"),
        ((X, CHANNELS, CHANNELS, EVEN, COUNT), "dy: got shape [2, 4, 4, 4], expected [2, 3, 4, 4]"),
    ],
    "actnorm_statistics": [
        ((COUNT,), "x: got shape [2], expected at least 2 dimensions"),
        ((X.int(),), f"x: got dtype Int, {FLOATING}"),
    ],
    "bias_relu": [
        ((COUNT, COUNT, None, True), "x: got shape [2], expected at least 2 dimensions"),
        ((X.int(), CHANNELS, None, True), f"x: got dtype Int, {FLOATING}"),
        ((X, COUNT, None, True), "bias: got shape [2], expected [3]"),
        ((X, CHANNELS.int(), None, True), f"bias: got dtype Int, {FLOATING}"),
        ((X, CHANNELS, COUNT, True), "log_scale: got shape [2], expected [3]"),
    ],
    "bias_relu_": [((X, COUNT, None, True), "bias: got shape [2], expected [3]")],
    "bias_relu_backward": [
        ((COUNT, COUNT, None, True), "y: got shape [2], expected at least 2 dimensions"),
        ((X, EVEN, None, True), "dy: got shape [2, 4, 4, 4], expected [2, 3, 4, 4]"),
        ((X, X.int(), None, True), f"dy: got dtype Int, {FLOATING}"),
        ((X, X, COUNT, True), "log_scale: got shape [2], expected [3]"),
    ],
    "glow_network": [
        ((X[0], *NETWORK, False), "x: got shape [3, 4, 4], expected [*, *, *, *]"),
        ((X.half(), *NETWORK, False), "x: got dtype Half, expected Float or Double"),
        (
            (X[:, :, :0], *NETWORK, False),
            "x: got shape [2, 3, 0, 4], expected at least one channel and pixel",
        ),
        ((X, NETWORK[0][:0], *NETWORK[1:], False), "w1: got no outputs, expected at least one"),
        ((EVEN, *NETWORK, False), "w1: got shape [2, 3, 3, 3], expected [2, 4, 3, 3]"),
        ((X, X[0], *NETWORK[1:], False), "w1: got shape [3, 4, 4], expected at least 4 dimensions"),
        ((X, NETWORK[0], CHANNELS, *NETWORK[2:], False), "b1: got shape [3], expected [2]"),
        ((X, *NETWORK[:2], W, *NETWORK[3:], False), "w2: got shape [3, 3], expected [2, 2]"),
        ((X, *NETWORK[:4], NETWORK[0], COUNT, False), "w3: got shape [2, 3, 3, 3], expected [2, 2, 3, 3]"),
        ((X, *NETWORK[:5], COUNT.double(), False), "b3: got dtype Double, expected Float"),
    ],
    "glow_network_backward": [
        ((X.half(), *NETWORK, False, X), "x: got dtype Half, expected Float or Double"),
        ((X, *NETWORK, False, X), "dy: got shape [2, 3, 4, 4], expected [2, 2, 4, 4]"),
    ],
    "gaussian_log_prob": [
        ((COUNT, None, None), "z: got shape [2], expected at least 2 dimensions"),
        ((X.int(), None, None), f"z: got dtype Int, {FLOATING}"),
        ((X, X[:1], None), "mean: got shape [1, 3, 4, 4], expected [2, 3, 4, 4]"),
        ((X, None, COUNT), "log_scale: got shape [2], expected [3]"),
        ((X, None, X.int()), f"log_scale: got dtype Int, {FLOATING}"),
    ],
    "gaussian_log_prob_backward": [
        ((X, X[:1], None, COUNT), "mean: got shape [1, 3, 4, 4], expected [2, 3, 4, 4]"),
        ((X, None, None, VECTORS), "dlog_prob: got shape [2, 3], expected [2]"),
    ],
    "dequantize": [
        ((X, X, None, 0, *FLAT, X.dtype), "x: got dtype Float, expected Byte"),
        (
            (PIXELS[0, 0, 0], None, SEED, 0, *FLAT, X.dtype),
            "x: got shape [4], expected at least 2 dimensions",
        ),
        ((PIXELS, None, None, 0, *FLAT, X.dtype), "noise, seed: got neither, expected one of them"),
        ((PIXELS, X, SEED, 0, *FLAT, X.dtype), "noise, seed: got both, expected one of them"),
        ((PIXELS, EVEN, None, 0, *FLAT, X.dtype), "noise: got shape [2, 4, 4, 4], expected [2, 3, 4, 4]"),
        ((PIXELS, PIXELS, None, 0, *FLAT, X.dtype), f"noise: got dtype Byte, {FLOATING}"),
        ((PIXELS, None, PERM, 0, *FLAT, X.dtype), "seed: got shape [2, 3], expected []"),
        (
            (PIXELS[:, :, 1:], None, SEED, 0, *SQUEEZED, X.dtype),
            "x: got shape [2, 3, 3, 4], expected an even height and width",
        ),
    ],
    "dequantize_backward": [
        ((X, X, X, COUNT, *FLAT), "x: got dtype Float, expected Byte"),
        ((PIXELS, EVEN, X, COUNT, *FLAT), "noise: got shape [2, 4, 4, 4], expected [2, 3, 4, 4]"),
        ((PIXELS, X, EVEN, COUNT, *FLAT), "dy: got shape [2, 4, 4, 4], expected [2, 3, 4, 4]"),
        ((PIXELS, X, X, COUNT, *SQUEEZED), "dy: got shape [2, 3, 4, 4], expected [2, 12, 2, 2]"),
        ((PIXELS, X, X, VECTORS, *FLAT), "dlog_det: got shape [2, 3], expected [2]"),
    ],
    "dequantize_inverse": [
        ((PIXELS, *FLAT), f"y: got dtype Byte, {FLOATING}"),
        ((COUNT, *FLAT), "y: got shape [2], expected at least 2 dimensions"),
        ((X, *SQUEEZED), "y: got 3 channels, expected a multiple of 4"),
    ],
    "spline": [
        ((COUNT, COUNT, None, 0, *TWO_BINS, False), "x: got shape [2], expected at least 2 dimensions"),
        ((EVEN.int(), OF_EACH, None, 0, *TWO_BINS, False), f"x: got dtype Int, {FLOATING}"),
        ((EVEN, OF_EACH.int(), None, 0, *TWO_BINS, False), f"params: got dtype Int, {FLOATING}"),
        ((EVEN, COUNT, None, 0, *TWO_BINS, False), "params: got shape [2], expected at least 2 dimensions"),
        (
            (EVEN, OF_EACH[:, 1:], None, 0, *TWO_BINS, False),
            "params: got shape [2, 19, 4, 4], expected [2, 15, 4, 4]",
        ),
        (
            (EVEN, OF_EACH[:, :, 1:], None, 0, *TWO_BINS, False),
            "params: got shape [2, 20, 3, 4], expected [2, 20, 4, 4]",
        ),
        (
            (EVEN, OF_HALF[:, 1:], torch.arange(4), 0, *TWO_BINS, False),
            "params: got shape [2, 9, 4, 4], expected [2, 5, 4, 4]",
        ),
        (
            (X, OF_EACH, torch.arange(3), 0, *TWO_BINS, False),
            "params: got 20 parameters per position of x, expected at most 15",
        ),
        ((EVEN, OF_EACH, None, 0, 0, *TWO_BINS[1:], False), "bins: got 0, expected 1 to 64"),
        (
            (EVEN, torch.zeros(2, 4 * 194, 4, 4), None, 0, 65, *TWO_BINS[1:], False),
            "bins: got 65, expected 1 to 64",
        ),
        (
            (EVEN, OF_EACH, None, 0, *TWO_BINS[:3], "freia", *TWO_BINS[4:], False),
            "convention: got freia, expected another one",
        ),
        *(
            (
                (EVEN, OF_HALF, None, first, *TWO_BINS, False),
                f"first_channel: got {first}, expected 0 to 2",
            )
            for first in (-1, 3)
        ),
        (
            (EVEN, OF_HALF, torch.arange(3), 0, *TWO_BINS, False),
            "channel_order: got shape [3], expected [4]",
        ),
        (
            (EVEN, OF_HALF, torch.arange(4).int(), 0, *TWO_BINS, False),
            "channel_order: got dtype Int, expected Long",
        ),
        *(
            (
                (EVEN, OF_HALF, torch.tensor([3, 0, wrong, 1]), 0, *TWO_BINS, False),
                f"channel_order: got {wrong} at index 2, expected a permutation of 0 to 3",
            )
            for wrong in (-1, 0, 4)
        ),
    ],
    "mixture_cdf": [
        ((COUNT, COUNT, None, 0, 1, False), "x: got shape [2], expected at least 2 dimensions"),
        ((EVEN, OF_EACH.int(), None, 0, 1, False), f"params: got dtype Int, {FLOATING}"),
        (
            (EVEN, OF_EACH[:, 1:], None, 0, 1, False),
            "params: got shape [2, 19, 4, 4], expected [2, 15, 4, 4]",
        ),
        (
            (X, OF_EACH, torch.arange(3), 0, 1, False),
            "params: got 20 parameters per position of x, expected at most 15",
        ),
        ((EVEN, OF_EACH, None, 0, 0, False), "components: got 0, expected 1 to 64"),
        ((EVEN, OF_EACH, None, 0, 65, False), "components: got 65, expected 1 to 64"),
        ((EVEN, OF_HALF, None, 3, 1, False), "first_channel: got 3, expected 0 to 2"),
        (
            (EVEN, OF_HALF, torch.tensor([3, 0, 4, 1]), 0, 1, False),
            "channel_order: got 4 at index 2, expected a permutation of 0 to 3",
        ),
    ],
    "mixture_cdf_backward": [
        ((EVEN, OF_EACH, None, 0, X, COUNT, 1, False), "dy: got shape [2, 3, 4, 4], expected [2, 4, 4, 4]"),
        ((EVEN, OF_EACH, None, 0, EVEN, VECTORS, 1, False), "dlog_det: got shape [2, 3], expected [2]"),
        ((EVEN, OF_EACH, None, 0, EVEN, COUNT, 65, False), "components: got 65, expected 1 to 64"),
    ],
    "mixture_cdf_inverse_backward": [
        ((EVEN, OF_EACH, None, 0, X, COUNT, 1), "dy: got shape [2, 3, 4, 4], expected [2, 4, 4, 4]"),
        (
            (EVEN, OF_EACH[:1], None, 0, EVEN, COUNT, 1),
            "params: got shape [1, 20, 4, 4], expected [2, 20, 4, 4]",
        ),
    ],
    "spline_backward": [
        (
            (EVEN, OF_EACH, None, 0, X, COUNT, *TWO_BINS, False),
            "dy: got shape [2, 3, 4, 4], expected [2, 4, 4, 4]",
        ),
        (
            (EVEN, OF_EACH, None, 0, EVEN, VECTORS, *TWO_BINS, False),
            "dlog_det: got shape [2, 3], expected [2]",
        ),
        (
            (EVEN, OF_HALF, torch.tensor([0, 1, 2, 2]), 0, EVEN, COUNT, *TWO_BINS, True),
            "channel_order: got 2 at index 3, expected a permutation of 0 to 3",
        ),
    ],
    "spline_inverse_backward": [
        ((EVEN, OF_EACH, None, 0, X, COUNT, *TWO_BINS), "dy: got shape [2, 3, 4, 4], expected [2, 4, 4, 4]"),
        (
            (EVEN, OF_EACH[:, :, 1:], None, 0, EVEN, COUNT, *TWO_BINS),
            "params: got shape [2, 20, 3, 4], expected [2, 20, 4, 4]",
        ),
        ((EVEN, OF_EACH, None, 0, EVEN, COUNT, 65, *TWO_BINS[1:]), "bins: got 65, expected 1 to 64"),
    ],
    "squeeze": [
        ((MATRICES, "space", False), "x: got shape [2, 3, 3], expected [*, *, *, *]"),
        ((X[:, :, 1:], "space", False), "x: got shape [2, 3, 3, 4], expected an even height and width"),
        ((X, "space", True), "x: got 3 channels, expected a multiple of 4"),
        ((X.to(torch.complex128), "space", False), "x: got elements of 16 bytes, expected at most 8"),
    ],
    "uniform_noise": [((2, 3, torch.tensor(5.0), 0, False), "seed: got dtype Float, expected Long")],
    "normal_noise": [((2, 3, PERM, 0, True), "seed: got shape [2, 3], expected []")],
}
ERRORS = [
    ("fastflow_C", op, *row) for errors in (CUDA_ERRORS, CPU_ERRORS) for op in errors for row in errors[op]
]
ERRORS += [("fastflow_emulated", op, *row) for op in CUDA_ERRORS for row in CUDA_ERRORS[op]]


@pytest.mark.parametrize(
    "namespace, op, args, message", ERRORS, ids=[f"{n}-{op}: {m}" for n, op, _, m in ERRORS]
)
def test_out_of_bounds_access_is_an_error(namespace, op, args, message):
    with pytest.raises(RuntimeError) as error:
        getattr(getattr(torch.ops, namespace), op)(*args)
    assert f"{op}: {message}" in str(error.value)


def variations(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """``t`` with other sizes, dimensions, dtypes, strides, and on another device."""
    sizes = [
        (*t.shape[:d], n, *t.shape[d + 1 :])
        for d, old in enumerate(t.shape)
        for n in (0, 1, old - 1, old + 1)
    ]
    for size in [*sizes, t.shape[1:], (1, *t.shape)]:
        yield torch.ones(size, dtype=t.dtype)
    dtypes = torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64, torch.complex64
    yield from (t.to(dtype) for dtype in dtypes)
    yield t.to("meta")
    if t.dtype == torch.int64:
        return  # a permutation with other strides is invalid
    yield t.as_strided(t.shape, [1] * t.ndim)  # overlaps itself
    yield t[:1].expand(t.shape) if t.ndim else t
    yield t.new_ones(2 * t.numel() + 3)[3::2].view(t.shape)


CASES = [
    (namespace, str(case))
    for case in spec.cases(spec.Make(), (2, 4, 4, 6))
    for namespace, device in (("fastflow_C", "cpu"), ("fastflow_emulated", "cuda"))
    if device in OPS[case.op].compiled and case.op != "uniform_noise"  # its compiled op has other arguments
]


@pytest.mark.parametrize("namespace, name", CASES)
def test_every_argument_is_guarded(namespace, name):
    """Any argument that the op was not written for is an error, or the op computes what the reference does."""
    case = next(case for case in spec.cases(spec.Make(), (2, 4, 4, 6)) if str(case) == name)
    compiled = getattr(getattr(torch.ops, namespace), case.op).default
    op, reference = functional(compiled), functional(compiled, OPS[case.op].fallback)
    guarded = 0
    for i, argument in enumerate(case.args):
        varied = isinstance(argument, torch.Tensor) and argument.numel()
        for other in variations(argument) if varied else ():
            args = (*case.args[:i], other, *case.args[i + 1 :])
            try:
                found = op(*args)
            except RuntimeError:
                guarded += 1
                continue
            torch.testing.assert_close(found, reference(*args), rtol=1e-3, atol=1e-3, equal_nan=True)
    assert guarded


def test_every_compiled_op_has_a_guard():
    compiled = {name: op.compiled for name, op in OPS.items() if op.compiled}
    assert compiled.keys() <= {*CUDA_ERRORS, *CPU_ERRORS}
    assert {name for name, devices in compiled.items() if "cuda" in devices} == CUDA_ERRORS.keys()


@pytest.mark.parametrize("wrong", [-1, 3, "twice"])
def test_an_invalid_perm_is_an_error(wrong):
    perm, *rest = lu_inputs(2, 3)
    perm[1, 2] = perm[1, 0] if wrong == "twice" else wrong
    with pytest.raises(
        ValueError,
        match=rf"lu_weight: perm of matrix 1: got {perm[1, 2]} at index 2, expected each of 0 to 2 once",
    ):
        ops.lu_weight(perm, *rest)
    backward = (perm, *rest, rest[0], rest[0], rest[0], rest[2][:, 0])
    with pytest.raises(RuntimeError, match="lu_weight_backward: perm of matrix 1: got"):
        C.lu_weight_backward(*backward)
    torch.ops.fastflow_emulated.lu_weight_backward(*backward)  # reads row 0 instead, within bounds
    with fastflow.backend("emulated"):
        ops.lu_weight(perm, *rest)
        with pytest.raises(
            ValueError,
            match=r"lu_weight \(an earlier call\): perm of matrix 1: got a number out of range or repeated at index [02]",
        ):
            ops.raise_singular()


@pytest.mark.skipif(
    not extension.cuda, reason="the CUDA extension was not built here: no nvcc, or no CUDA build of torch"
)
@pytest.mark.parametrize(
    "capability, runs", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_a_gpu_without_compiled_code_runs_pytorch(capability, runs, monkeypatch):
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

    def rectified(x, dy):
        """bias_relu and its gradients."""
        s = dy[0].float()
        y = C.bias_relu(x, s, s, True)
        return y, *C.bias_relu_backward(y, dy, s, True)

    splines, order = torch.randn(9000, 3 * 8), torch.tensor([4, 1, 5, 0, 3, 2])
    of_images = torch.randn(64, 12 * 8, 16, 16)

    def splined(x, dy, dlog_det, params, order):
        """Splines of three bins, both directions, and their gradients."""
        form = (3, *TWO_BINS[1:])
        y, log_det = C.spline(x, params, order, 0, *form, False)
        return (
            y,
            log_det,
            *C.spline(y, params, order, 0, *form, True),
            *C.spline_backward(x, params, order, 0, dy, dlog_det, *form, True),
            *C.spline_inverse_backward(y, params, order, 0, dy, dlog_det, *form),
        )

    def mixed(x, dy, dlog_det, params, order):
        """Mixtures of two components, both directions, and their gradients."""
        y, log_det = C.mixture_cdf(x, params, order, 0, 2, False)
        return (
            y,
            log_det,
            *C.mixture_cdf(y, params, order, 0, 2, True),
            *C.mixture_cdf_backward(x, params, order, 0, dy, dlog_det, 2, True),
            *C.mixture_cdf_inverse_backward(y, params, order, 0, dy, dlog_det, 2),
        )

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

    network = {
        str(case): case.args
        for case in spec.cases(spec.Make(), (1500, 30, 1, 1), "residual_network")
        if "batch norm" in str(case)
    }
    residual_case = [
        network[f"{op} gated, batch norm"] for op in ("residual_network", "residual_network_backward")
    ]
    masked_case = {case.op: case for case in spec.cases(spec.Make(), (900, 30, 1, 1), "masked_inverse")}

    return {
        "residual_network": lambda: C.residual_network(*residual_case[0]),
        "residual_network_backward": lambda: C.residual_network_backward(*residual_case[1]),
        "masked_inverse": lambda: C.masked_inverse(*masked_case["masked_inverse"].args),
        "masked_inverses": lambda: C.masked_inverses(*masked_case["masked_inverses"].args),
        "masked_solve": lambda: (C.masked_solve(*masked_case["masked_solve"].args),),
        "dequantize of vectors": lambda: dequantized(vectors[0].sigmoid(), vectors[1]),
        "actnorm of vectors": lambda: normalized(vectors[0], vectors[3], vectors[4]),
        "bias_relu of vectors": lambda: rectified(vectors[0], vectors[1]),
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
        "spline of vectors": lambda: splined(vectors[0], vectors[3], vectors[4], splines, order),
        "mixture_cdf of vectors": lambda: mixed(vectors[0], vectors[3], vectors[4], splines, order),
        "mixture_cdf of images": lambda: mixed(x, dy, x[:, 0, 0, 0], of_images, None),
        "spline of images": lambda: splined(x, dy, x[:, 0, 0, 0], of_images, None),
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
