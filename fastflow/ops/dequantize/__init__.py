from fastflow.ops.dequantize.op import MAP, dequantize, dequantize_inverse

__all__ = ["MAP", "dequantize", "dequantize_inverse"]
