"""Cases of the Gaussian's ops."""

from collections.abc import Iterator

import torch

from fastflow.ops.spec import Case, Make

LIMITS = {("gaussian_sample", "cpu"): "with noise from C++"}


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    z, dlog_prob, seed = make(*shape), make.per_sample(shape[0]), torch.tensor(5)
    terms = {
        "standard": (None, None),
        "channels": (make.per_channel(shape[1]), make.per_channel(shape[1])),
        "full": (make(*shape), make(*shape)),
    }
    read, written = {"standard": 4, "channels": 4, "full": 12}, {"standard": 8, "channels": 8, "full": 24}
    for name, given in terms.items():
        yield Case("gaussian_log_prob", name, (z, *given), read[name])
        launches = 2 if name == "channels" else 1
        yield Case("gaussian_log_prob_backward", name, (z, *given, dlog_prob), written[name], launches)
        count = None if name == "channels" else read[name]
        yield Case("gaussian_sample", name, (list(shape), *given, 0.7, seed, 2**40, make.dtype), count)
