from fastflow.ops.affine_coupling.op import (
    H_ORDERS,
    MASKS,
    ORDERS,
    SCALES,
    WITH_FACTOR,
    affine_coupling,
    affine_coupling_inverse_backward,
)

__all__ = [
    "H_ORDERS",
    "MASKS",
    "ORDERS",
    "SCALES",
    "WITH_FACTOR",
    "affine_coupling",
    "affine_coupling_inverse_backward",
]
