"""Flow layers, priors over latents, and coupling networks."""

from fastflow.deprecation import renamed_attributes
from fastflow.nn.actnorm import ActNorm
from fastflow.nn.adapters import FromEncoderDecoder, FromReverse, WithoutLogDet, WithReverse
from fastflow.nn.affine import Affine
from fastflow.nn.affine_coupling import AdditiveCoupling, AffineCoupling
from fastflow.nn.batch_norm import BatchNorm
from fastflow.nn.conv1x1 import InvertibleConv1x1
from fastflow.nn.coupling import Coupling
from fastflow.nn.dequantize import Dequantize, IdentityDequantize, LogitDequantize
from fastflow.nn.elementwise import (
    CircularShift,
    Exp,
    LeakyReLU,
    Log,
    Logit,
    Sigmoid,
    SoftClip,
    Softplus,
    Tanh,
)
from fastflow.nn.elementwise_spline import ElementwiseSpline
from fastflow.nn.emerging_conv import EmergingConv
from fastflow.nn.flatten import Flatten
from fastflow.nn.flow import Flow, FlowReport
from fastflow.nn.glow_level import GlowLevel, GlowStep
from fastflow.nn.inverse import Inverse
from fastflow.nn.linear import OrthogonalLinear, QRLinear, TriangularLinear
from fastflow.nn.lu_linear import LULinear
from fastflow.nn.masked_autoregressive import MaskedAutoregressive
from fastflow.nn.mixture_cdf_coupling import MixtureCDFCoupling
from fastflow.nn.networks.concat_squash import ConcatSquash
from fastflow.nn.networks.encoder_decoder import EncoderDecoder
from fastflow.nn.networks.gated_network import GatedNetwork
from fastflow.nn.networks.glow_network import GlowNetwork
from fastflow.nn.networks.lipschitz import (
    LipschitzConv2d,
    LipschitzConvNet,
    LipschitzLinear,
    LipschitzMLP,
    LipSwish,
)
from fastflow.nn.networks.masked_network import MaskedNetwork
from fastflow.nn.networks.mlp import MLP
from fastflow.nn.networks.residual_mlp import ResidualMLP
from fastflow.nn.networks.residual_network import ResidualNetwork
from fastflow.nn.neural_ode import NeuralODE
from fastflow.nn.periodic_conv import PeriodicConv
from fastflow.nn.permute import Permute
from fastflow.nn.piecewise import PiecewiseLinear, PiecewiseQuadratic
from fastflow.nn.planar import Planar
from fastflow.nn.priors.distribution import DistributionPrior
from fastflow.nn.priors.gaussian import GaussianPrior
from fastflow.nn.priors.logistic import LogisticPrior
from fastflow.nn.priors.mixture import GaussianMixturePrior
from fastflow.nn.priors.prior import Prior
from fastflow.nn.priors.uniform import UniformPrior
from fastflow.nn.radial import Radial
from fastflow.nn.residual import Residual
from fastflow.nn.scale import Scale
from fastflow.nn.sequential import Sequential
from fastflow.nn.spline_coupling import SplineCoupling
from fastflow.nn.split import Split
from fastflow.nn.squeeze import Squeeze
from fastflow.nn.standardize import Standardize
from fastflow.nn.sylvester import Sylvester
from fastflow.nn.transform import FlowTransform
from fastflow.nn.variational_dequantize import VariationalDequantize

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "BatchNorm",
    "CircularShift",
    "ConcatSquash",
    "NeuralODE",
    "Coupling",
    "Dequantize",
    "DistributionPrior",
    "ElementwiseSpline",
    "EmergingConv",
    "EncoderDecoder",
    "Exp",
    "Flatten",
    "Flow",
    "FlowReport",
    "FlowTransform",
    "FromEncoderDecoder",
    "FromReverse",
    "GatedNetwork",
    "GaussianMixturePrior",
    "GaussianPrior",
    "GlowLevel",
    "GlowNetwork",
    "GlowStep",
    "IdentityDequantize",
    "Inverse",
    "InvertibleConv1x1",
    "LULinear",
    "LeakyReLU",
    "LipSwish",
    "LipschitzConv2d",
    "LipschitzConvNet",
    "LipschitzLinear",
    "LipschitzMLP",
    "Log",
    "LogisticPrior",
    "Logit",
    "LogitDequantize",
    "MLP",
    "MaskedAutoregressive",
    "MaskedNetwork",
    "MixtureCDFCoupling",
    "OrthogonalLinear",
    "PeriodicConv",
    "Permute",
    "PiecewiseLinear",
    "PiecewiseQuadratic",
    "Planar",
    "Prior",
    "QRLinear",
    "Radial",
    "Residual",
    "ResidualMLP",
    "ResidualNetwork",
    "Scale",
    "Sequential",
    "Sigmoid",
    "SoftClip",
    "Softplus",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "Tanh",
    "TriangularLinear",
    "UniformPrior",
    "VariationalDequantize",
    "WithReverse",
    "WithoutLogDet",
]

__getattr__ = renamed_attributes(__name__, Continuous=IdentityDequantize)
