"""Cases of ActNorm's ops."""

from collections.abc import Iterator

from fastflow.ops.spec import Case, Make


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    x, log_scale, bias = make(*shape), make.per_channel(shape[1]), make.per_channel(shape[1])
    gradients = make(*shape), make.per_sample(shape[0])
    yield Case("actnorm", "forward", (x, log_scale, bias, False), 8)
    yield Case("actnorm", "inverse", (x, log_scale, bias, True), 8)
    yield Case("actnorm_backward", "forward", (x, log_scale, bias, *gradients, False), 12, launches=2)
    yield Case("actnorm_backward", "inverse", (x, log_scale, bias, *gradients, True), 12, launches=2)
    yield Case("actnorm_inverse_backward", "", (x, log_scale, bias, *gradients), 16, launches=2)
    # each program writes three numbers per channel, which are read twice
    yield Case("actnorm_statistics", "", (x,), 4, launches=2, tolerance=1.07)
