"""Coupling networks that a function of the caller's builds."""

from collections.abc import Callable

from torch import nn

from fastflow import validation

NetworkBuilder = Callable[[int, int], nn.Module]


def built(network: NetworkBuilder, in_channels: int, out_channels: int) -> nn.Module:
    """The module of ``network(in_channels, out_channels)``; raises ValueError if it is no module."""
    net = network(in_channels, out_channels)
    if not isinstance(net, nn.Module):
        got = f"a function that returns {type(net).__name__} for ({in_channels}, {out_channels}) channels"
        raise validation.argument_error("network", got, "one that returns a torch.nn.Module")
    return net
