"""Times the tutorial's three MNIST flows: the log-density of a batch of 64 images, and 64 samples.

    python -m benchmarks.models.mnist_flows

``plain`` is the same model in plain PyTorch, with the same weights: masks are multiplied, and every network sees
and returns all channels, as in the tutorial. Log-densities of the same noise, and the images of the same latents,
are compared in float64 before anything is timed. A model that differs has no row.

``fastflow, networks compiled`` is FastFlow after ``model.compile_networks()``. Models are in eval mode, and take
turns in one process, which keeps the memory that tensors free, as the command line does.

Rows go to results/mnist_flows.csv. The table of docs/models.md is rewritten.
"""

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.tools import harness, page
from fastflow import ops
from fastflow.models import mnist_flow
from fastflow.models.mnist_flow import VARIANTS, MNISTFlow
from fastflow.nn import AffineCoupling, GatedNetwork, VariationalDequantize
from fastflow.trainer.cli import keep_memory

MODES = ("log_prob", "sample")
BATCH, TOLERANCE = 64, 1e-9  # in float64, over the largest value
COMPILED = "fastflow, networks compiled"
# milliseconds that the tutorial prints for its batches of 64: inference, sampling
PUBLISHED = {"simple": (51, 50), "vardeq": (69, 50), "multiscale": (40, 22)}

# the models in plain PyTorch ----------------------------------------------------------


def both_signs(x: Tensor) -> Tensor:
    return torch.cat([F.elu(x), F.elu(-x)], dim=1)


class Network(nn.Module):
    """The gated network with the parameters of FastFlow's."""

    def __init__(self, like: GatedNetwork) -> None:
        super().__init__()
        self.first, self.last = like.conv_in, like.conv_out
        self.blocks = nn.ModuleList(nn.ModuleList([b.conv_in, b.conv_out]) for b in like.blocks)
        self.norms = nn.ParameterList(p for b in like.blocks for p in (b.norm.weight, b.norm.bias))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, (first, last) in enumerate(self.blocks):
            value, gate = last(both_signs(first(x))).chunk(2, dim=1)
            x = (x + value * torch.sigmoid(gate)).permute(0, 2, 3, 1)
            weight, bias = self.norms[2 * i], self.norms[2 * i + 1]
            x = F.layer_norm(x, weight.shape, weight, bias).permute(0, 3, 1, 2)
        return self.last(both_signs(x))


class Coupling(nn.Module):
    """y = (x + t) e^s where the mask is 0, s = f tanh(h / f); t and h are multiplied with the mask."""

    def __init__(self, like: AffineCoupling, channels: int) -> None:
        super().__init__()
        inner = like.net if isinstance(like.net, GatedNetwork) else like.net.net
        self.network, self.log_factor = Network(inner), like.log_factor
        if like.mask == "checkerboard":
            at = torch.arange(28)
            mask = (at[:, None] + at).remainder(2).view(1, 1, 28, 28)
        else:
            mask = (torch.arange(channels) < channels // 2).long().view(1, channels, 1, 1)
        mask = 1 - mask if like.swap_halves else mask
        self.register_buffer("mask", mask.to(like.log_factor))

    def shift_and_log_scale(self, x: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = x * self.mask
        h, t = self.network(seen if image is None else torch.cat([seen, image], dim=1)).chunk(2, dim=1)
        factor = self.log_factor.exp().view(1, -1, 1, 1)
        return t * (1 - self.mask), torch.tanh(h / factor) * factor * (1 - self.mask)

    def forward(self, x: Tensor, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, s = self.shift_and_log_scale(x, image)
        return (x + t) * s.exp(), s.sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        t, s = self.shift_and_log_scale(y, None)
        return y * (-s).exp() - t


class Plain(nn.Module):
    """An MNISTFlow in plain PyTorch."""

    def __init__(self, model: MNISTFlow) -> None:
        super().__init__()
        self.alpha, self.shapes = model.config["alpha"], model.latent_shapes()
        learned = isinstance(model.dequantize, VariationalDequantize)
        self.noise = nn.ModuleList(Coupling(c, 1) for c in (model.dequantize.flow.flows if learned else ()))
        self.levels, channels = nn.ModuleList(), 1
        for flow in model.flows:
            layers = nn.ModuleList()
            for layer in flow.flows:
                squeeze = not isinstance(layer, AffineCoupling)
                channels *= 4 if squeeze else 1
                layers.append(nn.PixelUnshuffle(2) if squeeze else Coupling(layer, channels))
            self.levels.append(layers)
            channels //= 2  # a split

    def logit(self, p: Tensor) -> tuple[Tensor, Tensor]:
        p = self.alpha / 2 + (1 - self.alpha) * p
        log_det = math.log(1 - self.alpha) * p[0].numel() - (p.log() + (1 - p).log()).sum((1, 2, 3))
        return p.log() - (1 - p).log(), log_det

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Log-density ``[N]`` of uint8 images with noise in [0, 1), nats."""
        image, log_p = x.to(noise.dtype), 0.0
        if len(self.noise):
            noise, log_p = self.logit(noise)
            for coupling in self.noise:
                noise, log_det = coupling(noise, 2 * image / 255 - 1)
                log_p = log_p + log_det
            log_p = log_p - (F.softplus(noise) + F.softplus(-noise)).sum((1, 2, 3))
            noise = torch.sigmoid(noise)
        z, log_det = self.logit((image + noise) / 256)
        log_p = log_p + log_det - math.log(256) * z[0].numel()
        for i, layers in enumerate(self.levels):
            for layer in layers:
                if isinstance(layer, Coupling):
                    z, log_det = layer(z)
                    log_p = log_p + log_det
                else:
                    z = layer(z)
            if i + 1 < len(self.levels):
                z, out = z.chunk(2, dim=1)
                log_p = log_p + gaussian(out)
        return log_p + gaussian(z)

    def decode(self, latents: tuple[Tensor, ...]) -> Tensor:
        """uint8 images of latents, from the finest to the coarsest."""
        z = latents[-1]
        for i in reversed(range(len(self.levels))):
            if i + 1 < len(self.levels):
                z = torch.cat([z, latents[i]], dim=1)
            for layer in reversed(self.levels[i]):
                z = layer.inverse(z) if isinstance(layer, Coupling) else F.pixel_shuffle(z, 2)
        x = (torch.sigmoid(z) - self.alpha / 2) / (1 - self.alpha)
        return (256 * x).floor().clamp(0, 255).to(torch.uint8)


def gaussian(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum((1, 2, 3))


# measuring ----------------------------------------------------------------------------


def build(variant: str, device: str) -> MNISTFlow:
    """A model in eval mode whose couplings are not the identity."""
    torch.manual_seed(0)
    model = mnist_flow(variant, reversible=False).to(device).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def inputs(model: MNISTFlow, batch: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, tuple]:
    """Images, the noise of seed 1, and latents."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (batch, 1, 28, 28), generator=generator, dtype=torch.uint8).to(device)
    noise = ops.uniform_noise(tuple(x.shape), 1, dtype=dtype, device=device)
    shapes = model.latent_shapes()
    return x, noise, tuple(torch.randn(batch, *s, generator=generator).to(device, dtype) for s in shapes)


@torch.no_grad()
def check(plain: Plain, model: MNISTFlow, given: tuple) -> float:
    """The relative error of log-densities in float64.

    Raises ValueError if it exceeds the tolerance, or if images of the same latents differ by more than 1 of 255
    or in more than 1 of 1000 pixels.
    """
    x, noise, latents = given
    error = harness.relative_error(model.log_prob(x, seed=1), plain(x, noise).double()).item()
    off = (model.decode(latents).int() - plain.decode(latents).int()).abs()
    if not error <= TOLERANCE or off.max() > 1 or (off > 0).float().mean() > 1e-3:
        raise ValueError(
            f"{model.config['variant']}: log-densities are off by {error:.1e}, a pixel by {off.max()}; "
            "no row is written"
        )
    return error


def calls(model: MNISTFlow, options: argparse.Namespace, batch: int) -> dict[str, dict[str, Callable]]:
    """Functions to time, by mode and provider, plain PyTorch first."""
    plain, (x, noise, _) = Plain(model), inputs(model, batch, torch.float32, options.device)
    seed = torch.tensor(1, device=options.device)

    def latents() -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, *shape, device=options.device) for shape in plain.shapes)

    found = {
        "log_prob": {"plain": lambda: plain(x, torch.rand_like(noise))},
        "sample": {"plain": lambda: plain.decode(latents())},
    }
    providers = {"fastflow": model}
    if options.compiled:
        providers[COMPILED] = copy.deepcopy(model)
        providers[COMPILED].compile_networks()
    for name, each in providers.items():
        found["log_prob"][name] = lambda each=each: each.log_prob(x, seed=seed)
        found["sample"][name] = lambda each=each: each.sample(batch)
    return found


@torch.no_grad()
def measure(variant: str, options: argparse.Namespace) -> list[dict]:
    batch = 1 if options.quick else BATCH
    exact = build(variant, options.device).double()
    error = check(Plain(exact), exact, inputs(exact, batch, torch.float64, options.device))
    model, rows = build(variant, options.device), []
    parameters, about = sum(p.numel() for p in model.parameters()), harness.metadata(options.device)
    for mode, each in calls(model, options, batch).items():
        for call in each.values():
            for _ in range(2):  # compiles
                call()
        taken = harness.microseconds(each, options.seconds, options.device)
        for name, (p20, p50, p80) in taken.items():
            row = {"model": variant, "parameters": parameters, "batch": batch, "mode": mode, "provider": name}
            row |= {"p20_ms": f"{p20 / 1e3:.2f}", "p50_ms": f"{p50 / 1e3:.2f}", "p80_ms": f"{p80 / 1e3:.2f}"}
            row |= {"ratio": f"{p50 / taken['plain'][1]:.3f}"}
            rows.append(row | {"error": f"{error:.1e}", "tolerance": f"{TOLERANCE:.0e}"} | about)
    return rows


def table(rows: list[dict]) -> str:
    """A line for each model and mode, with the tutorial's printed times."""
    lines, providers = {}, list(dict.fromkeys(row["provider"] for row in rows))
    for row in rows:
        cell = f"{row['p50_ms']} ({row['p20_ms']} to {row['p80_ms']})"
        lines.setdefault((row["model"], row["mode"]), {})[row["provider"]] = cell
    body = [
        [model, mode, *(cells.get(name, "") for name in providers), str(PUBLISHED[model][MODES.index(mode)])]
        for (model, mode), cells in lines.items()
    ]
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    head = ["model", f"milliseconds per batch of {rows[0]['batch']}", *providers, "tutorial"]
    return f"{page.table(head, body)}\n\n(p50, in parentheses p20 to p80; {about}; the tutorial: a GPU that it does not name)"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of models.md")
        parser.set_defaults(seconds=20.0)

    options, rows = harness.arguments(__doc__, argv, add), []
    keep_memory()
    for variant in tqdm(VARIANTS, desc="mnist_flows"):
        found = measure(variant, options)
        harness.append(options.results / "mnist_flows.csv", found)
        rows += found
    found = table(rows)
    page.write(options.docs / "models.md", {"mnist_flows": found})
    print(found)
    return rows


if __name__ == "__main__":
    main()
