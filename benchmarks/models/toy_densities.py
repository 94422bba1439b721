"""Densities in two dimensions of which samples and the exact log-density are known, each in a few lines."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Toy:
    """``draw(n, generator)`` gives samples ``[n, 2]``, ``log_density(x)`` nats ``[n]``, both in float64."""

    draw: Callable[[int, Generator], Tensor]
    log_density: Callable[[Tensor], Tensor]
    limits: tuple[tuple[float, float], tuple[float, float]]  # of each dimension; they contain nearly all mass


def _normal(n: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(n, columns, generator=generator, dtype=torch.float64)


def _uniform(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _of(values: Tensor, n: int, generator: Generator) -> Tensor:
    """n of the values, each equally likely."""
    return values[torch.randint(len(values), (n,), generator=generator)]


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _log_normal(x: Tensor, deviation: float) -> Tensor:
    """Of a Gaussian in one dimension around 0."""
    return -((x / deviation).square() + math.log(2 * math.pi * deviation**2)) / 2


def _log_mean(log_p: Tensor) -> Tensor:
    """Of a mixture, from the log-densities ``[n, k]`` of its equally likely parts."""
    return torch.logsumexp(log_p, 1) - math.log(log_p.shape[1])


# four rings: the radius is a mixture of Gaussians, the angle is uniform

RADII, RING = torch.tensor([0.75, 1.5, 2.25, 3.0], dtype=torch.float64), 0.08


def _draw_rings(n: int, generator: Generator) -> Tensor:
    radius = _of(RADII, n, generator) + RING * _normal(n, 1, generator).squeeze(1)
    return _polar(radius, 2 * math.pi * _uniform(n, generator))


def _rings(x: Tensor) -> Tensor:
    r = x.norm(dim=1)
    return _log_mean(_log_normal(r[:, None] - RADII, RING)) - (2 * math.pi * r).log()


# checkerboard: uniform on 8 of the 16 squares of [-2, 2]^2


def _draw_checkerboard(n: int, generator: Generator) -> Tensor:
    column, row = (_of(torch.arange(k, dtype=torch.float64), n, generator) for k in (4, 2))
    y = 2 * row + column % 2 + _uniform(n, generator)
    return torch.stack([column + _uniform(n, generator), y], 1) - 2


def _checkerboard(x: Tensor) -> Tensor:
    inside = (x.abs() < 2).all(1) & (x.floor().sum(1) % 2 == 0)
    return torch.where(inside, -math.log(8.0), -math.inf)


# pinwheel: five Gaussian blades, rotated by an angle that grows with the radius; such a rotation preserves areas

BLADES, LENGTH, WIDTH, TWIST, REACH = 5, 0.5, 0.12, 0.8, 2.0
ANGLES = 2 * math.pi * torch.arange(BLADES, dtype=torch.float64) / BLADES


def _rotated(x: Tensor, sign: int, angle: Tensor) -> Tensor:
    r = x.norm(dim=1)
    return _polar(r, torch.atan2(x[:, 1], x[:, 0]) + sign * (angle + TWIST * r))


def _draw_pinwheel(n: int, generator: Generator) -> Tensor:
    blade = _normal(n, 2, generator) * torch.tensor([LENGTH, WIDTH]) + torch.tensor([REACH, 0.0])
    return _rotated(blade, 1, _of(ANGLES, n, generator))


def _pinwheel(x: Tensor) -> Tensor:
    blades = [_rotated(x, -1, angle) for angle in ANGLES]
    log_p = [_log_normal(b[:, 0] - REACH, LENGTH) + _log_normal(b[:, 1], WIDTH) for b in blades]
    return _log_mean(torch.stack(log_p, 1))


# two moons: half circles with Gaussian noise; the integral along the arcs by Gauss-Legendre quadrature

MOON = 0.05


def _arcs(t: Tensor) -> tuple[Tensor, Tensor]:
    upper = _polar(torch.ones_like(t), t)
    return upper, torch.tensor([1.0, 0.5]) - upper


def _draw_moons(n: int, generator: Generator) -> Tensor:
    upper, lower = _arcs(math.pi * _uniform(n, generator))
    first = _uniform(n, generator) < 0.5
    return torch.where(first[:, None], upper, lower) + MOON * _normal(n, 2, generator)


def _moons(x: Tensor) -> Tensor:
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(256))
    parts = []
    for arc in _arcs(math.pi / 2 * (nodes + 1)):
        log_p = _log_normal(x[:, None] - arc, MOON).sum(2)
        parts.append(torch.logsumexp(log_p + (weights / 2).log(), 1))
    return _log_mean(torch.stack(parts, 1))


# eight Gaussians on a circle

CENTERS = _polar(
    torch.full((8,), 2.0, dtype=torch.float64), math.pi / 4 * torch.arange(8, dtype=torch.float64)
)
GAUSSIAN = 0.2


def _draw_gaussians(n: int, generator: Generator) -> Tensor:
    return _of(CENTERS, n, generator) + GAUSSIAN * _normal(n, 2, generator)


def _gaussians(x: Tensor) -> Tensor:
    return _log_mean(_log_normal(x[:, None] - CENTERS, GAUSSIAN).sum(2))


TOYS = {
    "rings": Toy(_draw_rings, _rings, ((-3.5, 3.5), (-3.5, 3.5))),
    "checkerboard": Toy(_draw_checkerboard, _checkerboard, ((-2.5, 2.5), (-2.5, 2.5))),
    "pinwheel": Toy(_draw_pinwheel, _pinwheel, ((-4.4, 4.4), (-4.4, 4.4))),
    "two moons": Toy(_draw_moons, _moons, ((-1.5, 2.5), (-1.0, 1.5))),
    "eight Gaussians": Toy(_draw_gaussians, _gaussians, ((-3.2, 3.2), (-3.2, 3.2))),
}
