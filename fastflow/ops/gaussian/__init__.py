from fastflow.ops.gaussian.op import gaussian_log_prob, gaussian_sample

__all__ = ["gaussian_log_prob", "gaussian_sample"]
