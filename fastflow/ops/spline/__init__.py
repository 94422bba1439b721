from fastflow.ops.spline.op import (
    CONVENTIONS,
    TAILS,
    check_form,
    parameters_per_element,
    spline,
    spline_inverse_backward,
)

__all__ = [
    "CONVENTIONS",
    "TAILS",
    "check_form",
    "parameters_per_element",
    "spline",
    "spline_inverse_backward",
]
