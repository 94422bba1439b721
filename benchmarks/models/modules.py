"""Times single layers, forward and inverse, and compares them with plain PyTorch, nflows and normflows.

    pip install --no-deps nflows normflows    # optional, to compare with them
    python -m benchmarks.models.modules

Rows go to results/modules.csv; the shape is N x C x H x W of x, and couplings have Glow's network.
Gradients are by x and by all parameters. FastFlow, plain PyTorch and torch.compile share the parameters;
the libraries have copies in their own forms. Inverses are compared without log-dets, which sampling does
not need, although FastFlow and the libraries compute them. Dequantization draws noise and is timed as an
op. Networks and priors are plain PyTorch in FastFlow as well, so they are not timed.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import libraries, plain_glow
from benchmarks.tools import harness
from fastflow import nn as flows


class Forward(nn.Module):
    """y and the log-det ``[N]`` of a layer, or only y."""

    def __init__(self, layer: nn.Module, log_det: bool) -> None:
        super().__init__()
        self.layer, self.log_det = layer, log_det

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y, *_, log_det = self.layer(x)
        return (y, log_det.expand(len(x))) if self.log_det else y


class Inverse(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> Tensor:
        x = self.layer.inverse(z)
        return x[0] if isinstance(x, tuple) else x


class Squeeze(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(
            n, 4 * c, h // 2, w // 2
        ), None

    def inverse(self, y):
        n, c, h, w = y.shape
        return y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


class Permute(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.register_buffer("perm", like.perm)
        self.register_buffer("back", like.perm.argsort())

    def forward(self, x):
        return x.index_select(1, self.perm), None

    def inverse(self, y):
        return y.index_select(1, self.back)


class AdditiveCoupling(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.network = plain_glow.Network(like.net)

    def forward(self, x):
        x_a, x_b = x.chunk(2, dim=1)
        return torch.cat([x_a, x_b + self.network(x_a)], dim=1), None

    def inverse(self, y):
        y_a, y_b = y.chunk(2, dim=1)
        return torch.cat([y_a, y_b - self.network(y_a)], dim=1)


class BatchNorm(nn.Module):
    """Batch normalization with the statistics of the batch; without gradients with those that the layer keeps."""

    def __init__(self, like):
        super().__init__()
        self.like, self.eps = like, like.eps  # its buffers change

    def forward(self, x):
        if torch.is_grad_enabled():
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        else:
            var, mean = (v.view(1, -1, 1, 1) for v in (self.like.var, self.like.mean))
        return (x - mean) * torch.rsqrt(var + self.eps), -0.5 * x.shape[2] * x.shape[3] * torch.log(
            var + self.eps
        ).sum()

    def inverse(self, y):
        return y * (self.like.var + self.eps).sqrt().view(1, -1, 1, 1) + self.like.mean.view(1, -1, 1, 1)


def glow_step(c: int, side: int, hidden: int, coupling: str) -> flows.GlowStep:
    """An initialized step with weights that the libraries can represent."""
    step = flows.GlowStep(c, hidden, coupling="additive" if coupling == "additive" else "affine")
    libraries.settle(step, coupling)
    step(torch.randn(8, c, side, side))  # initializes ActNorm
    with torch.no_grad():
        step.conv1x1.log_s.add_(0.5)  # a log-det near zero would consist of rounding errors
    perturbed(step.coupling.net)
    return step


@torch.no_grad()
def perturbed(module: nn.Module) -> nn.Module:
    """Adds noise to the parameters: a network that ends in zeros would hide errors before its end."""
    for p in module.parameters():
        p.add_(torch.randn_like(p), alpha=0.02)
    return module


@dataclass
class Layer:
    """A layer of FastFlow, plain PyTorch's, and functions that make the libraries' layers from it."""

    name: str
    ours: nn.Module
    plain: nn.Module
    nflows: Callable[[], nn.Module] | None = None
    normflows: Callable[[], nn.Module] | None = None
    log_det: bool = True
    inverse: bool = True
    squeezes: bool = False

    def providers(self) -> dict[str, nn.Module]:
        found = {"eager": self.plain, "fastflow": self.ours}
        like = torch.empty(0, dtype=torch.float64)
        for library, make, wrap in (
            ("nflows", self.nflows, libraries.Nflows),
            ("normflows", self.normflows, libraries.Normflows),
        ):
            if make is not None and libraries.installed(library):
                found[library] = wrap(make(), like)
        return found


def layers(c: int, side: int, hidden: int) -> list[Layer]:
    step = glow_step(c, side, hidden, "soft_clamp").double()
    shift_first = glow_step(c, side, hidden, libraries.SHIFT_FIRST).double()
    additive = glow_step(c, side, hidden, "additive").coupling.double()
    actnorm, conv1x1, affine = step.actnorm, step.conv1x1, step.coupling
    permute, split, norm = (
        flows.Permute(c, "random"),
        perturbed(flows.Split(c)),
        flows.BatchNorm(c, momentum=0),
    )
    return [
        Layer(
            "ActNorm",
            actnorm,
            plain_glow.ActNorm(actnorm),
            lambda: libraries.nflows_actnorm(actnorm),
            lambda: libraries.normflows_actnorm(actnorm),
        ),
        Layer(
            "InvertibleConv1x1",
            conv1x1,
            plain_glow.Conv1x1(conv1x1),
            lambda: libraries.nflows_conv1x1(conv1x1),
            lambda: libraries.normflows_conv1x1(conv1x1),
        ),
        Layer(
            "AffineCoupling, soft_clamp",
            affine,
            plain_glow.Coupling(affine),
            nflows=lambda: libraries.nflows_coupling(affine, c),
        ),
        Layer(
            f"AffineCoupling, {libraries.SHIFT_FIRST}",
            shift_first.coupling,
            plain_glow.ShiftFirstCoupling(shift_first.coupling),
            normflows=lambda: libraries.normflows_coupling(shift_first.coupling),
        ),
        Layer(
            "AdditiveCoupling",
            additive,
            AdditiveCoupling(additive),
            lambda: libraries.nflows_coupling(additive, c),
            lambda: libraries.normflows_coupling(additive),
            log_det=False,
        ),
        Layer(
            "GlowStep, soft_clamp", step, plain_glow.Step(step), nflows=lambda: libraries.nflows_step(step)
        ),
        Layer(
            f"GlowStep, {libraries.SHIFT_FIRST}",
            shift_first,
            plain_glow.Step(shift_first),
            normflows=lambda: libraries.normflows_step(shift_first),
        ),
        Layer("BatchNorm", norm, BatchNorm(norm)),
        Layer(
            "Squeeze",
            flows.Squeeze(),
            Squeeze(),
            libraries.nflows_squeeze,
            libraries.normflows_squeeze,
            log_det=False,
            squeezes=True,
        ),
        Layer(
            "Permute",
            permute,
            Permute(permute),
            lambda: libraries.nflows_permute(permute),
            lambda: libraries.normflows_permute(permute),
            log_det=False,
        ),
        Layer("Split", split, plain_glow.Split(split), inverse=False),
    ]


def of_size(n: int, c: int, side: int, hidden: int) -> list[harness.Case]:
    found = []
    for layer in layers(c, side, hidden):
        about = {"dtype": torch.float32, "gradients_of": (0,)}
        size = (n, c // 4, 2 * side, 2 * side) if layer.squeezes else (n, c, side, side)
        shape, providers = "x".join(map(str, size)), layer.providers()
        forward = {name: Forward(given, layer.log_det).double() for name, given in providers.items()}
        found.append(
            harness.Case(
                layer.name,
                shape=shape,
                inputs=lambda size=size: (torch.randn(size),),
                providers=forward,
                **about,
            )
        )
        if layer.inverse:
            inverse = {name: Inverse(given) for name, given in providers.items()}
            z = lambda: (torch.randn(n, c, side, side),)  # noqa: E731
            found.append(
                harness.Case(f"{layer.name}, inverse", shape=shape, inputs=z, providers=inverse, **about)
            )
    return found


def cases(options: argparse.Namespace) -> list[harness.Case]:
    warnings.filterwarnings("ignore", message=libraries.DEPRECATED)
    n, hidden = (16, 64) if options.device == "cpu" else (512, 512)
    sizes = [(2, 8, 4, 16)] if options.quick else [(n, 12, 16, hidden), (n, 48, 4, hidden)]
    torch.manual_seed(0)
    return [case for size in sizes for case in of_size(*size)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("modules", __doc__, cases, argv, seconds=2.0)


if __name__ == "__main__":
    main()
