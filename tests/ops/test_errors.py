"""Bad input is a ValueError that names the argument, what came and what was expected."""

import re

import pytest
import torch
from torch import nn

from fastflow import ops
from fastflow.models import Glow
from fastflow.nn import (
    MLP,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Dequantize,
    Flatten,
    GlowNetwork,
    InvertibleConv1x1,
    LogitDequantize,
    Permute,
    Scale,
    Sequential,
    Split,
    Squeeze,
)
from fastflow.ops.masked_inverse import AFTER, BEFORE, GATE, SKIP, Affine, Spline

F64, META = torch.float64, torch.device("meta")


def x_(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def u8(*shape, value=0, device="cpu"):
    return torch.full(shape, value, dtype=torch.uint8, device=device)


def glow(**kwargs):
    return Glow(**{"image_shape": (3, 4, 4), "levels": 1, "steps": 1, "hidden": 4, **kwargs}).eval()


def coupling(x, h, factor=None, **variant):
    return lambda: ops.affine_coupling(x, h, factor, **variant)


def mixture(x=None, params=None, order=None, **other):
    x, params = x_(2, 4) if x is None else x, x_(2, 4 * 8) if params is None else params
    return lambda: ops.mixture_cdf(x, params, order, **{"components": 2, **other})


def masked(features=3, context=False, **wrong):
    """Two samples, hidden layers of 4 and 4 units, the second one a gated residual sum."""
    args = {
        "z": x_(2, features),
        "weights": x_(4 * features + 4 * 4 + 4 * 4 + 2 * features * 4),
        "added": x_(2, 12 + 2 * features),
        "gates": x_(2, 4),
        "ends": torch.full((3, features), 4),
        "order": torch.arange(features),
        "widths": [4, 4, 4],
        "layers": [0, BEFORE, BEFORE | GATE | SKIP, BEFORE],
        "transformer": Affine(),
    }
    return lambda: ops.masked_inverse(**{**args, **wrong})


def masked_inverses(**wrong):
    """Two transformations, one hidden layer of 4 units, a context of 2 features."""
    args = {
        "z": x_(2, 3),
        "parameters": x_(100),
        "context": x_(2, 2),
        "places": torch.zeros(2, 3 * 4 + 4 * 6 + 4 * 2 + 4 + 6, dtype=torch.int64),
        "ends": torch.full((2, 1, 3), 4),
        "order": torch.arange(3).expand(2, -1),
        "widths": [4],
        "layers": [AFTER, 0],
        "transformer": Affine(),
    }
    return lambda: ops.masked_inverses(**{**args, **wrong})


def masked_solve(**wrong):
    args = {
        "v": x_(2, 3),
        "slope": x_(2, 3),
        "jac": x_(2, 3, 2),
        "weights": x_(3 * 4 + 4 * 6),
        "ends": torch.full((1, 3), 4),
        "widths": [4],
        "layers": [AFTER, 0],
    }
    return lambda: ops.masked_solve(**{**args, **wrong})


def residual(x=None, context=None, parameters=None, **other):
    shapes = (5, 3), (5,), (5, 5), (5,), (5, 5), (5,), (2, 5), (2,)
    given = [x_(*shape) for shape in shapes] if parameters is None else parameters
    return lambda: ops.residual_network(
        x_(20, 3) if x is None else x, context, given, **{"blocks": 1, **other}
    )


def spline(x=None, params=None, order=None, **other):
    x, params = x_(2, 4) if x is None else x, x_(2, 4 * 8) if params is None else params
    return lambda: ops.spline(x, params, order, **{"bins": 3, **other})


def network(**wrong):
    args = {
        "x": x_(2, 3, 4, 4),
        "w1": x_(5, 3, 3, 3),
        "b1": x_(5),
        "w2": x_(5, 5, 1, 1),
        "b2": x_(5),
        "w3": x_(6, 5, 3, 3),
        "b3": x_(6),
    }
    return lambda: ops.glow_network(**{**args, **wrong})


def lu(**wrong):
    args = {
        "perm": torch.arange(3).expand(2, 3),
        "lower": x_(2, 3, 3),
        "upper": x_(2, 3, 3),
        "log_s": x_(2, 3),
        "sign_s": x_(2, 3),
    }
    return lambda: ops.lu_weight(**{**args, **wrong})


def latents(model, *wrong):
    return lambda: model.decode(wrong)


NAN = torch.full((2, 12, 2, 2), torch.nan)
IMAGES = r"uint8 images \[N, 3, 4, 4\] with values in \[0, 256\)"

OPS = {
    # affine coupling
    "odd channels": (
        coupling(x_(2, 3, 2, 2), x_(2, 3, 2, 2)),
        r"x: got shape \[2, 3, 2, 2\], expected an even number of channels",
    ),
    "h of another size": (
        coupling(x_(2, 4), x_(2, 5)),
        r"params: got shape \[2, 5\], expected \[2, 4\] \(x is \[2, 4\], halves, shift and scale of 2",
    ),
    "h of an additive coupling": (
        coupling(x_(2, 4), x_(2, 4), scale="none"),
        r"params: got shape \[2, 4\], expected \[2, 2\] .*halves, shift of 2",
    ),
    "h of a checkerboard": (
        coupling(x_(2, 4), x_(2, 4), mask="checkerboard"),
        r"params: got shape \[2, 4\], expected \[2, 8\]",
    ),
    "h's dtype": (
        coupling(x_(2, 4), x_(2, 4, dtype=F64)),
        r"params: got dtype torch.float64, expected torch.float32, the dtype of x",
    ),
    "h of integers": (
        coupling(x_(2, 4), x_(2, 4, dtype=torch.int64)),
        r"params: got dtype torch.int64, expected torch.float32",
    ),
    "h's device": (
        coupling(x_(2, 4), x_(2, 4, device=META)),
        r"params: got device meta, expected cpu, the device of x",
    ),
    "x of integers": (
        coupling(u8(2, 4), x_(2, 4)),
        r"x: got dtype torch.uint8, expected a floating point tensor",
    ),
    "x without a batch": (coupling(x_(4), x_(4)), r"x: got shape \[4\], expected a batch \[N, C, ...\]"),
    "no factor": (
        coupling(x_(2, 4), x_(2, 4), scale="tanh"),
        r"factor: got None, expected one for soft_clamp and tanh only",
    ),
    "superfluous factor": (
        coupling(x_(2, 4), x_(2, 4), x_(2)),
        r"factor: got a tensor, expected one for .* scale is 'exp'",
    ),
    "factor's size": (
        coupling(x_(2, 4), x_(2, 4), x_(4), scale="tanh"),
        r"factor: got shape \[4\], expected \[2\], one for each transformed",
    ),
    "factor's device": (
        coupling(x_(2, 4), x_(2, 4), x_(2, device=META), scale="tanh"),
        r"factor: got device meta, expected cpu",
    ),
    **{
        f"name of {k}": (coupling(x_(2, 4), x_(2, 4), **{k: "other"}), f"{k}: got 'other', expected one of '")
        for k in ("mask", "scale", "affine_order", "params_layout")
    },
    "dy's shape": (
        lambda: ops.affine_coupling_inverse_backward(x_(2, 4), x_(2, 4), None, x_(2, 3), x_(2)),
        r"dy: got shape \[2, 3\], expected \[2, 4\] \(like y\)",
    ),
    "dlog_det's shape": (
        lambda: ops.actnorm_inverse_backward(x_(2, 4), x_(4), x_(4), x_(2, 4), x_()),
        r"dlog_det: got shape \[\], expected \[2\] \(one value per sample\)",
    ),
    # the rest, channel by channel
    "actnorm's bias": (
        lambda: ops.actnorm(x_(2, 4), x_(4), x_(3)),
        r"bias: got shape \[3\], expected \[4\], one for each channel of x",
    ),
    "actnorm's dtypes": (
        lambda: ops.actnorm(x_(2, 4, dtype=F64), x_(4), x_(4)),
        r"log_scale: got dtype torch.float32, expected torch.float64",
    ),
    "actnorm's devices": (
        lambda: ops.actnorm(x_(2, 4), x_(4), x_(4, device=META)),
        r"bias: got device meta, expected cpu, the device of x",
    ),
    "bias_relu's bias": (
        lambda: ops.bias_relu(x_(2, 4), x_(3)),
        r"bias: got shape \[3\], expected \[4\], one for each channel of x",
    ),
    "bias_relu's dtypes": (
        lambda: ops.bias_relu(x_(2, 4), x_(4, dtype=F64)),
        r"bias: got dtype torch.float64, expected torch.float32, the dtype of x",
    ),
    "bias_relu's devices": (
        lambda: ops.bias_relu(x_(2, 4), x_(4, device=META), inplace=True),
        r"bias: got device meta, expected cpu, the device of x",
    ),
    "bias_relu of integers": (
        lambda: ops.bias_relu(u8(2, 4), x_(4), inplace=True),
        r"x: got dtype torch.uint8, expected a floating point tensor",
    ),
    "bias_relu of a vector": (
        lambda: ops.bias_relu(x_(4), x_(4)),
        r"x: got shape \[4\], expected a batch \[N, C, ...\]",
    ),
    "bias_relu over an expanded tensor": (
        lambda: ops.bias_relu(x_(1, 4).expand(2, 4), x_(4), inplace=True),
        r"x: got an expanded tensor, expected one without shared memory",
    ),
    "bias_relu over a leaf": (
        lambda: ops.bias_relu(x_(2, 4).requires_grad_(), x_(4), inplace=True),
        r"x: got a leaf that requires a gradient, expected a computed tensor",
    ),
    "bias_relu over a view of a leaf": (
        lambda: ops.bias_relu(x_(2, 8).requires_grad_().chunk(2, dim=1)[1], x_(4), inplace=True),
        r"x: got a leaf that requires a gradient, expected a computed tensor",
    ),
    "masked inverse of images": (
        masked(z=x_(2, 3, 1)),
        r"z: got shape \[2, 3, 1\], expected vectors \[N, D\]",
    ),
    "masked inverse of nothing": (masked(z=x_(2, 0)), r"z: got shape \[2, 0\], expected .* D at least 1"),
    "masked inverse in half precision": (
        masked(z=x_(2, 3, dtype=torch.bfloat16)),
        r"z: got dtype torch.bfloat16, expected float32 or float64",
    ),
    "masked inverse's weights": (
        masked(weights=x_(5)),
        r"weights: got shape \[5\], expected \[68\] \(the matrices of layers of 3, 4, 4, 4, 6\)",
    ),
    "masked inverse's dtypes": (
        masked(weights=x_(68, dtype=F64)),
        r"weights: got torch.float64 on cpu, expected torch.float32 on cpu, like z",
    ),
    "masked inverse's biases": (
        masked(added=x_(17)),
        r"added: got shape \[17\], expected \[18\] \(units of the hidden layers, parameters\)",
    ),
    "masked inverse's context": (masked(added=x_(3, 18)), r"added: got shape \[3, 18\], expected \[2, 18\]"),
    "masked inverse's devices": (
        masked(added=x_(18, device=META)),
        r"added: got torch.float32 on meta, expected torch.float32 on cpu",
    ),
    "masked inverse without gates": (
        masked(gates=None),
        r"gates: got None, expected \[2, 4\] for the gated layers",
    ),
    "masked inverse's superfluous gates": (
        masked(layers=[0, 0, 0, 0]),
        r"gates: got a tensor, expected None, no layer is gated",
    ),
    "masked inverse's gates": (masked(gates=x_(2, 8)), r"gates: got shape \[2, 8\], expected \[2, 4\]"),
    "masked inverse's ends": (
        masked(ends=torch.full((2, 3), 4)),
        r"ends: got shape \[2, 3\], expected \[3, 3\] \(hidden layers, features\)",
    ),
    "masked inverse's integers": (
        masked(ends=torch.full((3, 3), 4, dtype=torch.int32)),
        r"ends: got torch.int32 on cpu, expected torch.int64 on cpu, the device of z",
    ),
    "masked inverse's order": (
        masked(order=torch.arange(4)),
        r"order: got shape \[4\], expected \[3\], a perm",
    ),
    "masked inverse's order of floats": (
        masked(order=x_(3)),
        r"order: got torch.float32 on cpu, expected torch.int64 on cpu",
    ),
    "masked inverse's width": (masked(widths=[4, 0, 4]), r"widths\[1\]: got 0, expected a positive integer"),
    "masked inverse's layers": (
        masked(layers=[0, 0]),
        r"layers: got \[0, 0\], expected 4 numbers, one for each of 3 hidden layers and the output",
    ),
    "masked inverse's first layer": (
        masked(layers=[BEFORE, 0, 0, 0]),
        r"layers\[0\]: got 1, expected a sum of some of the bits of 6",
    ),
    "masked inverse's last layer": (
        masked(layers=[0, 0, 0, AFTER]),
        r"layers\[3\]: got 4, expected a sum of some of the bits of 1",
    ),
    "masked inverse's residual sum": (
        masked(widths=[5, 4, 4]),
        r"widths\[2\]: got 4, expected 5, the width that is added to it",
    ),
    "masked inverse's activation": (
        masked(activation="gelu"),
        r"activation: got 'gelu', expected one of 'relu'",
    ),
    **{
        f"masked inverse's {k}": (
            masked(transformer=Affine(**{k: v})),
            f"{k}: got {v!r}, expected {expected}",
        )
        for k, v, expected in (
            ("scale", "none", "one of 'exp'"),
            ("affine_order", "first", "one of 'scale_first'"),
            ("params_layout", "interleaved", "one of 'scale_shift'"),
            ("factor", 0.0, "a positive number"),
            ("offset", -1.0, "a number of at least 0"),
        )
    },
    "masked inverse's spline": (
        masked(transformer=Spline(tails="affine")),
        r"tails: got 'affine', expected one of 'linear'",
    ),
    "masked inverses' vectors": (masked_inverses(z=x_(3)), r"z: got shape \[3\], expected vectors \[N, D\]"),
    "masked inverses' number": (
        masked_inverses(ends=torch.full((1, 3), 4)),
        r"ends: got shape \[1, 3\], expected \[M, L, D\], M at least 1",
    ),
    "masked inverses' ends": (
        masked_inverses(ends=torch.full((2, 2, 3), 4)),
        r"ends: got shape \[2, 2, 3\], expected \[2, 1, 3\]",
    ),
    "masked inverses' places": (
        masked_inverses(context=None),
        r"places: got shape \[2, 54\], expected \[2, 46\]",
    ),
    "masked inverses' places' dtype": (
        masked_inverses(places=x_(2, 54)),
        r"places: got torch.float32 on cpu, expected torch.int64 on cpu",
    ),
    "a place of masked inverses": (
        masked_inverses(places=torch.full((2, 54), 100)),
        "places: got 100, expected -1 to 99",
    ),
    "masked inverses' order": (
        masked_inverses(order=torch.arange(3)),
        r"order: got shape \[3\], expected \[2, 3\]",
    ),
    "masked inverses' context": (
        masked_inverses(context=x_(3, 2)),
        r"context: got shape \[3, 2\], expected \[2, 2\] \(one row for each sample\)",
    ),
    "masked inverses' context's dimensions": (
        masked_inverses(context=x_(2)),
        r"context: got shape \[2\], expected \[2, C\]",
    ),
    "masked inverses' parameters": (
        masked_inverses(parameters=x_(10, 10)),
        r"parameters: got shape \[10, 10\], expected a vector",
    ),
    "masked inverses' dtypes": (
        masked_inverses(parameters=x_(100, dtype=F64)),
        "parameters: got torch.float64 on cpu, expected torch.float32",
    ),
    "masked inverses' gates": (
        masked_inverses(layers=[GATE, 0]),
        r"layers: got \[2, 0\], expected no layer with gates",
    ),
    "masked solve's vectors": (masked_solve(v=x_(3)), r"v: got shape \[3\], expected vectors \[N, D\]"),
    "masked solve's slope": (
        masked_solve(slope=x_(2, 2)),
        r"slope: got shape \[2, 2\], expected \[2, 3\] \(like v\)",
    ),
    "masked inverse's waves": (masked(waves=x_(3, 4)), r"waves: got shape \[3, 4\], expected \[4, 3\]"),
    "masked solve's slopes of features": (
        masked_solve(of_features=x_(2, 4)),
        r"of_features: got shape \[2, 4\], expected \[2, 3\]",
    ),
    "masked solve's jac": (masked_solve(jac=x_(2, 3)), r"jac: got shape \[2, 3\], expected \[2, 3, P\]"),
    "masked solve's samples": (
        masked_solve(jac=x_(1, 3, 2)),
        r"jac: got shape \[1, 3, 2\], expected \[2, 3, 2\]",
    ),
    "masked solve's units": (
        masked_solve(outer=x_(2, 5)),
        r"outer: got shape \[2, 5\], expected \[2, 4\] \(samples, hidden units\)",
    ),
    "masked solve's dtypes": (
        masked_solve(dparams=x_(2, 3, 2, dtype=F64)),
        r"dparams: got torch.float64 on cpu, expected torch.float32",
    ),
    "residual network of images": (
        residual(x_(2, 3, 4, 4)),
        r"x: got shape \[2, 3, 4, 4\], expected vectors",
    ),
    "residual network of bfloat16": (
        residual(x_(20, 3).bfloat16()),
        r"x: got dtype torch.bfloat16, expected float32",
    ),
    "residual network's blocks": (residual(blocks=-1), r"blocks: got -1, expected an integer of at least 0"),
    "residual network's activation": (
        residual(activation="gelu"),
        r"activation: got 'gelu', expected one of 'relu'",
    ),
    "residual network's eps": (residual(eps=0.0), r"eps: got 0.0, expected a positive number"),
    "residual network's context": (
        residual(context=x_(19, 2)),
        r"context: got shape \[19, 2\], expected \[20, features\]",
    ),
    "residual network's dtypes": (
        residual(context=x_(20, 2, dtype=F64)),
        r"context: got torch.float64 on cpu, expected torch.float32 on cpu, like x",
    ),
    "residual network without layers": (
        residual(parameters=[x_(5, 3), x_(5)]),
        r"parameters: got 2 tensors, expected weights and biases of at least two linear layers",
    ),
    "residual network's layers": (residual(blocks=2), r"parameters: got 8 tensors, expected 12 for 2 blocks"),
    "residual network's weights": (
        residual(x_(20, 4)),
        r"parameters\[0\]: got shape \[5, 3\], expected \[5, 4\] \(5 hidden units\)",
    ),
    "residual network's parameters in float64": (
        residual(parameters=[x_(*s, dtype=F64) for s in ((5, 3), (5,), (2, 5), (2,))], blocks=0),
        r"parameters\[0\]: got torch.float64 on cpu, expected torch.float32",
    ),
    "residual network's statistics": (
        residual(running=[x_(5)]),
        r"running: got 1 tensors, expected none or 0, a mean and a variance",
    ),
    "residual network of a sample": (
        residual(
            x_(1, 3),
            None,
            [x_(5, 3), x_(5), *[x_(5), x_(5), x_(5, 5), x_(5)] * 2, x_(2, 5), x_(2)],
            batch_norm=True,
        ),
        r"x: got one sample, expected at least 2",
    ),
    "network's vectors": (network(x=x_(2, 3)), r"x: got shape \[2, 3\], expected images \[N, C, H, W\]"),
    "network of integers": (
        network(x=u8(2, 3, 4, 4)),
        r"x: got dtype torch.uint8, expected a floating point tensor",
    ),
    "network's channels": (
        network(x=x_(2, 4, 4, 4)),
        r"w1: got shape \[5, 3, 3, 3\], expected \[5, 4, 3, 3\] \(x has 4 channels, w1 5 outputs\)",
    ),
    "network's 3x3 weight": (
        network(w1=x_(5, 3, 1, 1)),
        r"w1: got shape \[5, 3, 1, 1\], expected \[5, 3, 3, 3\]",
    ),
    "network's 1x1 weight": (network(w2=x_(5, 6)), r"w2: got shape \[5, 6\], expected \[5, 5\]"),
    "network's last weight": (
        network(w3=x_(6, 4, 3, 3)),
        r"w3: got shape \[6, 4, 3, 3\], expected \[6, 5, 3, 3\]",
    ),
    "network's bias": (network(b2=x_(4)), r"b2: got shape \[4\], expected \[5\], one for each output of w2"),
    "network's last bias": (
        network(b3=x_(5)),
        r"b3: got shape \[5\], expected \[6\], one for each output of w3",
    ),
    "network's dtypes": (
        network(w3=x_(6, 5, 3, 3, dtype=torch.bfloat16)),
        r"w3: got dtype torch.bfloat16, expected torch.float32, the dtype of x",
    ),
    "network's bias in float64": (
        network(b1=x_(5, dtype=F64)),
        r"b1: got dtype torch.float64, expected torch.float32, the dtype of x",
    ),
    "network's devices": (
        network(w2=x_(5, 5, device=META)),
        r"w2: got device meta, expected cpu, the device of x",
    ),
    "statistics of integers": (
        lambda: ops.actnorm_statistics(u8(2, 4)),
        r"x: got dtype torch.uint8, expected a floating point tensor",
    ),
    "odd height": (
        lambda: ops.squeeze2d(x_(2, 3, 5, 4)),
        r"x: got shape \[2, 3, 5, 4\], expected an even height and width",
    ),
    "odd width": (
        lambda: ops.squeeze2d(x_(2, 3, 4, 5)),
        r"x: got shape \[2, 3, 4, 5\], expected an even height and width",
    ),
    "squeeze of vectors": (
        lambda: ops.squeeze2d(x_(2, 4)),
        r"x: got shape \[2, 4\], expected images \[N, C, H, W\]",
    ),
    "unsqueeze of 6 channels": (
        lambda: ops.unsqueeze2d(x_(2, 6, 2, 2)),
        r"x: got shape \[2, 6, 2, 2\], expected a number of channels divisible by 4",
    ),
    "squeeze order": (
        lambda: ops.squeeze2d(x_(2, 3, 4, 4), "rows"),
        r"order: got 'rows', expected one of 'channel', 'space', 'realnvp'",
    ),
    "weight's shape": (
        lambda: ops.conv1x1(x_(2, 4), x_(4, 3)),
        r"weight: got shape \[4, 3\], expected \[4, 4\] \(x has 4 channels\)",
    ),
    "weight's dtype": (
        lambda: ops.conv1x1(x_(2, 4), x_(4, 4, dtype=F64)),
        r"weight: got dtype torch.float64, expected torch.float32",
    ),
    "weight's device": (
        lambda: ops.conv1x1(x_(2, 4), x_(4, 4, device=META)),
        r"weight: got device meta, expected cpu",
    ),
    "convolution's bias": (
        lambda: ops.conv1x1(x_(2, 4), x_(4, 4), x_(5)),
        r"bias: got shape \[5\], expected \[4\]",
    ),
    "mean's shape": (
        lambda: ops.gaussian_log_prob(x_(2, 3, 2, 2), x_(2)),
        r"mean: got shape \[2\], expected \[2, 3, 2, 2\] like z, or \[3\]",
    ),
    "log_scale's dtype": (
        lambda: ops.gaussian_log_prob(x_(2, 3), None, x_(3, dtype=F64)),
        r"log_scale: got dtype torch.float64, expected",
    ),
    "mean's device": (
        lambda: ops.gaussian_log_prob(x_(2, 3), x_(3, device=META)),
        r"mean: got device meta, expected cpu, the device of z",
    ),
    "sample's mean": (
        lambda: ops.gaussian_sample((2, 3), x_(4), seed=1),
        r"mean: got shape \[4\], expected \[2, 3\] like z, or \[3\]",
    ),
    "sample's devices": (
        lambda: ops.gaussian_sample((2, 3), x_(3), x_(3, device=META), seed=1),
        r"log_scale: got device meta, expected cpu",
    ),
    "seed's dtype": (
        lambda: ops.uniform_noise((2, 3), seed=torch.tensor(1.0)),
        r"seed: got torch.float32 of shape \[\], expected an int",
    ),
    "seed's shape": (
        lambda: ops.uniform_noise((2, 3), seed=torch.tensor([1, 2])),
        r"seed: got torch.int64 of shape \[2\], expected an int",
    ),
    # mixtures
    "mixture of integers": (mixture(u8(2, 4)), r"x: got dtype torch.uint8, expected a floating point tensor"),
    "mixture's parameters": (
        mixture(params=x_(2, 31)),
        r"params: got shape \[2, 31\], expected \[2, 8 T\] \(x is \[2, 4\]; 8 parameters .* 2 components\)",
    ),
    "mixture's dtypes": (
        mixture(params=x_(2, 32, dtype=F64)),
        r"params: got dtype torch.float64, expected torch.float32, the dtype of x",
    ),
    "mixture's channel_order": (
        mixture(order=torch.arange(3)),
        r"channel_order: got shape \[3\], expected \[4\], a permutation of the channels",
    ),
    "mixture's first_channel": (
        mixture(params=x_(2, 16), first_channel=3),
        r"first_channel: got 3, expected an index from 0 to 2, of the first of 2 transformed channels of 4",
    ),
    "components": (mixture(components=0), r"components: got 0, expected a positive integer"),
    "mixture's dy": (
        lambda: ops.mixture_cdf_inverse_backward(x_(2, 4), x_(2, 32), None, x_(2, 3), x_(2), components=2),
        r"dy: got shape \[2, 3\], expected \[2, 4\] \(like y\)",
    ),
    "mixture's dlog_det": (
        lambda: ops.mixture_cdf_inverse_backward(x_(2, 4), x_(2, 32), None, x_(2, 4), x_(2, 1), components=2),
        r"dlog_det: got shape \[2, 1\], expected \[2\] \(one value per sample\)",
    ),
    # splines
    "spline of integers": (spline(u8(2, 4)), r"x: got dtype torch.uint8, expected a floating point tensor"),
    "spline without a batch": (spline(x_(4)), r"x: got shape \[4\], expected a batch \[N, C, ...\]"),
    "spline's parameters": (
        spline(params=x_(2, 31)),
        r"params: got shape \[2, 31\], expected \[2 or 1, 8 T\] \(x is \[2, 4\]; 8 parameters of each of T channels, 3 bins",
    ),
    "spline's parameters of another batch": (
        spline(params=x_(3, 32)),
        r"params: got shape \[3, 32\], expected \[2 or 1, 8 T\]",
    ),
    "spline's parameters of pixels": (
        spline(x_(2, 4, 3, 3), x_(2, 32, 3)),
        r"params: got shape \[2, 32, 3\], expected \[2 or 1, 8 T, 3, 3\]",
    ),
    "spline's parameters of some channels": (
        spline(params=x_(2, 30), order=torch.arange(4)),
        r"params: got shape \[2, 30\], expected \[2 or 1, 8 T\] \(.* of each of T channels, 3 bins, linear tails\)",
    ),
    "spline's parameters of no channel": (
        spline(params=x_(2, 0), order=torch.arange(4)),
        r"params: got shape \[2, 0\], expected \[2 or 1, 8 T\]",
    ),
    "spline's parameters of more channels": (
        spline(params=x_(2, 40), order=torch.arange(4)),
        r"params: got shape \[2, 40\], expected \[2 or 1, 8 T\]",
    ),
    "spline's dtypes": (
        spline(params=x_(2, 32, dtype=F64)),
        r"params: got dtype torch.float64, expected torch.float32, the dtype of x",
    ),
    "spline's devices": (
        spline(params=x_(2, 32, device=META)),
        r"params: got device meta, expected cpu, the device of x",
    ),
    "channel_order's dtype": (
        spline(order=torch.arange(4.0)),
        r"channel_order: got torch.float32 on cpu, expected torch.int64 on cpu, the device of x",
    ),
    "channel_order's device": (
        spline(order=torch.arange(4, device=META)),
        r"channel_order: got torch.int64 on meta, expected torch.int64 on cpu",
    ),
    "channel_order's length": (
        spline(order=torch.arange(3)),
        r"channel_order: got shape \[3\], expected \[4\], a permutation of the channels",
    ),
    "first_channel": (
        spline(params=x_(2, 16), first_channel=3),
        r"first_channel: got 3, expected an index from 0 to 2, of the first of 2 transformed channels of 4",
    ),
    "first_channel and channel_order": (
        spline(order=torch.arange(4), first_channel=1),
        r"first_channel: got 1, expected 0 with a channel_order",
    ),
    "bins": (spline(bins=0), r"bins: got 0, expected a positive integer"),
    "bound": (spline(bound=-1.0), r"bound: got -1.0, expected a positive number"),
    "spline's factor": (spline(factor=0.0), r"factor: got 0.0, expected a positive number"),
    "min_bin": (
        spline(min_bin=0.4),
        r"min_bin: got 0.4, expected a number of at least 0 and less than 0.333333, for 3 bins",
    ),
    "min_bin of FrEIA": (
        spline(params=x_(2, 40), convention="freia", tails="affine", min_bin=2.0),
        r"min_bin: got 2.0, expected a number of at least 0 and less than 2, for 3 bins",
    ),
    "min_slope": (spline(min_slope=1.0), r"min_slope: got 1.0, expected a number between 0 and 1"),
    "convention": (
        spline(convention="pyro"),
        r"convention: got 'pyro', expected one of 'fastflow', 'nflows', 'zuko', 'freia'",
    ),
    "tails": (
        spline(tails="affine"),
        r"tails: got 'affine', expected one of 'linear', 'circular', 'none'",
    ),
    "spline's dy": (
        lambda: ops.spline_inverse_backward(x_(2, 4), x_(2, 32), None, x_(2, 3), x_(2), bins=3),
        r"dy: got shape \[2, 3\], expected \[2, 4\] \(like y\)",
    ),
    "spline's dlog_det": (
        lambda: ops.spline_inverse_backward(x_(2, 4), x_(2, 32), None, x_(2, 4), x_(2, 1), bins=3),
        r"dlog_det: got shape \[2, 1\], expected \[2\] \(one value per sample\)",
    ),
    # LU and triangles
    "lower's shape": (lu(lower=x_(2, 3, 4)), r"lower: got shape \[2, 3, 4\], expected a stack \[K, C, C\]"),
    "lower's dtype": (
        lu(lower=x_(2, 3, 3, dtype=torch.bfloat16)),
        r"lower: got dtype torch.bfloat16, expected float32 or float64",
    ),
    "upper's shape": (
        lu(upper=x_(2, 4, 4)),
        r"upper: got shape \[2, 4, 4\], expected \[2, 3, 3\] \(like lower\)",
    ),
    "log_s's shape": (lu(log_s=x_(3)), r"log_s: got shape \[3\], expected \[2, 3\]"),
    "log_s's dtype": (
        lu(log_s=x_(2, 3, dtype=F64)),
        r"log_s: got torch.float64 on cpu, expected torch.float32 on cpu, like lower",
    ),
    "sign_s's device": (
        lu(sign_s=x_(2, 3, device=META)),
        r"sign_s: got torch.float32 on meta, expected torch.float32 on cpu",
    ),
    "perm's dtype": (lu(perm=x_(2, 3)), r"perm: got dtype torch.float32, expected int64"),
    "A's shape": (
        lambda: ops.triangular_solve(x_(3, 3), x_(3, 3), upper=True),
        r"A: got shape \[3, 3\], expected a stack of square matrices",
    ),
    "A's dtype": (
        lambda: ops.triangular_solve(x_(1, 3, 3, dtype=torch.float16), x_(1, 3, 3), upper=True),
        r"A: got dtype torch.float16, expected float32 or float64",
    ),
    "B's shape": (
        lambda: ops.triangular_solve(x_(1, 3, 3), x_(1, 4, 3), upper=True),
        r"B: got shape \[1, 4, 3\], expected \[1, 3, m\]",
    ),
    "B's dtype": (
        lambda: ops.triangular_solve(x_(1, 3, 3), x_(1, 3, 3, dtype=F64), upper=True),
        r"B: got torch.float64 on cpu, expected torch.float32 on cpu, like A",
    ),
    # dequantization
    "a float image": (
        lambda: ops.dequantize(x_(2, 3), seed=1),
        r"x: got dtype torch.float32, expected uint8 images",
    ),
    "a single image": (
        lambda: ops.dequantize(u8(3), seed=1),
        r"x: got shape \[3\], expected a batch \[N, ...\]",
    ),
    "neither noise nor seed": (
        lambda: ops.dequantize(u8(2, 3)),
        r"noise, seed: got neither, expected one of them",
    ),
    "noise and seed": (
        lambda: ops.dequantize(u8(2, 3), noise=x_(2, 3), seed=1),
        r"noise, seed: got both, expected one of them",
    ),
    "noise's shape": (
        lambda: ops.dequantize(u8(2, 3), noise=x_(2, 4)),
        r"noise: got shape \[2, 4\], expected \[2, 3\] \(like x\)",
    ),
    "noise's dtype": (
        lambda: ops.dequantize(u8(2, 3), noise=u8(2, 3)),
        r"noise: got dtype torch.uint8, expected a floating point tensor",
    ),
    "noise's device": (
        lambda: ops.dequantize(u8(2, 3), noise=x_(2, 3, device=META)),
        r"noise: got device meta, expected cpu, the device of x",
    ),
    "n_bits": (lambda: ops.dequantize(u8(2, 3), seed=1, n_bits=9), r"n_bits: got 9, expected 1 to 8"),
    "a scale of zero": (
        lambda: ops.dequantize(u8(2, 3), seed=1, scale=0.0),
        r"scale: got 0.0, expected a positive number",
    ),
    "an infinite logit": (
        lambda: ops.dequantize(u8(2, 3), seed=1, logit=True),
        r"shift: got 0.0 with scale 1.0, expected 0 < shift",
    ),
    "odd height, squeezed": (
        lambda: ops.dequantize(u8(2, 3, 5, 4), seed=1, squeeze_order="channel"),
        r"x: got shape \[2, 3, 5, 4\], expected an even height and width",
    ),
    "inverse of integers": (
        lambda: ops.dequantize_inverse(u8(2, 3)),
        r"y: got dtype torch.uint8, expected a floating point tensor",
    ),
    "inverse of 6 channels": (
        lambda: ops.dequantize_inverse(x_(2, 6, 2, 2), squeeze_order="channel"),
        r"y: got shape \[2, 6, 2, 2\], expected a number of channels divisible by 4",
    ),
}

MODULES = {
    **{
        f"{layer.__class__.__name__} {direction}": (
            lambda layer=layer, direction=direction: getattr(layer, direction)(x_(2, 5, 2, 2)),
            r"x: got shape \[2, 5, 2, 2\], expected \[N, 4, ...\]",
        )
        for layer in (ActNorm(4), InvertibleConv1x1(4), Permute(4), Scale(4), Sequential(ActNorm(4)))
        for direction in ("forward", "inverse")
    },
    "initialize": (lambda: ActNorm(4).initialize(x_(2, 5)), r"x: got shape \[2, 5\], expected \[N, 4, ...\]"),
    "a vector": (lambda: ActNorm(4)(x_(4)), r"x: got shape \[4\], expected \[N, 4, ...\]"),
    "actnorm of float64": (
        lambda: ActNorm(4).eval()(x_(2, 4, dtype=F64)),
        r"log_scale: got dtype torch.float32, expected torch.float64",
    ),
    "convolution of float64": (
        lambda: InvertibleConv1x1(4)(x_(2, 4, dtype=F64)),
        r"weight: got dtype torch.float32, expected torch.float64",
    ),
    "coupling's odd channels": (
        lambda: AffineCoupling(nn.Identity())(x_(2, 5)),
        r"params: got shape \[2, 2\], expected \[2, 6\] \(x is \[2, 5\], shift and scale of 3 channels",
    ),
    "coupling's network": (
        lambda: AffineCoupling(nn.Linear(2, 3))(x_(2, 4)),
        r"params: got shape \[2, 3\], expected \[2, 4\]",
    ),
    "additive's network": (
        lambda: AdditiveCoupling(nn.Linear(2, 4))(x_(2, 4)),
        r"params: got shape \[2, 4\], expected \[2, 2\]",
    ),
    "coupling of integers": (
        lambda: AffineCoupling(nn.Linear(2, 4))(u8(2, 4)),
        r"x: got dtype torch.uint8, expected a floating point tensor",
    ),
    "coupling's factor": (
        lambda: AffineCoupling(nn.Linear(2, 4), num_scale_factors=3)(x_(2, 4)),
        r"factor: got shape \[3\], expected \[2\], one for each transformed channel",
    ),
    "coupling's number of factors": (
        lambda: AffineCoupling(nn.Linear(2, 4), num_scale_factors=0),
        r"num_scale_factors: got 0, expected a positive integer",
    ),
    "coupling's scale": (
        lambda: AffineCoupling(nn.Identity(), scale="relu"),
        r"scale: got 'relu', expected one of 'exp'",
    ),
    "coupling's mask": (
        lambda: AdditiveCoupling(nn.Identity(), mask="rows"),
        r"mask: got 'rows', expected one of 'halves', 'checkerboard'",
    ),
    "squeeze's order": (lambda: Squeeze("rows"), r"order: got 'rows', expected one of"),
    "squeeze's height": (
        lambda: Squeeze()(x_(2, 3, 7, 8)),
        r"x: got shape \[2, 3, 7, 8\], expected an even height and width",
    ),
    "permutation's order": (
        lambda: Permute(4, order="sorted"),
        r"order: got 'sorted', expected one of 'reverse', 'random'",
    ),
    "a permutation of others": (
        lambda: Permute(3, order=[0, 1, 1]),
        r"order: got \[0, 1, 1\], expected each of 0 to 2 once",
    ),
    "a permutation of fewer": (
        lambda: Permute(3, order=[1, 0]),
        r"order: got \[1, 0\], expected each of 0 to 2 once",
    ),
    "a permutation of floats": (
        lambda: Permute(2, order=[1.0, 0.0]),
        r"order: got \[1.0, 0.0\], expected each of 0 to 1 once",
    ),
    "flatten's input": (
        lambda: Flatten((3, 2))(x_(2, 3, 3)),
        r"x: got shape \[2, 3, 3\], expected \[2, 3, 2\]",
    ),
    "flatten's latent": (
        lambda: Flatten((3, 2)).inverse(x_(2, 5)),
        r"z: got shape \[2, 5\], expected \[2, 6\]",
    ),
    **{
        f"MLP's {k}": (
            lambda k=k: MLP(**{"in_features": 2, "out_features": 2, k: 0}),
            f"{k}: got 0, expected a positive integer",
        )
        for k in ("in_features", "out_features", "hidden", "layers")
    },
    "split's channels": (lambda: Split(5), r"num_features: got 5, expected an even number of channels"),
    "split's input": (
        lambda: Split(4)(x_(2, 6, 2, 2)),
        r"x: got shape \[2, 6, 2, 2\], expected \[N, 4, ...\]",
    ),
    "split's prior": (
        lambda: Split(4, prior="flow"),
        r"prior: got 'flow', expected one of 'standard', 'learned'",
    ),
    "split's latent": (
        lambda: Split(4).inverse(x_(2, 2, 2, 2), x_(2, 2, 2, 4)),
        r"z: got shape \[2, 2, 2, 4\], expected \[2, 2, 2, 2\] \(with kept \[2, 2, 2, 2\]\)",
    ),
    "bit depth": (lambda: Dequantize(0), r"n_bits: got 0, expected 1 to 8, the bit depth"),
    "float images": (lambda: Dequantize()(x_(2, 3)), r"x: got dtype torch.float32, expected uint8 images"),
    "alpha": (lambda: LogitDequantize(alpha=1.0), r"alpha: got 1.0, expected a number between 0 and 1"),
    "preset": (
        lambda: LogitDequantize(preset="glow"),
        r"preset: got 'glow', expected one of 'realnvp', 'tutorial'",
    ),
}

GLOW = {
    "28 pixels and three levels": (
        lambda: glow(image_shape=(1, 28, 28), levels=3),
        r"levels: got 3 for image_shape \(1, 28, 28\), expected at most 2 levels for this image, or images padded to 32x32",
    ),
    "an odd height": (
        lambda: glow(image_shape=(3, 5, 4)),
        r"levels: got 1 for image_shape \(3, 5, 4\), expected an even height and width, or images padded to 6x4",
    ),
    "no channels": (
        lambda: glow(image_shape=(0, 4, 4)),
        r"image_shape: got \(0, 4, 4\), expected \(C, H, W\)",
    ),
    "a flat image_shape": (
        lambda: glow(image_shape=(4, 4)),
        r"image_shape: got \(4, 4\), expected \(C, H, W\)",
    ),
    **{
        f"{k} of {v}": (
            lambda k=k, v=v: glow(**{k: v}),
            re.escape(f"{k}: got {v!r}, expected a positive integer"),
        )
        for k, v in {
            "levels": 0,
            "steps": 0,
            "hidden": 1.5,
            "classes": 0,
            "activation_checkpoint_every": -1,
        }.items()
    },
    "coupling": (
        lambda: glow(coupling="cubic"),
        r"coupling: got 'cubic', expected one of 'affine', 'additive', 'spline', 'mixture'",
    ),
    "conv1x1": (
        lambda: glow(conv1x1="qr"),
        r"conv1x1: got 'qr', expected one of 'lu', 'plain', 'reverse', 'shuffle'",
    ),
    "scale": (lambda: glow(scale="none"), r"scale: got 'none', expected one of"),
    "n_bits": (lambda: glow(n_bits=12), r"n_bits: got 12, expected 1 to 8"),
    **{
        f"float images in {method}": (
            lambda method=method: getattr(glow(), method)(x_(2, 3, 4, 4)),
            f"x: got dtype torch.float32, expected {IMAGES}",
        )
        for method in ("log_prob", "bits_per_dim", "forward", "encode", "initialize")
    },
    "NaN for images": (
        lambda: glow().log_prob(x_(2, 3, 4, 4) * torch.nan),
        f"x: got dtype torch.float32, expected {IMAGES}",
    ),
    "wrong channels": (lambda: glow()(u8(2, 1, 4, 4)), rf"x: got shape \[2, 1, 4, 4\], expected {IMAGES}"),
    "one image": (lambda: glow()(u8(3, 4, 4)), rf"x: got shape \[3, 4, 4\], expected {IMAGES}"),
    "a value above the bit depth": (
        lambda: glow(n_bits=5)(u8(2, 3, 4, 4, value=32)),
        r"x: got a value of 32, expected .* values in \[0, 32\)",
    ),
    "images elsewhere": (
        lambda: glow()(u8(2, 3, 4, 4, device=META)),
        r"x: got device meta, expected cpu, the device of the model",
    ),
    "superfluous context": (
        lambda: glow()(u8(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)),
        r"context: got a tensor of shape \[2\], expected None, the model has no classes",
    ),
    **{
        f"context missing in {method}": (call, r"context: got None, expected int64 classes \[2\] in \[0, 3\)")
        for method, call in (
            ("log_prob", lambda: glow(classes=3).log_prob(u8(2, 3, 4, 4))),
            ("encode", lambda: glow(classes=3).encode(u8(2, 3, 4, 4))),
            ("decode", lambda: glow(classes=3).decode((x_(2, 12, 2, 2),))),
            ("sample", lambda: glow(classes=3).sample(2)),
        )
    },
    **{
        f"context of {what}": (
            lambda c=c: glow(classes=3)(u8(2, 3, 4, 4), c),
            rf"context: got {got}, expected int64 classes \[2\] in \[0, 3\)",
        )
        for what, c, got in (
            ("class 3", torch.tensor([0, 3]), "values from 0 to 3"),
            ("class -1", torch.tensor([-1, 2]), "values from -1 to 2"),
            ("floats", torch.zeros(2), r"torch.float32 of shape \[2\]"),
            ("another batch", torch.zeros(3, dtype=torch.int64), r"torch.int64 of shape \[3\]"),
        )
    },
    "context elsewhere": (
        lambda: glow(classes=3)(u8(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64, device=META)),
        r"context: got device meta, expected cpu, the device of the model",
    ),
    "NaN in a latent": (latents(glow(), NAN), r"latents\[0\]: got NaN, expected numbers"),
    "too few latents": (
        latents(glow(levels=2), NAN),
        r"latents: got 1 tensors, expected 2, as encode gives them",
    ),
    "a latent's shape": (
        latents(glow(), x_(2, 12, 4, 4)),
        r"latents\[0\]: got shape \[2, 12, 4, 4\], expected \[N, 12, 2, 2\]",
    ),
    "a latent's dtype": (
        latents(glow(), x_(2, 12, 2, 2, dtype=F64)),
        r"latents\[0\]: got dtype torch.float64, expected torch.float32",
    ),
    "a latent elsewhere": (
        latents(glow(), x_(2, 12, 2, 2, device=META)),
        r"latents\[0\]: got device meta, expected cpu",
    ),
    "temperature": (lambda: glow().sample(2, temperature=-1.0), r"temperature: got -1.0, expected 0 or more"),
    "a negative number of samples": (lambda: glow().sample(-1), r"n: got -1, expected 0 or more"),
}


@pytest.mark.parametrize(
    "call, message", [*OPS.values(), *MODULES.values(), *GLOW.values()], ids=[*OPS, *MODULES, *GLOW]
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match="^" + message):
        call()


def test_the_largest_values_are_no_errors():
    glow(n_bits=5)(u8(2, 3, 4, 4, value=31))
    glow(classes=3)(u8(2, 3, 4, 4), torch.tensor([0, 2]))
    glow().sample(0)


def test_glow_s_network_of_other_channels_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="expected input.* to have 2 channels, but got 3"):
        GlowNetwork(2, 4, hidden=4)(x_(1, 3, 2, 2))
