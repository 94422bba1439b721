"""Options of models: constructors take the fields of a dataclass, which checks them."""

import inspect
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pytest

from fastflow.models import (
    IAF,
    MAF,
    NICE,
    Glow,
    MNISTFlow,
    NeuralSplineFlow,
    RealNVP,
    ResidualFlow,
    VectorGlow,
)
from fastflow.models.glow import GlowConfig
from fastflow.models.maf import IAFConfig, MAFConfig
from fastflow.models.mnist_flow import MNISTFlowConfig
from fastflow.models.neural_spline_flow import NeuralSplineFlowConfig
from fastflow.models.nice import NICEConfig
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.models.realnvp import RealNVPConfig
from fastflow.models.residual_flow import ResidualFlowConfig
from fastflow.models.vector_glow import VectorGlowConfig

MODELS = {
    Glow: GlowConfig,
    RealNVP: RealNVPConfig,
    NICE: NICEConfig,
    VectorGlow: VectorGlowConfig,
    NeuralSplineFlow: NeuralSplineFlowConfig,
    MAF: MAFConfig,
    IAF: IAFConfig,
    MNISTFlow: MNISTFlowConfig,
    ResidualFlow: ResidualFlowConfig,
}


@dataclass(frozen=True)
class Options(ModelConfig):
    depth: int
    kind: Literal["a", "b"] = "a"
    classes: int | None = None
    shape: tuple[int, ...] = (1, 2)
    rate: float = 0.5
    flag: bool = False


class Thing:
    @takes_fields_of(Options)
    def __init__(self, config: Options) -> None:
        self.config = config


def test_a_constructor_takes_the_fields():
    assert Thing(3, "b", shape=[4, 5]).config == Options(depth=3, kind="b", classes=None, shape=(4, 5))
    signature = inspect.signature(Thing)
    assert str(signature).startswith(
        "(depth: int, kind: Literal['a', 'b'] = 'a', classes: int | None = None,"
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        Thing(3, width=2)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"depth": 0}, "depth: got 0, expected a positive integer"),
        ({"depth": None}, "depth: got None, expected a positive integer"),
        ({"depth": 1.0}, "depth: got 1.0, expected a positive integer"),
        ({"depth": 1, "classes": -1}, "classes: got -1, expected a positive integer or None"),
        ({"depth": 1, "kind": "c"}, "kind: got 'c', expected one of 'a', 'b'"),
        ({"depth": 1, "flag": 1}, "flag: got 1, expected True or False"),
        ({"depth": 1, "flag": None}, "flag: got None, expected True or False"),
    ],
)
def test_fields_are_checked(options, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        Thing(**options)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_option_is_documented(model):
    """By an entry under Args: in the docstring of the model."""
    section = inspect.getdoc(model).partition("Args:\n")[2].partition("\n\n")[0]
    documented = [
        line.split(":")[0].strip()
        for line in section.splitlines()
        if line.startswith("    ") and line[4] != " "
    ]
    assert documented == [field.name for field in fields(MODELS[model])]


def test_a_model_keeps_its_options():
    model = Glow([3, 4, 4], levels=1, steps=1, hidden=2)
    assert model.config == asdict(GlowConfig((3, 4, 4), levels=1, steps=1, hidden=2))
