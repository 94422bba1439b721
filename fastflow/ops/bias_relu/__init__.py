from fastflow.ops.bias_relu.op import bias_relu

__all__ = ["bias_relu"]
