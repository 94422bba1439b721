"""fastflow::masked_inverse, masked_inverses and masked_solve: against D passes through an ordinary masked network."""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from fastflow import ops
from fastflow.ops.masked_inverse import AFTER, BEFORE, GATE, SKIP, Affine, Spline
from tests.support.cases import EXTENSION, STATIC, TRACED, leaf

pytestmark = [pytest.mark.usefixtures("each_backend"), pytest.mark.bodies(*EXTENSION)]

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "silu": F.silu, "elu": F.elu}
PLAIN = (AFTER, AFTER, 0)
RESIDUAL = (0, BEFORE, BEFORE | SKIP, BEFORE)
GLU = (0, BEFORE, BEFORE | GATE | SKIP, BEFORE, BEFORE | GATE | SKIP, BEFORE)
ZUKO = Affine("soft_clip", params_layout="shift_scale", factor=-math.log(1e-3))
AFFINES = {
    "exp": Affine(),
    "sigmoid": Affine("sigmoid", offset=1e-3),
    "softplus": Affine("softplus", "shift_first", offset=1e-3),
    "soft_clamp": Affine("soft_clamp", factor=2.0),
    "tanh": Affine("tanh", "shift_first", "shift_scale", factor=0.7),
    "soft_clip": ZUKO,
    "glow": Affine("sigmoid"),
}
SPLINES = {
    f"{convention} {tails}": Spline(4, 3.0, tails, convention, 0.8)
    for convention in ("fastflow", "nflows", "zuko")
    for tails in ("linear", "circular", "none", "zero")
} | {
    "freia linear": Spline(4, 3.0, "linear", "freia"),
    "nflows half_turn": Spline(4, 3.0, "half_turn", "nflows"),
    "zuko half_turn": Spline(4, 3.0, "half_turn", "zuko"),
}


@dataclass
class Network:
    """A masked network whose units have degrees in no order, computed as one writes it, and the op's arguments.

    Attributes:
        degrees: of the units of each hidden layer: a unit depends on so many features of the order.
        context: whether products have terms of each sample.
        wavy: whether the network reads waves of the features.
    """

    features: int = 5
    degrees: tuple[Tensor, ...] = (torch.arange(7) % 5, torch.arange(9) % 5)
    layers: tuple[int, ...] = PLAIN
    activation: str = "relu"
    transformer: Affine | Spline = Affine()
    context: bool = False
    samples: int = 4
    dtype: torch.dtype = torch.float64
    wavy: bool = False
    order: Tensor = field(init=False)

    def __post_init__(self):
        d, each, dtype = self.features, self.transformer.parameters, self.dtype
        self.order = torch.randperm(d)
        self.degrees = tuple(v.to(self.order.device) for v in self.degrees)
        self.z = torch.randn(self.samples, d, dtype=dtype)
        if isinstance(self.transformer, Spline) and self.transformer.tails == "none":
            self.z = torch.rand(self.samples, d, dtype=dtype)
        if isinstance(self.transformer, Spline) and self.transformer.tails == "half_turn":
            self.z = 5 * torch.rand(self.samples, d, dtype=dtype) - 2.5
        self.waves = (
            torch.randn(4, d, dtype=dtype) if self.wavy else None
        )  # of the features, not in the order
        rank = self.order.argsort()  # of a feature in the order
        of_features, of_params = rank + 1, rank.repeat_interleave(each)
        degrees = [of_features, *self.degrees, of_params]
        self.matrices = [
            (above[:, None] >= below) * torch.randn(len(above), len(below), dtype=dtype) / len(below) ** 0.5
            for above, below in zip(degrees[1:], degrees[:-1], strict=True)
        ]
        rows = (self.samples,) if self.context else ()
        self.added = [torch.randn(*rows, len(w), dtype=dtype) / 2 for w in self.matrices]
        gated = [flags & GATE for flags in self.layers[:-1]]
        self.gates = [
            torch.rand(self.samples, len(w), dtype=dtype) if gate else None
            for w, gate in zip(self.matrices[:-1], gated, strict=True)
        ]

    def parameters(self, x: Tensor) -> Tensor:
        """``[N, D, P]``"""
        act = ACTIVATIONS[self.activation]
        units = [self.read(x)]
        for w, a, gate, flags in zip(
            self.matrices, self.added, [*self.gates, None], self.layers, strict=True
        ):
            u = (act(units[-1]) if flags & BEFORE else units[-1]) @ w.mT + a
            u = u * gate if flags & GATE else u
            u = act(u) if flags & AFTER else u
            units.append(u + units[-2] if flags & SKIP else u)
        return units[-1].unflatten(1, (self.features, -1))

    def read(self, x: Tensor) -> Tensor:
        if self.waves is None:
            return x
        frequency, of_sin, of_cos, multiple = self.waves
        return of_sin * (frequency * x).sin() + of_cos * (frequency * x).cos() + multiple * x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transformer.forward(x, self.parameters(x))
        return z, log_slope.sum(1)

    def inverse_by_passes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(z)
        for _ in range(self.features):
            x, log_slope = self.transformer.inverse(z, self.parameters(x))
        return x, log_slope.sum(1)

    def sorts(self) -> list[Tensor]:
        """The units of layers 0 to L + 1 as the op has them."""
        places = torch.arange(self.features * self.transformer.parameters).view(self.features, -1)
        hidden = [torch.argsort(d, stable=True) for d in self.degrees]
        return [self.order, *hidden, places[self.order].flatten()]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """z, weights, added and gates of the op."""
        sorts = self.sorts()
        matrices = [
            w[rows][:, columns] for w, rows, columns in zip(self.matrices, sorts[1:], sorts[:-1], strict=True)
        ]
        added = [a[..., rows] for a, rows in zip(self.added, sorts[1:], strict=True)]
        gates = [g[:, rows] for g, rows in zip(self.gates, sorts[1:-1], strict=True) if g is not None]
        weights = torch.cat([w.flatten() for w in matrices])
        return self.z, weights, torch.cat(added, -1), torch.cat(gates, 1) if gates else None

    def options(self) -> dict:
        k = torch.arange(self.features)
        ends = [(d[:, None] <= k).sum(0) for d in self.degrees]
        return {
            "ends": torch.stack(ends) if ends else torch.empty(0, self.features, dtype=torch.int64),
            "order": self.order,
            "widths": [len(d) for d in self.degrees],
            "layers": list(self.layers),
            "activation": self.activation,
            "transformer": self.transformer,
            **({} if self.waves is None else {"waves": self.waves[:, self.order]}),
        }

    def inverse(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.masked_inverse(*(tensors or self.tensors()), **self.options())


def degrees(features: int, *widths: int) -> tuple[Tensor, ...]:
    """Degrees in a random order, of layers that have the same ones if they are equally wide."""
    found = {width: torch.randperm(width) % features for width in widths}
    return tuple(found[width] for width in widths)


NETWORKS = {
    "plain": lambda: Network(),
    "one hidden layer": lambda: Network(degrees=degrees(5, 6), layers=(AFTER, 0), activation="tanh"),
    "no hidden layer": lambda: Network(degrees=(), layers=(0,)),
    "three hidden layers": lambda: Network(degrees=degrees(5, 8, 6, 11), layers=(AFTER, AFTER, AFTER, 0)),
    "residual": lambda: Network(degrees=degrees(5, 8, 8, 8), layers=RESIDUAL, activation="silu"),
    "gates": lambda: Network(degrees=degrees(5, *[8] * 5), layers=GLU, activation="elu", context=True),
    "bottleneck block": lambda: Network(degrees=degrees(5, 8, 3, 8), layers=RESIDUAL, context=True),
    "gate after": lambda: Network(layers=(AFTER | GATE, AFTER, 0), activation="tanh"),
    "context": lambda: Network(context=True),
    "no unit of degree 0": lambda: Network(degrees=(torch.tensor([1, 3, 3, 4, 2, 1]),), layers=(AFTER, 0)),
    "only degree 0": lambda: Network(degrees=(torch.zeros(3, dtype=torch.int64),), layers=(AFTER, 0)),
    "one feature": lambda: Network(features=1, degrees=degrees(1, 4, 3), context=True),
    "narrower than the features": lambda: Network(features=11, degrees=degrees(11, 3, 2)),
    "wide": lambda: Network(features=3, degrees=degrees(3, 70, 150), samples=70),
    "many features": lambda: Network(features=90, degrees=degrees(90, 70, 120), samples=3),
    "no samples": lambda: Network(samples=0, context=True),
    "one sample": lambda: Network(samples=1),
    "waves": lambda: Network(wavy=True, transformer=Spline(3, 5.0, "zero", "nflows"), activation="tanh"),
    "waves, no hidden layer": lambda: Network(degrees=(), layers=(0,), wavy=True),
    "waves, residual": lambda: Network(
        degrees=degrees(5, 8, 8, 8), layers=RESIDUAL, activation="silu", wavy=True, context=True, samples=35
    ),
    "angles": lambda: Network(transformer=Spline(3, 2.5, "half_turn", "zuko"), activation="tanh"),
}
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
each_transformer = pytest.mark.parametrize(
    "transformer", [*AFFINES.values(), *SPLINES.values()], ids=[*AFFINES, *SPLINES]
)


@each_network
def test_inverse_is_that_of_d_passes(make):
    network = make()
    found = network.inverse()
    torch.testing.assert_close(found, network.inverse_by_passes(network.z), rtol=1e-12, atol=1e-12)
    back, log_det = network.forward(found[0])
    torch.testing.assert_close(back, network.z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(log_det, -found[1], rtol=1e-11, atol=1e-11)


@each_transformer
@pytest.mark.parametrize("context", [False, True])
def test_transformers(transformer, context):
    network = Network(transformer=transformer, context=context, samples=33, activation="tanh")
    found = network.inverse()
    torch.testing.assert_close(found, network.inverse_by_passes(network.z), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_half_turn_is_that_of_remainder(dtype):
    """At 0 and the ends of the circle; the spline is the identity."""
    pi = torch.tensor(math.pi, dtype=dtype)
    z = torch.stack([pi, -pi, pi / 2, 0 * pi, -0 * pi, 1e-30 + 0 * pi, -1e-30 - 0 * pi, -pi / 3])
    transformer = Spline(2, math.pi, "half_turn", "zuko", min_slope=0.5)
    x, log_det = ops.masked_inverse(
        z[:, None],
        torch.zeros(5, dtype=dtype),
        torch.zeros(5, dtype=dtype),
        ends=torch.empty(0, 1, dtype=torch.int64),
        order=torch.zeros(1, dtype=torch.int64),
        widths=[],
        layers=[0],
        transformer=transformer,
    )
    turned = torch.remainder(z, 2 * math.pi) - math.pi
    for f in (torch.sin, torch.cos):  # near 0 either end of the circle is right
        torch.testing.assert_close(f(x[:, 0]), f(turned), rtol=0, atol=50 * torch.finfo(dtype).eps)
    assert x.abs().max() <= pi + 50 * torch.finfo(dtype).eps and log_det.abs().max() < 1e-6


@each_transformer
def test_pullback_is_that_of_autograd(transformer):
    x, params = (
        torch.rand(7, dtype=torch.float64),
        torch.randn(7, transformer.parameters, dtype=torch.float64),
    )
    g, dlog = torch.randn(2, 7, dtype=torch.float64)
    x, params = leaf(x), leaf(params)
    expected = torch.autograd.grad(transformer.forward(x, params), (x, params), (g, dlog))
    torch.testing.assert_close(transformer.pullback(x, params, g, dlog), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    network = Network(degrees=degrees(5, 8, 8, 8), layers=RESIDUAL, activation=activation)
    found = network.inverse()
    torch.testing.assert_close(found, network.inverse_by_passes(network.z), rtol=1e-12, atol=1e-12)


@each_network
def test_float32_is_as_near_as_d_passes(make):
    network = make()
    exact = network.inverse_by_passes(network.z)
    for name in ("matrices", "added", "gates"):
        setattr(network, name, [None if v is None else v.float() for v in getattr(network, name)])
    network.z, network.waves = network.z.float(), None if network.waves is None else network.waves.float()
    found, passes = network.inverse(), network.inverse_by_passes(network.z)
    for ours, theirs, truth in zip(found, passes, exact, strict=True):
        assert ours.dtype == torch.float32
        if truth.numel():
            error, allowed = (ours - truth).abs().max(), 2 * (theirs - truth).abs().max()
            assert error <= max(allowed, 1e-6 * truth.abs().max())


@pytest.mark.bodies("compiled")
def test_long_sums_of_float32():
    """Their error is at most four times that of D passes; of sums from the first product to the last it is eight times."""
    network = Network(
        features=60, degrees=(torch.arange(6000) % 60,), layers=(AFTER, 0), activation="tanh", samples=32
    )
    exact, _ = network.inverse_by_passes(network.z)
    for name in ("matrices", "added"):
        setattr(network, name, [v.float() for v in getattr(network, name)])
    network.z = network.z.float()
    found, passes = network.inverse()[0], network.inverse_by_passes(network.z)[0]
    assert (found - exact).norm() <= 4 * (passes - exact).norm()


@each_network
def test_masked_weights_are_not_read(make):
    network = make()
    z, weights, added, gates = network.tensors()
    poisoned = torch.where(weights == 0, torch.nan, weights)
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.inverse(z, poisoned, added, gates), network.inverse(), strict=True)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_only_later_features_of_a_sample_become_nan(value):
    network = Network(features=6, degrees=degrees(6, 20, 20), samples=70)
    expected, _ = network.inverse()
    network.z[17, network.order[3]] = value
    x, log_det = network.inverse()
    affected = torch.zeros_like(x, dtype=torch.bool)
    affected[17, network.order[3:]] = True
    assert torch.equal(x[~affected], expected[~affected]) and not x[17, network.order[3]].isfinite()
    assert log_det[:17].isfinite().all() and log_det[18:].isfinite().all()


def of_part(network: Network, part: slice) -> list[Tensor]:
    """The op's tensors of some of the samples."""
    z, weights, added, gates = network.tensors()
    return z[part], weights, added[part] if network.context else added, None if gates is None else gates[part]


@pytest.mark.bodies(*EXTENSION[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sample_does_not_depend_on_the_others(dtype):
    """Its bits do not: neither on how many there are nor on its place."""
    network = Network(
        features=20,
        degrees=degrees(20, *[90] * 5),
        layers=GLU,
        activation="elu",
        context=True,
        samples=333,
        dtype=dtype,
    )
    x, log_det = network.inverse()
    right = torch.randn(4, 333, 20, dtype=dtype)
    units = torch.rand(333, 450, dtype=dtype)

    def solved(part: slice) -> Tensor:
        options = network.options()
        rest = {k: options[k] for k in ("ends", "widths", "layers")} | {"weights": network.tensors()[1]}
        v, slope, *jac = right[:, part]
        return ops.masked_solve(
            v, slope.abs() + 1, torch.stack(jac, 2), None, units[part], units[part], **rest
        )

    u = solved(slice(None))
    for first, end in [(0, 1), (332, 333), (7, 9), (100, 117), (5, 21), (64, 128), (3, 100), (1, 333)]:
        part = slice(first, end)
        found = network.inverse(*of_part(network, part))
        assert torch.equal(found[0], x[part]) and torch.equal(found[1], log_det[part])
        assert torch.equal(solved(part), u[part])


@pytest.mark.parametrize("name", ["gates", "context", "plain"])
def test_any_strides(name):
    network = NETWORKS[name]()
    z, weights, added, gates = network.tensors()
    expected = network.inverse()
    options = network.options()

    def strided(t):
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]

    others = [
        (z.mT.contiguous().mT, weights, added, gates),
        (strided(z), strided(weights), strided(added), None if gates is None else strided(gates)),
        (torch.cat([z, z], 1)[:, : network.features], weights, added, gates),
    ]
    for tensors in others:
        found = ops.masked_inverse(*tensors, **options)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        assert found[0].is_contiguous()
    same = torch.empty_like(z[:1]).copy_(z[:1]).expand(z.shape)
    found = network.inverse(same, *network.tensors()[1:])
    torch.testing.assert_close(found[0], network.inverse(same.clone(), *network.tensors()[1:])[0])
    options["ends"], options["order"] = strided_int(options["ends"]), strided_int(options["order"])
    torch.testing.assert_close(
        ops.masked_inverse(z, weights, added, gates, **options), expected, rtol=1e-13, atol=1e-13
    )


def strided_int(t: Tensor) -> Tensor:
    return torch.stack([t, -t - 1], -1).flatten(-2)[..., ::2]


@pytest.mark.bodies("compiled")
def test_values_of_ends_and_order():
    """Those that would lead out of bounds are errors of the C++ body."""
    network = Network()
    options = network.options()
    with pytest.raises(ValueError, match=r"^order: got 5 at 1, expected each of 0 to 4 once"):
        ops.masked_inverse(*network.tensors(), **options | {"order": torch.tensor([0, 5, 1, 2, 3])})
    with pytest.raises(ValueError, match=r"^ends: got 6 at \[0, 4\], expected ascending numbers to 7"):
        ends = options["ends"].clone()
        ends[0, 4] = 6
        ops.masked_inverse(*network.tensors(), **options | {"ends": ends})


@pytest.mark.bodies(*EXTENSION[1:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_float32(activation):
    """To a few units in the last place, for any magnitude: z is minus a unit."""
    values = torch.cat(
        [torch.linspace(-110, 110, 4001), torch.randn(999) * 10.0 ** torch.randint(-30, 3, (999,))]
    )
    added = torch.cat([values[:, None], torch.zeros(5000, 2)], 1)
    weights = torch.tensor([0.0, 0.0, 1.0])
    x, log_det = ops.masked_inverse(
        torch.zeros(5000, 1),
        weights,
        added,
        ends=torch.ones(1, 1, dtype=torch.int64),
        order=torch.zeros(1, dtype=torch.int64),
        widths=[1],
        layers=[AFTER, 0],
        activation=activation,
        transformer=Affine(),
    )
    exact = -ACTIVATIONS[activation](values.double())
    assert not log_det.any()
    unit = torch.finfo(torch.float32).eps * exact.abs() + torch.finfo(torch.float32).tiny
    assert ((x[:, 0] - exact).abs() <= 4 * unit).all()


# gradients --------------------------------------------------------------------------------------------------------------------

SMOOTH = [name for name in NETWORKS if name not in ("many features", "wide", "no samples")]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_d_passes(name):
    network = NETWORKS[name]()
    tensors = [None if v is None else leaf(v) for v in network.tensors()]
    wanted = [v for v in tensors if v is not None]
    weights = torch.randn_like(network.z), torch.randn(network.samples, dtype=network.dtype)
    found = torch.autograd.grad(network.inverse(*tensors), wanted, weights)

    for v in ("matrices", "added", "gates"):
        setattr(network, v, [None if t is None else leaf(t) for t in getattr(network, v)])
    network.z = leaf(network.z)
    through = [t for t in (network.z, *network.matrices, *network.added, *network.gates) if t is not None]
    passes = network.inverse_by_passes(network.z)
    by_hand = iter(torch.autograd.grad(passes, through, weights, materialize_grads=True))
    network.z = next(by_hand)
    network.matrices, network.added = ([next(by_hand) for _ in network.matrices] for _ in range(2))
    network.gates = [None if t is None else next(by_hand) for t in network.gates]
    dz, dweights, *rest = (v for v in network.tensors() if v is not None)
    kept = tensors[1] != 0  # masked weights have no gradient
    torch.testing.assert_close(found[0], dz, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], torch.where(kept, dweights, 0.0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2:], tuple(rest), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["residual", "gates", "one hidden layer"])
def test_gradcheck(name):
    network = NETWORKS[name]()
    network.activation = "tanh"
    tensors = [None if v is None else leaf(v) for v in network.tensors()]
    assert gradcheck(network.inverse, tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["waves", "waves, residual", "waves, no hidden layer"])
def test_gradients_of_waves(name):
    """Of the op, and of D passes."""
    network, found = NETWORKS[name](), []
    cotangents = torch.randn_like(network.z), torch.randn(network.samples, dtype=network.dtype)
    network.waves = leaf(network.waves)
    for outputs in (network.inverse(), network.inverse_by_passes(network.z)):
        found += torch.autograd.grad(outputs, network.waves, cotangents)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_outside_of_an_interval_features_are_zero():
    """And so are their log-slopes and gradients; later features depend on the zeros."""
    network = Network(
        wavy=True, transformer=Spline(3, 1.5, "zero", "nflows"), activation="tanh", context=True, samples=40
    )
    network.z[0] = torch.tensor([1.5, -1.5, 1.5 + 1e-9, -1.5 - 1e-9, 0.0])
    tensors = [None if v is None else leaf(v) for v in network.tensors()]
    x, log_det = network.inverse(*tensors)
    torch.testing.assert_close((x, log_det), network.inverse_by_passes(network.z), rtol=1e-11, atol=1e-11)
    outside = network.z.abs() > 1.5
    assert outside.sum() > 10 and torch.equal(x == 0, outside)
    (dz,) = torch.autograd.grad(x.sum() + log_det.sum(), tensors[0])
    assert dz.isfinite().all() and dz[0, 0] != 0 and dz[0, 1] != 0  # the ends are inside
    network.z = leaf(network.z)
    passes = network.inverse_by_passes(network.z)
    (expected,) = torch.autograd.grad(passes[0].sum() + passes[1].sum(), network.z)
    torch.testing.assert_close(dz[1:], expected[1:], rtol=1e-9, atol=1e-9)
    assert not dz[outside].any()


def jacobians(network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobians ``[N, D, D]`` of z and ``[N, D P, D]`` of the parameters, in the order."""
    order, params = network.order, network.sorts()[-1]

    def f(x):
        return network.forward(x)[0][:, order], network.parameters(x).flatten(1)[:, params]

    found = torch.autograd.functional.jacobian(lambda x: tuple(v.sum(0) for v in f(x)), x)
    return tuple(v.movedim(1, 0)[..., order] for v in found)


@each_network
def test_solve(make):
    """Against a dense solve with the Jacobian."""
    network = make()
    x, _ = network.inverse_by_passes(network.z)
    J, N = jacobians(network, x)
    assert not J.triu(1).any(), "the network that the test compares with is masked"
    order, act = network.order, ACTIVATIONS[network.activation]
    params = network.parameters(x)
    one = torch.ones_like(x)
    slope, jac = (v[:, order] for v in network.transformer.pullback(x, params, one, 0 * one))
    inner, outer = [], []
    leaves = leaf(x)
    of_features = torch.autograd.grad(network.read(leaves).sum(), leaves)[0][:, order]
    units = [network.read(x)]
    for i, flags in enumerate(network.layers[:-1]):
        u = (act(units[-1]) if flags & BEFORE else units[-1]) @ network.matrices[i].mT + network.added[i]
        u = leaf(u)
        with torch.enable_grad():
            w = u * network.gates[i] if flags & GATE else u
            w = act(w) if flags & AFTER else w
        inner.append(torch.autograd.grad(w.sum(), u)[0])
        h = leaf(w.detach() + units[-2] if flags & SKIP else w)
        with torch.enable_grad():
            p = act(h) if network.layers[i + 1] & BEFORE else h.clone()
        outer.append(torch.autograd.grad(p.sum(), h)[0])
        units.append(h.detach())
    sorts = network.sorts()[1:-1]
    inner, outer = (
        torch.cat([v[:, s] for v, s in zip(parts, sorts, strict=True)], 1)
        if parts
        else x.new_empty(len(x), 0)
        for parts in (inner, outer)
    )
    options = network.options()
    rest = {k: options[k] for k in ("ends", "widths", "layers")} | {"weights": network.tensors()[1]}
    rest["of_features"] = of_features if network.wavy else None
    v, q = torch.randn_like(x), torch.randn_like(jac)
    for dparams in (None, q):
        right = v if dparams is None else v + (N.mT @ dparams.flatten(1).unsqueeze(-1)).squeeze(-1)
        found = ops.masked_solve(v, slope, jac, dparams, inner, outer, **rest)
        expected = torch.linalg.solve(J.mT, right.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if all(flags & (AFTER | GATE) == 0 for flags in network.layers):
        assert torch.equal(ops.masked_solve(v, slope, jac, q, None, outer, **rest), found)
    if not any(flags & BEFORE for flags in network.layers):
        assert torch.equal(ops.masked_solve(v, slope, jac, q, inner, **rest), found)


# several ----------------------------------------------------------------------------------------------------------------------


class Several:
    """Three networks of the same sizes with orders of their own; their parameters in a random order, and a context."""

    def __init__(self, of_context=3, **options):
        torch.manual_seed(0)
        self.networks = [Network(**options) for _ in range(3)]
        first, dtype = self.networks[0], self.networks[0].dtype
        self.z, units = first.z, len(first.matrices[0])
        self.context = torch.randn(len(self.z), of_context, dtype=dtype) if of_context else None
        # beyond the sums that are added one by one, some contexts are long
        self.of_context = [
            torch.randn(units, of_context, dtype=dtype) / (1 + of_context) ** 0.5 for _ in range(3)
        ]
        own = [
            torch.cat([net.tensors()[1], w[net.sorts()[1]].flatten(), net.tensors()[2]])
            for net, w in zip(self.networks, self.of_context, strict=True)
        ]
        mixed = torch.randperm(3 * len(own[0]))
        self.parameters = torch.empty(len(mixed), dtype=dtype)
        self.parameters[mixed] = torch.cat(own)
        weights = len(first.tensors()[1])
        masked = [F.pad(net.tensors()[1] == 0, (0, len(own[0]) - weights)) for net in self.networks]
        self.places = torch.where(torch.stack(masked), -1, mixed.view(3, -1))
        unused = torch.ones(len(mixed), dtype=torch.bool)
        unused[self.places[self.places >= 0]] = False
        self.parameters[unused] = torch.nan

    def options(self):
        each = [net.options() for net in self.networks]
        stacked = {name: torch.stack([options[name] for options in each]) for name in ("ends", "order")}
        return each[0] | stacked | {"places": self.places}

    def inverse(self, *tensors):
        z, parameters, context = tensors or (self.z, self.parameters, self.context)
        return ops.masked_inverses(z, parameters, context, **self.options())

    def inverse_by_passes(self):
        x, log_det = self.z, 0
        for net, w in zip(self.networks, self.of_context, strict=True):
            if self.context is not None:
                net.added[0] = net.added[0] + self.context @ w.mT
            x, more = net.inverse_by_passes(x)
            log_det = log_det + more
        return x, log_det


SEVERAL = {
    "affine": lambda: Several(transformer=ZUKO),
    "spline": lambda: Several(transformer=SPLINES["zuko linear"], of_context=150, activation="elu"),
    "residual": lambda: Several(
        degrees=(torch.arange(6) % 5,) * 3, layers=RESIDUAL, activation="silu", of_context=0, samples=70
    ),
    "no hidden layer": lambda: Several(degrees=(), layers=(0,), of_context=2, features=3),
    "no samples": lambda: Several(samples=0),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_are_passes_of_each(name):
    several = SEVERAL[name]()
    torch.testing.assert_close(several.inverse(), several.inverse_by_passes(), rtol=1e-9, atol=1e-9)


def test_gradients_of_several():
    several = Several(
        degrees=(torch.arange(3) % 2,), layers=(AFTER, 0), activation="tanh", features=2, samples=2
    )
    several.parameters.nan_to_num_(0.0)  # gradcheck varies masked weights too
    leaves = [leaf(v) for v in (several.z, several.parameters, several.context)]
    assert gradcheck(several.inverse, leaves)


def test_opcheck_of_several():
    several = SEVERAL["affine"]()
    options = several.options()
    names = "places", "ends", "order", "widths", "layers", "activation"
    form = ("exp", "scale_first", "scale_shift", 0.0, 0, 3.0, "linear", "fastflow", 1.0, 1e-3, 1e-3)
    args = several.z, several.context, several.parameters, *(options[name] for name in names), *form
    torch.library.opcheck(torch.ops.fastflow.masked_inverses.default, args, test_utils=STATIC)


# registration -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "gates", "no samples", "waves, no hidden layer"])
def test_opcheck(name):
    network = NETWORKS[name]()
    tensors, options = network.tensors(), network.options()
    form = ("exp", "scale_first", "scale_shift", 0.0, 0, 3.0, "linear", "fastflow", 1.0, 1e-3, 1e-3)
    args = (*options.values(),)[:5]
    leaves = [None if v is None else leaf(v) for v in tensors]
    torch.library.opcheck(
        torch.ops.fastflow.masked_inverse.default,
        (*leaves, *args, *form, options.get("waves")),
        test_utils=STATIC + (TRACED if name == "gates" else ()),
    )


def test_compile():
    network = NETWORKS["gates"]()
    leaves = [leaf(v) for v in network.tensors()]

    def loss(*tensors):
        x, log_det = network.inverse(*tensors)
        return x.square().sum() + log_det.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
