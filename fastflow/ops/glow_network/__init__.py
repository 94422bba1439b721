from fastflow.ops.glow_network.op import glow_network

__all__ = ["glow_network"]
