"""Small flows of every kind, their networks and batches: the cases of the tests that hold for any flow."""

from functools import partial

import torch
from torch import Tensor, nn

from fastflow.models.glow import GlowLevel, GlowStep
from fastflow.nn import (
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    BatchNorm,
    CircularShift,
    Coupling,
    ElementwiseSpline,
    EmergingConv,
    EncoderDecoder,
    Exp,
    Flatten,
    Flow,
    FromEncoderDecoder,
    FromReverse,
    GlowNetwork,
    IdentityDequantize,
    Inverse,
    InvertibleConv1x1,
    LeakyReLU,
    LipschitzConvNet,
    LipschitzMLP,
    Log,
    Logit,
    LULinear,
    MaskedAutoregressive,
    MaskedNetwork,
    MixtureCDFCoupling,
    OrthogonalLinear,
    PeriodicConv,
    Permute,
    PiecewiseLinear,
    PiecewiseQuadratic,
    Planar,
    QRLinear,
    Radial,
    Residual,
    Scale,
    Sequential,
    Sigmoid,
    SoftClip,
    Softplus,
    SplineCoupling,
    Squeeze,
    Standardize,
    Sylvester,
    Tanh,
    TriangularLinear,
    WithReverse,
)
from fastflow.ops.affine_coupling import SCALES
from tests.support.cases import randomize

VECTOR, IMAGE, SEQUENCE = (4,), (4, 2, 4), (4, 3)


def batch(shape: tuple[int, ...], n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *shape, dtype=dtype)


def conv(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, c_out, 1))


def mlp(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c_in, 5), nn.Tanh(), nn.Linear(5, c_out))


class WithContext(nn.Module):
    """A network of x and of one vector of three numbers per sample."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.net = mlp(c_in + 3, c_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([x, context], dim=1))


class Asinh(nn.Module):
    """Scales and shifts on the scale of asinh, with a learned factor of the shift; h ``[N, 2C, ...]``."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = h.chunk(2, dim=1)
        return self._mapped(x, log_scale.exp(), self.factor * shift, log_scale)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = h.chunk(2, dim=1)
        scale = (-log_scale).exp()
        return self._mapped(y, scale, -self.factor * shift * scale, -log_scale)

    def _mapped(self, x: Tensor, scale: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sinh(scale * torch.asinh(x) + shift)
        return y, (log_scale + 0.5 * (torch.log1p(y * y) - torch.log1p(x * x))).flatten(1).sum(1)


def batch_norm() -> BatchNorm:
    """A layer in eval mode that has seen two batches; test_batch_norm.py has training mode."""
    layer = BatchNorm(4)
    for seed in (1, 2):
        layer(3 + 2 * torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))
    return layer.eval()


def standardize() -> Standardize:
    """A layer with the statistics of some data."""
    layer = Standardize(4)
    layer.mean.copy_(torch.tensor([3.0, -1.0, 0.0, 2.0]))
    layer.scale.copy_(torch.tensor([2.0, 0.5, 1.0, 4.0]))
    return layer


def to_signs() -> Standardize:
    """(0, 1) to (-1, 1)."""
    layer = Standardize(4)
    layer.mean.fill_(0.5)
    layer.scale.fill_(0.5)
    return layer


def spline_coupling(net, c_in: int = 2, transformed: int | None = None, **options) -> SplineCoupling:
    """A coupling whose network has ``c_in`` channels, and parameters of as many or of ``transformed``."""
    form = {k: options[k] for k in ("bins", "tails", "convention") if k in options}
    each = SplineCoupling.params_per_element(**form)
    return SplineCoupling(net(c_in, each * (transformed or c_in)), **options)


def mixture_coupling(
    net, c_in: int = 2, transformed: int | None = None, components: int = 3, **options
) -> MixtureCDFCoupling:
    each = MixtureCDFCoupling.params_per_element(components)
    return MixtureCDFCoupling(net(c_in, each * (transformed or c_in)), components=components, **options)


def affine(net, c_in: int = 2, **options) -> AffineCoupling:
    return AffineCoupling(net(c_in, 2 * c_in), **options)


def additive(net, c_in: int = 2, **options) -> AdditiveCoupling:
    return AdditiveCoupling(net(c_in, c_in), **options)


def autoregressive(
    transformer: str = "affine", hidden: tuple[int, ...] = (6, 5), form=None, **options
) -> Flow:
    form = form or {}
    each = MaskedAutoregressive.params_per_feature(transformer, **form)
    return MaskedAutoregressive(MaskedNetwork(4, each, hidden, **options), transformer, **form)


ANY_SHAPE = {
    "ActNorm": lambda: ActNorm(4),
    "LU": lambda: InvertibleConv1x1(4),
    "plain": lambda: InvertibleConv1x1(4, lu=False),
    "reverse": lambda: Permute(4),
    "shuffle": lambda: Permute(4, order="random"),
    "interleaved": lambda: Permute(4, order="interleaved"),
    "a permutation": lambda: Permute(4, order=[2, 0, 3, 1]),
    "Scale": lambda: Scale(4),
    "TriangularLinear": lambda: TriangularLinear(4),
    "TriangularLinear, upper": lambda: TriangularLinear(4, upper=True),
    "OrthogonalLinear": lambda: OrthogonalLinear(4),
    "OrthogonalLinear, two reflections": lambda: OrthogonalLinear(4, reflections=2),
    "OrthogonalLinear, cayley": lambda: OrthogonalLinear(4, "cayley"),
    "OrthogonalLinear, exponential": lambda: OrthogonalLinear(4, "exponential"),
    "QRLinear": lambda: QRLinear(4),
    "Affine": lambda: Affine(4),
    "FromReverse": lambda: FromReverse(WithReverse(InvertibleConv1x1(4))),
    "FromEncoderDecoder": lambda: FromEncoderDecoder(EncoderDecoder(Scale(4))),
    "Inverse": lambda: Inverse(Sequential(InvertibleConv1x1(4), Scale(4))),
    "BatchNorm": batch_norm,
    "Standardize": standardize,
    "IdentityDequantize": lambda: IdentityDequantize(),
}
OF_VECTORS = {
    **{scale: partial(affine, mlp, scale=scale) for scale in SCALES if scale != "none"},
    "checkerboard": partial(affine, mlp, 4, mask="checkerboard", params_layout="scale_shift"),
    "additive": partial(additive, mlp, swap_halves=True),
    "mask of channels": lambda: AffineCoupling(
        mlp(2, 4), mask=torch.tensor([True, False, False, True], device="cpu")
    ),
    "Coupling": lambda: Coupling(mlp(1, 6), Asinh(), split=1),
    "PiecewiseLinear": lambda: Coupling(mlp(2, 6), PiecewiseLinear(3, bound=2.0)),
    "PiecewiseQuadratic": lambda: Coupling(mlp(2, 10), PiecewiseQuadratic(3, bound=2.0)),
    "SplineCoupling": partial(spline_coupling, mlp, bins=3),
    "SplineCoupling, mask of channels": lambda: spline_coupling(
        mlp, bins=2, mask=torch.tensor([True, False, False, True], device="cpu"), tails="circular"
    ),
    "SplineCoupling, checkerboard": partial(spline_coupling, mlp, 4, mask="checkerboard", convention="zuko"),
    "MixtureCDFCoupling": partial(mixture_coupling, mlp),
    "MixtureCDFCoupling, mask of channels": lambda: mixture_coupling(
        mlp, mask=torch.tensor([True, False, False, True], device="cpu"), components=1
    ),
    "MixtureCDFCoupling, checkerboard": partial(mixture_coupling, mlp, 4, mask="checkerboard"),
    "ElementwiseSpline": lambda: ElementwiseSpline(4, first_channel=1, channels=2, bins=3),
    "LULinear": lambda: LULinear(4, identity_init=False),
    "Planar": lambda: Planar(4),
    "Planar, leaky ReLU": lambda: Planar(4, "leaky_relu"),
    "Radial": lambda: Radial(4),
    "Sylvester": lambda: Sylvester(4),
    "Sylvester, two hidden units": lambda: Sylvester(4, 2, kind="exponential"),
    "MaskedAutoregressive": partial(autoregressive, activation="tanh"),
    "MaskedAutoregressive, spline": partial(
        autoregressive, "spline", (6, 3), {"bins": 3}, residual=True, order="random", activation="silu"
    ),
    "MaskedAutoregressive, in passes": lambda: MaskedAutoregressive(
        nn.Sequential(MaskedNetwork(4, 3, (6,), activation="elu")), PiecewiseLinear(3, bound=2.0)
    ),
    "Inverse of MaskedAutoregressive": lambda: Inverse(autoregressive(activation="tanh", order="reverse")),
    "Residual": lambda: Residual(LipschitzMLP(4, (6, 5))),
    "Residual, ELU": lambda: Residual(LipschitzMLP(4, (6,), activation="elu"), log_det="exact"),
    # with the numbers as domain and as range
    "LeakyReLU": LeakyReLU,
    "Sigmoid": lambda: Sequential(Sigmoid(), to_signs(), Inverse(SoftClip(1.0))),
    "Logit": lambda: Sequential(SoftClip(1.0), Inverse(to_signs()), Logit()),
    "Tanh": lambda: Sequential(Tanh(), Inverse(SoftClip(1.0))),
    "Softplus": lambda: Sequential(Softplus(), Log()),
    "Exp": lambda: Sequential(Exp(), Inverse(Softplus())),
    "CircularShift": lambda: CircularShift(10.0, 3.0),
    "Inverse of a coupling": lambda: Inverse(affine(mlp)),
}
OF_IMAGES = {
    **{scale: partial(affine, conv, scale=scale, swap_halves=True) for scale in SCALES if scale != "none"},
    "checkerboard": partial(
        affine, conv, 4, mask="checkerboard", affine_order="shift_first", num_scale_factors=4
    ),
    "checkerboard, flipped": partial(affine, conv, 4, mask="checkerboard", swap_halves=True, scale="tanh"),
    "factor for each channel": partial(affine, conv, num_scale_factors=2),
    "additive": partial(additive, conv),
    "unequal parts": lambda: AffineCoupling(conv(1, 6), split=0.25, swap_halves=True),
    "mask of positions": lambda: AffineCoupling(
        conv(4, 8), mask=torch.arange(32, device="cpu").view(IMAGE) % 3 == 0
    ),
    "Coupling": lambda: Coupling(conv(2, 4), Asinh()),
    "SplineCoupling": partial(spline_coupling, conv, swap_halves=True, convention="nflows"),
    "SplineCoupling, no tails": partial(spline_coupling, conv, 1, 3, split=1, tails="none", bins=2),
    "MixtureCDFCoupling": partial(mixture_coupling, conv, swap_halves=True),
    "MixtureCDFCoupling, split": partial(mixture_coupling, conv, 1, 3, split=1, components=2),
    "ElementwiseSpline": lambda: ElementwiseSpline(IMAGE, bins=2, tails="circular"),
    "PeriodicConv": lambda: PeriodicConv(4),
    "EmergingConv": lambda: EmergingConv(4),
    "EmergingConv, five": lambda: EmergingConv(4, kernel_size=5),
    "additive checkerboard": partial(additive, conv, 4, mask="checkerboard"),
    "Glow's network": partial(affine, partial(GlowNetwork, hidden=6), scale="sigmoid"),
    "Flatten": lambda: Flatten(IMAGE),
    **{f"squeeze {order}": partial(Squeeze, order) for order in ("channel", "space", "realnvp")},
    "Residual": lambda: Residual(LipschitzConvNet(4, IMAGE[1:], 5), log_det="exact"),
    "LeakyReLU, learned": lambda: LeakyReLU(0.5, learned=True),
    "CircularShift": lambda: CircularShift(10.0),
    "Inverse of a squeeze": lambda: Inverse(Squeeze()),
    "Sequential": lambda: Sequential(
        ActNorm(4), InvertibleConv1x1(4), AffineCoupling(conv(2, 4)), Squeeze(), Permute(16)
    ),
    **{f"GlowStep, {v}": partial(GlowStep, 4, 6, conv1x1=v) for v in ("lu", "plain", "reverse", "shuffle")},
    "GlowStep, additive": lambda: GlowStep(4, 6, coupling="additive"),
    "GlowStep, mixture": lambda: GlowStep(4, 6, coupling="mixture", components=3),
    "GlowStep, spline": lambda: GlowStep(4, 6, coupling="spline"),
    "GlowLevel": lambda: GlowLevel([GlowStep(16, 6) for _ in range(2)]),
}
# name: (a function that makes the flow, the shape of a sample)
FLOWS = {
    f"{name} of {kind}": (make, shape)
    for kind, shape, flows in (
        ("vectors", VECTOR, ANY_SHAPE | OF_VECTORS),
        ("images", IMAGE, ANY_SHAPE | OF_IMAGES),
        ("sequences", SEQUENCE, ANY_SHAPE),
    )
    for name, make in flows.items()
}


def trained(make) -> nn.Module:
    """``make()`` as after some training: no parameter at its first value, ActNorm initialized, eval mode."""
    module = randomize(make(), std=0.1).double()
    for layer in module.modules():
        if isinstance(layer, ActNorm):
            layer.initialized.fill_(True)
            assert layer._initialized
        if hasattr(layer, "update_norm"):
            layer.update_norm(1e-8)
    return module.eval()
