"""Public functions of the ops.

They call ``torch.ops.fastflow.*``, which check their arguments, are differentiable, and are traced by
torch.compile as one node.
"""

from fastflow.deprecation import renamed_arguments, renamed_function
from fastflow.ops.actnorm import actnorm, actnorm_inverse_backward, actnorm_statistics
from fastflow.ops.affine_coupling import op as _affine_coupling
from fastflow.ops.affine_coupling.reference import checkerboard_transformed
from fastflow.ops.bias_relu import bias_relu
from fastflow.ops.conv1x1 import conv1x1, conv1x1_inverse_backward
from fastflow.ops.dequantize import dequantize, dequantize_inverse
from fastflow.ops.dispatch import backend
from fastflow.ops.gaussian import gaussian_log_prob, gaussian_sample
from fastflow.ops.glow_network import glow_network
from fastflow.ops.layout import acc_dtype, positions
from fastflow.ops.lu_weight import lu_weight
from fastflow.ops.masked_inverse import masked_inverse, masked_inverses, masked_solve
from fastflow.ops.mixture_cdf import mixture_cdf, mixture_cdf_inverse_backward
from fastflow.ops.noise import uniform_noise
from fastflow.ops.residual_network import residual_network
from fastflow.ops.spline import spline, spline_inverse_backward
from fastflow.ops.squeeze import squeeze2d, unsqueeze2d
from fastflow.ops.triangular_solve import raise_singular, triangular_solve
from fastflow.validation import SingularError

# here and not in op.py, so that layers do not pay for it
_with_former_names = renamed_arguments(
    h="params", flip="swap_halves", order="affine_order", h_order="params_layout"
)
affine_coupling = _with_former_names(_affine_coupling.affine_coupling)
affine_coupling_inverse_backward = _with_former_names(_affine_coupling.affine_coupling_inverse_backward)

squeeze = renamed_function("fastflow.ops.squeeze", squeeze2d)
unsqueeze = renamed_function("fastflow.ops.unsqueeze", unsqueeze2d)

__all__ = [
    "SingularError",
    "acc_dtype",
    "actnorm",
    "actnorm_inverse_backward",
    "actnorm_statistics",
    "affine_coupling",
    "affine_coupling_inverse_backward",
    "backend",
    "bias_relu",
    "checkerboard_transformed",
    "conv1x1",
    "conv1x1_inverse_backward",
    "dequantize",
    "dequantize_inverse",
    "gaussian_log_prob",
    "gaussian_sample",
    "glow_network",
    "lu_weight",
    "masked_inverse",
    "masked_inverses",
    "masked_solve",
    "mixture_cdf",
    "mixture_cdf_inverse_backward",
    "positions",
    "raise_singular",
    "residual_network",
    "spline",
    "spline_inverse_backward",
    "squeeze2d",
    "triangular_solve",
    "uniform_noise",
    "unsqueeze2d",
]
