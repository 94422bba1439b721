"""Residual networks of vectors in plain PyTorch, and their vector-Jacobian product."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS = {"relu": torch.relu, "tanh": torch.tanh, "silu": F.silu, "elu": F.elu}


class Block(NamedTuple):
    """Parameters of a block: pairs of weight and bias."""

    norms: tuple[tuple[Tensor, Tensor], ...]
    linears: tuple[tuple[Tensor, Tensor], ...]
    gate: tuple[Tensor, Tensor] | None


def _structure(
    parameters: Sequence[Tensor], blocks: int, batch_norm: bool, gated: bool
) -> tuple[tuple[Tensor, Tensor], list[Block], tuple[Tensor, Tensor]]:
    """The first layer, the blocks and the last layer."""
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    each = (4 if batch_norm else 2) + gated
    found = []
    for b in range(blocks):
        own = pairs[1 + b * each : 1 + (b + 1) * each]
        norms, linears = ((own[0], own[2]), (own[1], own[3])) if batch_norm else ((), (own[0], own[1]))
        found.append(Block(norms, linears, own[-1] if gated else None))
    return pairs[0], found, pairs[-1]


def _normalized(
    v: Tensor, norm: tuple[Tensor, Tensor], given: Sequence[Tensor], eps: float
) -> tuple[Tensor, ...]:
    """The result, the normalized values, the reciprocal of the standard deviations, the means and variances."""
    mean, variance = given if given else (v.mean(0), v.var(0, correction=0))
    reciprocal = (variance + eps).rsqrt()
    normalized = (v - mean) * reciprocal
    return normalized * norm[0] + norm[1], normalized, reciprocal, mean, variance


def residual_network(
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    blocks: int,
    activation: str,
    batch_norm: bool,
    eps: float,
    keep: bool,
    context_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, hidden, statistics)``; without ``keep`` hidden is empty, without statistics of the batch they are.

    hidden is, for each block, its input, the output of its first layer and, with a context, the output of the second
    one and the gates; then the input of the last layer.
    """
    f = _FUNCTIONS[activation]
    first, found, last = _structure(parameters, blocks, batch_norm, context is not None)
    given = list(zip(running[::2], running[1::2], strict=True))
    hidden, statistics = [], []

    def read(h: Tensor, norms: tuple, i: int, place: int) -> Tensor:
        if not norms:
            return f(h)
        z, _, _, mean, variance = _normalized(h, norms[i], given[place] if given else (), eps)
        statistics.extend(() if given else (mean, variance))
        return f(z)

    h = F.linear(x if context is None else torch.cat([x, context], 1), *first)
    for b, block in enumerate(found):
        t = F.linear(read(h, block.norms, 0, 2 * b), *block.linears[0])
        update = F.linear(read(t, block.norms, 1, 2 * b + 1), *block.linears[1])
        hidden += [h, t]
        if block.gate is not None and context is not None:
            gates = torch.sigmoid(F.linear(context, *block.gate))
            hidden += [update, gates]
            update = update * gates
        h = h + update
    hidden.append(h)
    empty = x.new_empty(0)
    return (
        F.linear(h, *last),
        torch.stack(hidden).detach() if keep else empty,
        torch.stack(statistics).detach() if statistics else empty.clone(),
    )


# a layer's input, the values before the activation, and of these with norms the normalized ones and 1 / deviations
_Read = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def residual_network_backward(
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    hidden: Tensor,
    statistics: Tensor,
    blocks: int,
    activation: str,
    batch_norm: bool,
    eps: float,
    context_gradient: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dx, dcontext, dparameters)`` from the inputs: hidden activations are computed again.

    dparameters are those of all parameters in one vector. dcontext is empty without ``context_gradient``.
    """
    f = _FUNCTIONS[activation]
    first, found, last = _structure(parameters, blocks, batch_norm, context is not None)
    given = list(zip(running[::2], running[1::2], strict=True))
    inputs = x if context is None else torch.cat([x, context], 1)
    h, tape = F.linear(inputs, *first), []

    def read(v: Tensor, norms: tuple, i: int, place: int) -> _Read:
        if not norms:
            return f(v), v, None, None
        z, normalized, reciprocal, *_ = _normalized(v, norms[i], given[place] if given else (), eps)
        return f(z), z, normalized, reciprocal

    for b, block in enumerate(found):
        before = read(h, block.norms, 0, 2 * b)
        between = read(F.linear(before[0], *block.linears[0]), block.norms, 1, 2 * b + 1)
        update = F.linear(between[0], *block.linears[1])
        gates = None
        if block.gate is not None and context is not None:
            gates = torch.sigmoid(F.linear(context, *block.gate))
        tape.append((before, between, update, gates))
        h = h + (update if gates is None else update * gates)

    def read_backward(d: Tensor, at: _Read, norms: tuple, i: int) -> tuple[Tensor, list[Tensor]]:
        a, z, normalized, reciprocal = at
        d = d * _slope(activation, z, a)
        if normalized is None or reciprocal is None:
            return d, []
        gradients = [(d * normalized).sum(0), d.sum(0)]
        d = d * norms[i][0]
        if not given:
            d = d - d.mean(0) - normalized * (d * normalized).mean(0)
        return d * reciprocal, gradients

    parts = [[dy.mT @ h, dy.sum(0)]]
    d, dcontext = dy @ last[0], x.new_empty(0) if context is None else torch.zeros_like(context)
    for block, (before, between, update, gates) in zip(reversed(found), reversed(tape), strict=True):
        of_gate, dupdate = [], d
        if gates is not None and block.gate is not None and context is not None:
            dgates = d * update * gates * (1 - gates)
            of_gate, dupdate = [dgates.mT @ context, dgates.sum(0)], d * gates
            dcontext = dcontext + dgates @ block.gate[0]
        of_second = [dupdate.mT @ between[0], dupdate.sum(0)]
        dt, of_norm = read_backward(dupdate @ block.linears[1][0], between, block.norms, 1)
        of_first = [dt.mT @ before[0], dt.sum(0)]
        dh, of_norm_before = read_backward(dt @ block.linears[0][0], before, block.norms, 0)
        parts.append([*of_norm_before, *of_first, *of_norm, *of_second, *of_gate])
        d = d + dh
    parts.append([d.mT @ inputs, d.sum(0)])
    dinputs = d @ first[0]
    dx = dinputs[:, : x.shape[1]].contiguous()
    if not context_gradient or context is None:
        dcontext = x.new_empty(0)
    else:
        dcontext = dcontext + dinputs[:, x.shape[1] :]
    return dx, dcontext, torch.cat([v.flatten() for part in reversed(parts) for v in part])


def _slope(activation: str, z: Tensor, a: Tensor) -> Tensor:
    if activation == "relu":
        return torch.where(z <= 0, 0.0, torch.ones_like(z))
    if activation == "tanh":
        return 1 - a * a
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return torch.where(z > 0, torch.ones_like(z), a + 1)
