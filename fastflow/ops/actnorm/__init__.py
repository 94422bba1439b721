from fastflow.ops.actnorm.op import actnorm, actnorm_inverse_backward, actnorm_statistics

__all__ = ["actnorm", "actnorm_inverse_backward", "actnorm_statistics"]
