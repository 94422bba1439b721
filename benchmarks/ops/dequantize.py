"""Times dequantization with its log-det and its inverse, and plain PyTorch.

    python -m benchmarks.ops.dequantize

Rows go to results/dequantize.csv; the shape is N x C x H x W of x, uint8. The noise is an argument, so that
all providers compute the same; the kernel reads less when it draws the noise itself. ``glow`` maps to
[-1/2, 1/2), ``logit`` is RealNVP's map with alpha 0.05. The gradient is by the noise.
"""

import argparse
import functools
import math

import torch
import torch.nn.functional as F

from benchmarks.tools import harness
from fastflow import ops
from fastflow.ops.spec import bytes_per_element

VARIANTS = {"glow": "affine", "logit": "logit"}  # names in the op's spec
MAPS = {"glow": {"scale": 1.0, "shift": -0.5}, "logit": {"scale": 0.95, "shift": 0.05, "logit": True}}


def dequantize(x, noise, *, scale, shift, logit=False):
    p = (x + noise) * (scale / 256) + shift
    log_det = torch.full((len(x),), x[0].numel() * math.log(scale / 256), dtype=p.dtype, device=p.device)
    if not logit:
        return p, log_det
    # 1 - p from the distance to the last bin's end: 1 - p of the rounded p has lost digits
    q = (256 - x.to(p.dtype) - noise) * (scale / 256) + (1 - scale - shift)
    log_p, log_q = p.log(), q.log()
    return log_p - log_q, log_det - (log_p + log_q).flatten(1).sum(1)


def inverse(y, *, scale, shift, logit=False):
    p = torch.sigmoid(y) if logit else y
    log_det = torch.full((len(y),), -y[0].numel() * math.log(scale / 256), dtype=y.dtype, device=y.device)
    if logit:
        log_det = log_det - (F.softplus(y) + F.softplus(-y)).flatten(1).sum(1)
    return ((p - shift) * (256 / scale)).floor().clamp(0, 255).to(torch.uint8), log_det


def _called(op, **given):
    return lambda x, noise: op(x, noise=noise, **given)


def of_size(n: int, c: int, side: int, name: str) -> list[harness.Case]:
    def image():
        return torch.randint(0, 256, (n, c, side, side), dtype=torch.uint8)

    def latent():  # at the centres of bins, from where rounding reaches no other
        return ops.dequantize(image(), noise=torch.full((n, c, side, side), 0.5), **MAPS[name])[0]

    elements = n * c * side * side
    about = {"shape": f"{n}x{c}x{side}x{side}", "dtype": torch.float32}
    forward = {
        "eager": functools.partial(dequantize, **MAPS[name]),
        "fastflow": _called(ops.dequantize, **MAPS[name]),
    }
    backward = {
        "eager": functools.partial(inverse, **MAPS[name]),
        "fastflow": functools.partial(ops.dequantize_inverse, **MAPS[name]),
    }
    noise = {
        "inputs": lambda: (image(), torch.rand(n, c, side, side)),
        "gradients_of": (1,),
        "bytes_moved": bytes_per_element("dequantize", f"{VARIANTS[name]} noise") * elements,
    }
    return [
        harness.Case(name, providers=forward, **noise, **about),
        harness.Case(
            f"{name}, inverse",
            inputs=lambda: (latent(),),
            providers=backward,
            bytes_moved=bytes_per_element("dequantize_inverse", VARIANTS[name]) * elements,
            **about,
        ),
    ]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    larger = 64 if options.device == "cpu" else 4096
    sizes = [(2, 3, 4)] if options.quick else [(64, 3, 32), (larger, 3, 64)]
    return [case for size in sizes for name in MAPS for case in of_size(*size, name)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("dequantize", __doc__, cases, argv)


if __name__ == "__main__":
    main()
