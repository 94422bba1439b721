from fastflow.ops.residual_network.op import residual_network

__all__ = ["residual_network"]
