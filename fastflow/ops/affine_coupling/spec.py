"""Cases of the affine coupling's ops."""

from collections.abc import Iterator

from fastflow.ops.affine_coupling.op import WITH_FACTOR
from fastflow.ops.spec import Case, Make

LIMITS = {
    (op, "cuda"): "for at most 3 spatial dimensions with a checkerboard"
    for op in ("affine_coupling", "affine_coupling_backward", "affine_coupling_inverse_backward")
}
# mask, swap_halves, scale, affine_order, params_layout; bytes of forward, backward, inverse + backward
VARIANTS = (
    ("halves", False, "sigmoid", "scale_first", "shift_scale", 12, 18, 24),
    ("halves", True, "soft_clamp", "shift_first", "scale_shift", 12, 18, 24),
    ("halves", False, "exp", "scale_first", "interleaved", 12, 18, 24),
    ("halves", False, "none", "scale_first", "shift_scale", 10, 10, 20),
    ("checkerboard", False, "soft_clamp", "scale_first", "shift_scale", 16, 28, 32),
    ("checkerboard", True, "tanh", "shift_first", "interleaved", 16, 28, 32),
    ("checkerboard", False, "none", "scale_first", "shift_scale", 10, 12, None),
)


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    n, c, *size = shape
    for *variant, forward, backward, inverse_backward in VARIANTS:
        mask, swap_halves, scale, *_ = variant
        transformed = c // (2 if mask == "halves" else 1)
        x, h = make(*shape), make(n, transformed * (1 if scale == "none" else 2), *size)
        factor = make.per_channel(transformed).abs() + 0.5 if scale in WITH_FACTOR else None
        given = x, h, factor, make(*shape), make.per_sample(n)
        # the gradient of a factor is a sum over programs; so is the log-det of a checkerboard with a factor
        launches = 2 if factor is not None else 1
        name = f"{mask} {scale}{' flipped' if swap_halves else ''}"
        count = None if (mask, scale) == ("checkerboard", "none") else forward
        yield Case("affine_coupling", name, (*given[:3], *variant, False), count)
        yield Case("affine_coupling", f"{name} inverse", (*given[:3], *variant, True), count)
        yield Case("affine_coupling_backward", name, (*given, *variant, False), backward, launches)
        yield Case("affine_coupling_inverse_backward", name, (*given, *variant), inverse_backward, launches)
