"""Cases of bias_relu's ops."""

from collections.abc import Iterator

from fastflow.ops.spec import Case, Make


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    bias = make.per_channel(shape[1])
    yield Case("bias_relu", "", (make(*shape), bias), 8)
    yield Case("bias_relu_", "", (make(*shape), bias), 8)
    y = make(*shape).relu_()
    yield Case("bias_relu_backward", "", (y, make(*shape)), 12, launches=2)
