from fastflow.ops.noise.op import as_seed, drawn_normal, drawn_uniform, random_seed, uniform_noise

__all__ = ["as_seed", "drawn_normal", "drawn_uniform", "random_seed", "uniform_noise"]
