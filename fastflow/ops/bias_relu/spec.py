"""Cases of bias_relu's ops."""

from collections.abc import Iterator

from fastflow.ops.spec import Case, Make


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    bias = make.per_channel(shape[1])
    scale = make.per_channel(shape[1])
    for variant, *options in (("", None, True), ("scaled", scale, True), ("scaled, linear", scale, False)):
        yield Case("bias_relu", variant, (make(*shape), bias, *options), 8)
        yield Case("bias_relu_", variant, (make(*shape), bias, *options), 8)
        y = make(*shape).relu_() if options[1] else make(*shape)
        yield Case("bias_relu_backward", variant, (y, make(*shape), *options), 12, launches=2)
