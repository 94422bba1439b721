from fastflow.ops.dequantize.op import dequantize, dequantize_inverse

__all__ = ["dequantize", "dequantize_inverse"]
