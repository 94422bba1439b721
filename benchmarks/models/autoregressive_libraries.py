"""Autoregressive layers of nflows and zuko as FastFlow's layers, with their weights.

    pip install --no-deps nflows zuko

The functions read attributes only, so they import neither library.
"""

import math

import torch
from torch import Tensor, nn

from fastflow.nn import MaskedAutoregressive, MaskedNetwork, Permute, Sequential


@torch.no_grad()
def of_nflows(transform: nn.Module) -> MaskedAutoregressive:
    """``MaskedAffineAutoregressiveTransform`` or ``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``."""
    made = transform.autoregressive_net
    if hasattr(transform, "num_bins"):
        name, form = (
            "spline",
            {
                "bins": transform.num_bins,
                "tails": transform.tails or "none",
                "bound": transform.tail_bound,
                "convention": "nflows",
                "min_bin": transform.min_bin_width,
                "min_slope": transform.min_derivative,
            },
        )
    else:
        name, form = "affine", {"scale": "softplus", "offset": 1e-3}
    residual = made.use_residual_blocks
    linears, contexts, degrees = [made.initial_layer], {}, [made.initial_layer.degrees]
    if hasattr(made, "context_layer"):
        contexts["0"] = made.context_layer
    for block in made.blocks:
        if hasattr(block, "context_layer"):
            contexts[str(len(linears))] = block.context_layer
        more = list(block.linear_layers) if residual else [block.linear]
        linears += more
        degrees += [layer.degrees for layer in more]
    features, width = made.initial_layer.in_features, made.initial_layer.out_features
    net = MaskedNetwork(
        features,
        made.final_layer.out_features // features,
        (width,) * (1 + len(made.blocks)),
        residual=residual,
        context_features=contexts["0"].in_features if contexts else None,
        context_activation=True,
        activation=_activation(made.activation),
        degrees=[d.tolist() for d in degrees],
    ).to(made.initial_layer.weight)
    for own, other in zip(net.layers, [*linears, made.final_layer], strict=True):
        own.load_state_dict({"weight": other.weight, "bias": other.bias})
    for i, other in contexts.items():
        net.context_layers[i].load_state_dict(other.state_dict())
    return MaskedAutoregressive(net, name, **form)


@torch.no_grad()
def of_zuko(transform: nn.Module) -> MaskedAutoregressive:
    """``MaskedAutoregressiveTransform`` of zuko.flows, affine or with splines, without residual blocks."""
    linears, others = list(transform.hyper)[::2], list(transform.hyper)[1::2]
    features, each = len(transform.order), transform.total
    order = torch.argsort(transform.order)
    context = linears[0].in_features - features
    degrees = [linears[0].mask[:, :features].sum(1)]
    for layer in linears[1:-1]:
        degrees.append(torch.where(layer.mask, degrees[-1], 0).amax(1))
    net = MaskedNetwork(
        features,
        each,
        [layer.out_features for layer in linears[:-1]],
        context_features=context or None,
        order=order.tolist(),
        activation=type(others[0]).__name__.lower(),
        degrees=[d.tolist() for d in degrees],
    ).to(linears[0].weight)
    first, last = linears[0], linears[-1]
    rows = (order[:, None] * each + torch.arange(each)).flatten()
    weights = [layer.weight * layer.mask for layer in linears]
    net.layers[0].weight.copy_(weights[0][:, order])
    net.layers[0].bias.copy_(first.bias)
    for own, layer, weight in zip(net.layers[1:-1], linears[1:-1], weights[1:-1], strict=True):
        own.weight.copy_(weight)
        own.bias.copy_(layer.bias)
    net.layers[-1].weight.copy_(weights[-1][rows])
    net.layers[-1].bias.copy_(last.bias[rows])
    if context:
        net.context_layers["0"].weight.copy_(weights[0][:, features:])
        net.context_layers["0"].bias.zero_()
    univariate = transform.univariate
    slope = getattr(univariate, "keywords", {}).get("slope", 1e-3)
    if each == 2:
        form = {"scale": "soft_clip", "params_layout": "shift_scale", "factor": -math.log(slope)}
        return MaskedAutoregressive(net, "affine", **form)
    bound = getattr(univariate, "keywords", {}).get("bound", 5.0)
    form = {"bins": (each + 1) // 3, "bound": bound, "convention": "zuko", "min_slope": slope}
    return MaskedAutoregressive(net, "spline", **form)


def chain_of_nflows(flow: nn.Module) -> Sequential:
    """The transform of a flow of nflows: permutations and autoregressive layers."""
    flows = []
    for transform in flow._transform._transforms:
        if hasattr(transform, "_permutation"):
            flows.append(Permute(len(transform._permutation), transform._permutation.tolist()))
        else:
            flows.append(of_nflows(transform))
    return Sequential(*flows, reversible=False)


def chain_of_zuko(flow: nn.Module) -> Sequential:
    """The transform of a zuko MAF or NSF."""
    return Sequential(*(of_zuko(t) for t in flow.transform.transforms), reversible=False)


def _activation(function: object) -> str:
    """The name of an activation of torch.nn.functional."""
    name = getattr(function, "__name__", type(function).__name__).lower()
    return {"function": "relu"}.get(name, name)


def latents_of_zuko(flow: nn.Module, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z and log-det of a zuko flow."""
    return flow.transform(context).call_and_ladj(x)
