"""Drop-in flow layers."""

from fastflow.nn.actnorm import ActNorm
from fastflow.nn.affine_coupling import AdditiveCoupling, AffineCoupling
from fastflow.nn.conv1x1 import InvertibleConv1x1
from fastflow.nn.dequantize import Dequantize, LogitDequantize
from fastflow.nn.flow import Flow, FlowReport
from fastflow.nn.gaussian import GaussianPrior
from fastflow.nn.glow_level import GlowLevel, GlowStep
from fastflow.nn.glow_network import GlowNetwork
from fastflow.nn.permute import Permute
from fastflow.nn.sequential import Sequential
from fastflow.nn.split import Split
from fastflow.nn.squeeze import Squeeze

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Dequantize",
    "Flow",
    "FlowReport",
    "GaussianPrior",
    "GlowLevel",
    "GlowNetwork",
    "GlowStep",
    "InvertibleConv1x1",
    "LogitDequantize",
    "Permute",
    "Sequential",
    "Split",
    "Squeeze",
]
