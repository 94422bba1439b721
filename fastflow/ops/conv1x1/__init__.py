from fastflow.ops.conv1x1.op import MAX_COMPILED, conv1x1, conv1x1_inverse_backward

__all__ = ["MAX_COMPILED", "conv1x1", "conv1x1_inverse_backward"]
