"""Cases of squeeze."""

from collections.abc import Iterator

from fastflow.ops.spec import Case, Make
from fastflow.ops.squeeze.op import ORDERS

LIMITS = {("squeeze", device): "for every dtype but complex128; else PyTorch" for device in ("cuda", "cpu")}


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    x = make(*shape)
    for order in ORDERS:
        yield Case("squeeze", order, (x, order, False), 2 * x.element_size())
        yield Case("squeeze", f"{order} inverse", (x, order, True), 2 * x.element_size())
