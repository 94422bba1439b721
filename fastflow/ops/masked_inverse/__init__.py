from fastflow.ops.masked_inverse.op import masked_inverse, masked_inverses, masked_solve
from fastflow.ops.masked_inverse.reference import AFTER, BEFORE, GATE, SKIP, Affine, Spline

__all__ = [
    "AFTER",
    "BEFORE",
    "GATE",
    "SKIP",
    "Affine",
    "Spline",
    "masked_inverse",
    "masked_inverses",
    "masked_solve",
]
