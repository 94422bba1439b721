from fastflow.ops.affine_coupling.op import (
    AFFINE_ORDERS,
    MASKS,
    PARAMS_LAYOUTS,
    SCALES,
    WITH_FACTOR,
    affine_coupling,
    affine_coupling_inverse_backward,
)

__all__ = [
    "AFFINE_ORDERS",
    "MASKS",
    "PARAMS_LAYOUTS",
    "SCALES",
    "WITH_FACTOR",
    "affine_coupling",
    "affine_coupling_inverse_backward",
]
