"""Measures host time per call of each op on tiny tensors: Python, dispatcher, checks, allocation, autograd.

    python -m benchmarks.tools.overhead

Rows go to results/overhead.csv: the least CPU time of the process per call, in microseconds, over many
repeats. The time of the kernels is not in it on a GPU, and hardly is on a CPU. To compare versions, run the
file itself with the interpreter of each; it measures the FastFlow that is installed there:

    OTHER/.venv/bin/python benchmarks/tools/overhead.py --results FOLDER
"""

import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastflow import ops

if not __package__:  # run as a file; after fastflow was imported, so that this checkout's does not come first
    sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.tools import harness, page  # noqa: E402

REPEATS, CALLS = 200, 100


def calls(device: str) -> dict[str, tuple[Callable, tuple[Tensor, ...], tuple[int, ...]]]:
    """For each op a function, its tensors, and the places of those that backward differentiates by."""
    n, c, side = 2, 4, 2
    x, h, dy = (torch.randn(n, c, side, side, device=device) for _ in range(3))
    channel, dlog_det = torch.ones(c, device=device), torch.ones(n, device=device)
    eye, signs = torch.eye(c, device=device), torch.ones(1, c, device=device)
    pixels = torch.zeros(n, c, side, side, dtype=torch.uint8, device=device)
    seed = torch.tensor(0, device=device)
    perm = torch.arange(c, device=device)[None]
    # 0.1.0 names them squeeze and unsqueeze
    squeeze2d, unsqueeze2d = (
        getattr(ops, f"{name}2d", None) or getattr(ops, name) for name in ("squeeze", "unsqueeze")
    )
    # 0.1.0 has none
    later = {"bias_relu": (ops.bias_relu, (x, channel), (0, 1))} if hasattr(ops, "bias_relu") else {}
    if hasattr(ops, "glow_network"):
        w1, w2, w3 = (torch.ones(c, c, k, k, device=device) for k in (3, 1, 3))
        later["glow_network"] = ops.glow_network, (x, w1, channel, w2, channel, w3, channel), tuple(range(7))
    if hasattr(ops, "mixture_cdf"):
        params = torch.ones(n, 5 * c, side, side, device=device)  # one component
        later["mixture_cdf"] = lambda x, h: ops.mixture_cdf(x, h, components=1), (x, params), (0, 1)
        later["mixture_cdf_inverse_backward"] = (
            lambda y, h, dy, dlog_det: ops.mixture_cdf_inverse_backward(
                y, h, None, dy, dlog_det, components=1
            ),
            (x, params, dy, dlog_det),
            (),
        )
    if hasattr(ops, "spline"):
        params = torch.ones(n, 2 * c, side, side, device=device)  # one bin
        later["spline"] = lambda x, h: ops.spline(x, h, bins=1), (x, params), (0, 1)
        later["spline_inverse_backward"] = (
            lambda y, h, dy, dlog_det: ops.spline_inverse_backward(y, h, None, dy, dlog_det, bins=1),
            (x, params, dy, dlog_det),
            (),
        )
    if hasattr(ops, "masked_inverse"):
        from fastflow.ops.masked_inverse import Affine

        z, jac = torch.ones(n, 1, device=device), torch.ones(n, 1, 2, device=device)
        weights, added = torch.ones(3, device=device), torch.ones(3, device=device)
        ends, order = (torch.arange(1, device=device) + i for i in (1, 0))
        network = {"ends": ends[None], "widths": [1], "layers": [4, 0]}
        later["masked_inverse"] = (
            lambda z, w, a: ops.masked_inverse(z, w, a, order=order, transformer=Affine(), **network),
            (z, weights, added),
            (0, 1, 2),
        )
        parameters, places = torch.ones(6, device=device), torch.arange(6, device=device)[None]
        several = {
            "places": places,
            "ends": ends[None, None],
            "order": order[None],
            "widths": [1],
            "layers": [4, 0],
        }
        later["masked_inverses"] = (
            lambda z, p: ops.masked_inverses(z, p, transformer=Affine(), **several),
            (z, parameters),
            (),
        )
        later["masked_solve"] = (
            lambda v, slope, jac, w: ops.masked_solve(v, slope, jac, weights=w, **network),
            (z, z, jac, weights),
            (),
        )
    if hasattr(ops, "residual_network"):
        shapes = (1, 1), (1,), (1, 1), (1,)
        layers = [torch.ones(s, device=device) for s in shapes]
        later["residual_network"] = (
            lambda z, *layers: ops.residual_network(z, None, layers, blocks=0)[0],
            (torch.ones(n, 1, device=device), *layers),
            (0, 1, 2, 3, 4),
        )
    return later | {
        "actnorm": (ops.actnorm, (x, channel, channel), (0, 1, 2)),
        "actnorm_inverse_backward": (ops.actnorm_inverse_backward, (x, channel, channel, dy, dlog_det), ()),
        "actnorm_statistics": (ops.actnorm_statistics, (x,), ()),
        "affine_coupling": (ops.affine_coupling, (x, h), (0, 1)),
        "affine_coupling_inverse_backward": (
            lambda y, h, dy, dlog_det: ops.affine_coupling_inverse_backward(y, h, None, dy, dlog_det),
            (x, h, dy, dlog_det),
            (),
        ),
        "conv1x1": (ops.conv1x1, (x, eye, channel), (0, 1, 2)),
        "conv1x1_inverse_backward": (ops.conv1x1_inverse_backward, (x, eye, eye, channel, dy), ()),
        "dequantize": (lambda pixels, seed: ops.dequantize(pixels, seed=seed), (pixels, seed), ()),
        "dequantize_inverse": (ops.dequantize_inverse, (x,), ()),
        "gaussian_log_prob": (ops.gaussian_log_prob, (x,), (0,)),
        "gaussian_sample": (lambda seed: ops.gaussian_sample(x.shape, seed=seed), (seed,), ()),
        "lu_weight": (ops.lu_weight, (perm, eye[None], eye[None], signs, signs), (1, 2, 3)),
        "squeeze2d": (squeeze2d, (x,), (0,)),
        "triangular_solve": (
            lambda A, B: ops.triangular_solve(A, B, upper=True),
            (eye[None], x[0].flatten(1)[None]),
            (0, 1),
        ),
        "uniform_noise": (lambda seed: ops.uniform_noise(x.shape, seed=seed), (seed,), ()),
        "unsqueeze2d": (unsqueeze2d, (x,), (0,)),
    }


def with_backward(function: Callable, args: tuple[Tensor, ...], places: tuple[int, ...]) -> Callable:
    """The call and the gradients of its outputs by the arguments at ``places``."""
    args = [v.detach().clone().requires_grad_(i in places) for i, v in enumerate(args)]
    leaves = [args[i] for i in places]
    out = function(*args)
    upstream = [torch.ones_like(v) for v in (out if isinstance(out, tuple) else (out,))]

    def call() -> None:
        out = function(*args)
        torch.autograd.grad(out, leaves, upstream)

    return call


def microseconds(call: Callable, device: str, repeats: int) -> float:
    """The least CPU time of one call; a GPU's queue is emptied before each repeat."""
    call()
    empty_queue = torch.cuda.synchronize if device == "cuda" else "pass"
    found = timeit.repeat(call, empty_queue, timer=time.process_time, repeat=repeats, number=CALLS)
    return 1e6 * min(found) / CALLS


def main(argv: list[str] | None = None) -> list[dict]:
    options = harness.arguments(__doc__, argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about, rows = harness.metadata(options.device), []
    for op, (function, args, places) in tqdm(calls(options.device).items(), desc="overhead"):
        timed = {"forward": lambda f=function, a=args: f(*a)}
        if places:
            timed["forward+backward"] = with_backward(function, args, places)
        for mode, call in timed.items():
            with torch.set_grad_enabled(mode != "forward"):
                us = microseconds(call, options.device, 2 if options.quick else REPEATS)
            rows.append({"name": "overhead", "op": op, "mode": mode, "us": f"{us:.2f}"} | about)
    harness.append(options.results / "overhead.csv", rows)
    print(page.table(["op", "mode", "us per call"], [[r["op"], r["mode"], r["us"]] for r in rows]))
    print("\n{device}, torch {torch}, FastFlow {fastflow}, commit {commit}".format(**about))
    return rows


if __name__ == "__main__":
    main()
