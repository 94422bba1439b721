from fastflow.ops.lu_weight.op import MAX_COMPILED, lu_weight

__all__ = ["MAX_COMPILED", "lu_weight"]
