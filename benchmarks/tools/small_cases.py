"""Runs every op, layer and model at small, odd sizes, forward and backward, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.tools.small_cases
    compute-sanitizer --tool racecheck python -m benchmarks.tools.small_cases

Prints each case. With these sizes the last tiles are partial in channels, positions and samples; layouts
are contiguous and channels_last.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow import nn, ops
from fastflow.models import Glow, RealNVP
from fastflow.ops import spec

SIZES = ((3, 12, 5, 7), (2, 6, 16, 16), (1, 48, 4, 4))


class Affine:
    """Affine function of :class:`fastflow.nn.Coupling`."""

    def __call__(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = h.chunk(2, dim=1)
        return x * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = h.chunk(2, dim=1)
        return (y - shift) * (-log_scale).exp(), -log_scale.flatten(1).sum(1)


def network(inputs: int, outputs: int, kernel_size: int = 1) -> torch.nn.Conv2d:
    """A convolution with small parameters: with large ones, the inverse of a chain of couplings loses all digits."""
    net = torch.nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2)
    for p in net.parameters():
        p.data *= 0.2
    return net


def layers(c: int) -> list[nn.Flow]:
    net, wide = network(c // 2, c, 3), network(c, 2 * c, 3)
    return [
        nn.ActNorm(c),
        nn.InvertibleConv1x1(c),
        nn.AffineCoupling(net),
        nn.AffineCoupling(
            net, swap_halves=True, scale="sigmoid", affine_order="shift_first", params_layout="interleaved"
        ),
        nn.AffineCoupling(wide, mask="checkerboard", scale="tanh"),
        nn.AffineCoupling(network(c - 1, 2, 3), split=c - 1),
        nn.AffineCoupling(net, mask=torch.arange(c) % 2 == 0),
        nn.Coupling(net, Affine(), swap_halves=True),
        nn.Coupling(network(c // 2, 3 * (c // 2)), nn.PiecewiseLinear(3)),
        nn.Coupling(network(c // 2, 5 * (c // 2)), nn.PiecewiseQuadratic(3)),
        nn.SplineCoupling(network(c // 2, (c // 2) * nn.SplineCoupling.params_per_element(8))),
        nn.MixtureCDFCoupling(network(c // 2, (c // 2) * nn.MixtureCDFCoupling.params_per_element(8))),
        nn.BatchNorm(c),
        nn.Affine(c),
        nn.Standardize(c),
        *(nn.TriangularLinear(c), nn.QRLinear(c, 2)),
        *(nn.PeriodicConv(c), nn.EmergingConv(c)),
        *(nn.OrthogonalLinear(c), nn.OrthogonalLinear(c, "cayley"), nn.OrthogonalLinear(c, "exponential")),
        nn.Inverse(nn.AffineCoupling(net)),
        nn.LeakyReLU(0.5),
        nn.LeakyReLU(0.5, learned=True),
        *(nn.SoftClip(3.0), nn.CircularShift(3.0, 1.5)),
        *(nn.Tanh(), nn.Inverse(nn.SoftClip(2.0))),
        *(nn.Softplus(), nn.Log()),
        *(nn.Sigmoid(), nn.Logit()),
        *(nn.Exp(), nn.Inverse(nn.Softplus())),
    ]


def vector_layers(c: int) -> list[nn.Flow]:
    each = nn.MaskedAutoregressive.params_per_feature("spline")
    residual = nn.MaskedNetwork(c, each, (9, 7), residual=True, order="reverse")
    return [
        nn.LULinear(c, identity_init=False),
        *(nn.Planar(c), nn.Planar(c, "leaky_relu"), nn.Radial(c), nn.Sylvester(c)),
        nn.Residual(nn.LipschitzMLP(c, (8,))),
        nn.MaskedAutoregressive(nn.MaskedNetwork(c, 2, (11, 6))),
        nn.MaskedAutoregressive(residual, "spline"),
    ]


def check_inverse(flow: nn.Flow, z: Tensor, x: Tensor) -> None:
    """Raise ValueError unless ``x`` comes back from ``z``: within 0.01, of which rounding in a chain takes 0.0002."""
    with torch.no_grad():
        error = (flow.inverse(z)[0] - x).abs().max().item()
    if not error <= 0.01:
        raise ValueError(f"{flow}: x came back with an error of {error}")


def ran_ops(device: str) -> Iterator[str]:
    """Every case of every op's spec, in both layouts."""
    torch.set_default_device(device)
    for shape in ((3, 12, 6, 10), (2, 8, 16, 16)):
        for layout in (torch.contiguous_format, torch.channels_last):
            make = spec.Make(lay_out=lambda x, layout=layout: x.contiguous(memory_format=layout))
            for case in spec.cases(make, shape):
                case()
                yield f"{case} on {'x'.join(map(str, shape))}, {layout}"
    torch.set_default_device(None)


def ran(device: str) -> Iterator[str]:
    yield from ran_ops(device)
    for n, c, h, w in SIZES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(n, c, h, w, device=device).contiguous(memory_format=layout)
            flow = nn.Sequential(*layers(c)).to(device)
            for reversible in (True, False):
                flow.reversible = reversible
                z, log_det = flow(x.requires_grad_())
                (z.sum() + log_det.sum()).backward()
            check_inverse(flow, z, x)
            yield f"layers on {n}x{c}x{h}x{w}, {layout}"
    for n, c in ((3, 5), (2, 16), (1, 1)):
        x = torch.randn(n, c, device=device)
        for flow in vector_layers(c):
            for reversible in (True, False):
                flow = nn.Sequential(flow, reversible=reversible).to(device)
                z, log_det = flow(x.requires_grad_())
                (z.sum() + log_det.sum()).backward()
            check_inverse(flow, z, x)
        yield f"layers of vectors on {n}x{c}"
    for k, n, m in ((3, 5, 7), (2, 48, 48), (1, 64, 3)):
        a = torch.randn(k, n, n, device=device, requires_grad=True)
        ops.triangular_solve(
            a + n * torch.eye(n, device=device), torch.randn(k, n, m, device=device), upper=True
        ).sum().backward()
        yield f"triangular_solve {k}x{n}x{m}"
    for model in (
        Glow((3, 8, 8), levels=2, steps=2, hidden=8, logit=True, classes=3),
        RealNVP((3, 8, 8), hidden=4, blocks=1),
    ):
        model = model.to(device)
        x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, device=device)
        labels: Tensor | None = None if model.classes is None else torch.arange(3, device=device)
        model(x, labels).mean().backward()
        model.eval()
        if not torch.equal(model.decode(model.encode(x, labels), labels), x):
            raise ValueError(f"{type(model).__name__}: pixels did not come back")
        model.sample(3, context=labels)
        yield type(model).__name__


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args(argv).device
    torch.manual_seed(0)
    for case in ran(device):
        if device == "cuda":
            torch.cuda.synchronize()
        print(case, flush=True)


if __name__ == "__main__":
    main()
