from fastflow.ops.triangular_solve.op import raise_singular, triangular_solve

__all__ = ["raise_singular", "triangular_solve"]
