"""Models of images and vectors, built from :mod:`fastflow.nn`."""

from fastflow.models.continuous_flow import ContinuousFlow
from fastflow.models.flow_model import FlowModel
from fastflow.models.glow import Glow
from fastflow.models.image_flow import ImageFlow
from fastflow.models.maf import IAF, MAF
from fastflow.models.mnist_flow import MNISTFlow, mnist_flow
from fastflow.models.model import Model
from fastflow.models.neural_spline_flow import NeuralSplineFlow
from fastflow.models.nice import NICE
from fastflow.models.published import load_published
from fastflow.models.realnvp import RealNVP
from fastflow.models.residual_flow import ResidualFlow
from fastflow.models.vector_glow import VectorGlow

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "ContinuousFlow",
    "FlowModel",
    "Glow",
    "ImageFlow",
    "MNISTFlow",
    "Model",
    "NeuralSplineFlow",
    "RealNVP",
    "ResidualFlow",
    "VectorGlow",
    "load_published",
    "mnist_flow",
]
