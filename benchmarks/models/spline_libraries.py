"""Spline flows of nflows and zuko with the sizes of a NeuralSplineFlow.

    pip install --no-deps nflows zuko

nflows' is RQ-NSF (C), with its own initialization or FastFlow's weights: then it is the same function. zuko's is
autoregressive, another function: sampling computes one feature per pass.
"""

import math

import torch
from torch import Tensor, nn

from fastflow.models import NeuralSplineFlow
from fastflow.nn import ElementwiseSpline, LULinear, SplineCoupling


def nflows(like: NeuralSplineFlow) -> nn.Module:
    """nflows' RQ-NSF (C), with its own initialization."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import (
        CompositeTransform,
        LULinear,
        PiecewiseRationalQuadraticCouplingTransform,
        RandomPermutation,
    )

    config = like.config
    features = config["features"]

    def network(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(
            inputs,
            outputs,
            config["hidden"],
            config["context_features"],
            config["blocks"],
            dropout_probability=config["dropout"],
        )

    def mixing() -> list[nn.Module]:
        return [RandomPermutation(features), LULinear(features)]

    parts = []
    for _ in range(config["steps"]):
        coupling = PiecewiseRationalQuadraticCouplingTransform(
            torch.arange(features) >= features // 2,
            network,
            num_bins=config["bins"],
            tails="linear",
            tail_bound=config["bound"],
            apply_unconditional_transform=True,
        )
        parts += [*mixing(), coupling]
    return Flow(CompositeTransform([*parts, *mixing()]), StandardNormal([features]))


@torch.no_grad()
def copy_weights(like: NeuralSplineFlow, to: nn.Module) -> nn.Module:
    """Gives nflows' flow ``to`` the weights of ``like``, its dtype and its device."""
    to.to(next(like.parameters()))
    theirs_in_order = iter(to._transform._transforms)
    for ours in like.flows[0]:
        if isinstance(ours, LULinear):
            next(theirs_in_order)._permutation.copy_(ours.perm)
            theirs = next(theirs_in_order)
            theirs.lower_entries.copy_(ours.factors[theirs.lower_indices])
            theirs.upper_entries.copy_(ours.factors[theirs.upper_indices])
            theirs.unconstrained_upper_diag.copy_(ours.factors.diagonal())
            theirs.bias.copy_(ours.bias)
        elif isinstance(ours, SplineCoupling):
            theirs = next(theirs_in_order)
            _copy_network(ours, theirs)
        else:
            _copy_splines(ours, theirs.unconditional_transform)
    return to


def _offset(bins: int, min_slope: float) -> Tensor:
    """What nflows does not add to raw parameters: its slopes of raw values of 0 are not 1."""
    offset = torch.zeros(SplineCoupling.params_per_element(bins), dtype=torch.float64)
    offset[2 * bins :] = math.log(math.expm1(1 - min_slope))
    return offset


def _copy_network(ours: SplineCoupling, theirs: nn.Module) -> None:
    net, own = theirs.transform_net, ours.net
    pairs = [(own.linear_in, net.initial_layer), (own.linear_out, net.final_layer)]
    for block, other in zip(own.blocks, net.blocks, strict=True):
        pairs += [(block.linear_in, other.linear_layers[0]), (block.linear_out, other.linear_layers[1])]
        pairs += [] if block.gate is None else [(block.gate, other.context_layer)]
    for own_layer, layer in pairs:
        layer.load_state_dict(own_layer.state_dict())
    net.final_layer.bias.view(-1, ours.each).add_(_offset(ours.bins, ours.min_slope))


def _copy_splines(ours: ElementwiseSpline, other: nn.Module) -> None:
    bins, offset = ours.form["bins"], _offset(ours.form["bins"], ours.form["min_slope"])
    params = ours.params.view(-1, len(offset)) + offset.to(ours.params)
    other.unnormalized_widths.copy_(params[:, :bins])
    other.unnormalized_heights.copy_(params[:, bins : 2 * bins])
    other.unnormalized_derivatives.copy_(params[:, 2 * bins :])


def zuko(like: NeuralSplineFlow) -> nn.Module:
    """zuko's NSF: autoregressive, with networks of two hidden layers."""
    from zuko.flows import NSF

    config = like.config
    return NSF(
        config["features"],
        config["context_features"] or 0,
        bins=config["bins"],
        transforms=config["steps"],
        hidden_features=(config["hidden"],) * 2,
    )
