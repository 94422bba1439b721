from fastflow.ops.mixture_cdf.op import (
    mixture_cdf,
    mixture_cdf_inverse_backward,
    mixture_cdf_parameters,
)

__all__ = [
    "mixture_cdf",
    "mixture_cdf_inverse_backward",
    "mixture_cdf_parameters",
]
