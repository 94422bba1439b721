from fastflow.ops.noise.op import as_seed, normal_noise, random_seed, uniform_noise

__all__ = ["as_seed", "normal_noise", "random_seed", "uniform_noise"]
