"""Coupling networks, and a wrapper with encoder and decoder."""

from fastflow.nn.networks.concat_squash import ConcatSquash
from fastflow.nn.networks.encoder_decoder import EncoderDecoder
from fastflow.nn.networks.gated_network import ChannelLayerNorm, GatedBlock, GatedNetwork
from fastflow.nn.networks.glow_network import ActNormConv2d, GlowNetwork, ZeroConv2d
from fastflow.nn.networks.lipschitz import (
    LipschitzConv2d,
    LipschitzConvNet,
    LipschitzLinear,
    LipschitzMLP,
    LipSwish,
)
from fastflow.nn.networks.masked_network import MaskedNetwork
from fastflow.nn.networks.mlp import MLP
from fastflow.nn.networks.residual_mlp import ResidualMLP, ResidualMLPBlock
from fastflow.nn.networks.residual_network import ResidualBlock, ResidualNetwork, WeightNormConv2d

__all__ = [
    "ActNormConv2d",
    "ChannelLayerNorm",
    "ConcatSquash",
    "EncoderDecoder",
    "GatedBlock",
    "GatedNetwork",
    "GlowNetwork",
    "LipSwish",
    "LipschitzConv2d",
    "LipschitzConvNet",
    "LipschitzLinear",
    "LipschitzMLP",
    "MLP",
    "MaskedNetwork",
    "ResidualBlock",
    "ResidualMLP",
    "ResidualMLPBlock",
    "ResidualNetwork",
    "WeightNormConv2d",
    "ZeroConv2d",
]
