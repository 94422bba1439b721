"""Every op in plain PyTorch, under one name: what a device without a kernel runs, and the oracle of the tests.

An op's reference is ``fastflow/ops/NAME/reference.py``. Functions bear their op's name and take its arguments in the schema's order;
formulas and vector-Jacobian products are derived in docs/maths.md. Everything computes in the accumulation dtype and returns the
dtype and the dense layout of its input. Arguments are checked by the functions of :mod:`fastflow.ops`, not here.
"""

from fastflow.ops.actnorm.reference import (
    actnorm,
    actnorm_backward,
    actnorm_inverse_backward,
    actnorm_statistics,
)
from fastflow.ops.affine_coupling.reference import (
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_inverse_backward,
    checkerboard_transformed,
    join_h,
    log_scale_of,
    log_scale_vjp,
    split_h,
)
from fastflow.ops.conv1x1.reference import conv1x1, conv1x1_backward, conv1x1_inverse_backward
from fastflow.ops.dequantize.reference import dequantize, dequantize_backward, dequantize_inverse
from fastflow.ops.gaussian.reference import (
    LOG_2PI,
    gaussian_log_prob,
    gaussian_log_prob_backward,
    gaussian_sample,
    gaussian_terms,
)
from fastflow.ops.layout import (
    acc_dtype,
    channel_sum,
    channel_view,
    dense_like,
    memory_format,
    positions,
    sample_view,
)
from fastflow.ops.lu_weight.reference import lu_weight, lu_weight_backward
from fastflow.ops.noise.reference import LOW32, normal_noise, philox, uniform_noise
from fastflow.ops.squeeze.reference import REALNVP_PIXELS, squeeze
from fastflow.ops.triangular_solve.reference import Solve, triangular_solve, triangular_solve_backward

__all__ = [
    "LOG_2PI",
    "LOW32",
    "REALNVP_PIXELS",
    "Solve",
    "acc_dtype",
    "actnorm",
    "actnorm_backward",
    "actnorm_inverse_backward",
    "actnorm_statistics",
    "affine_coupling",
    "affine_coupling_backward",
    "affine_coupling_inverse_backward",
    "channel_sum",
    "channel_view",
    "checkerboard_transformed",
    "conv1x1",
    "conv1x1_backward",
    "conv1x1_inverse_backward",
    "dense_like",
    "dequantize",
    "dequantize_backward",
    "dequantize_inverse",
    "gaussian_log_prob",
    "gaussian_log_prob_backward",
    "gaussian_sample",
    "gaussian_terms",
    "join_h",
    "log_scale_of",
    "log_scale_vjp",
    "lu_weight",
    "lu_weight_backward",
    "memory_format",
    "normal_noise",
    "philox",
    "positions",
    "sample_view",
    "split_h",
    "squeeze",
    "triangular_solve",
    "triangular_solve_backward",
    "uniform_noise",
]
