"""The models that ``--model`` names, and their options as options of the trainer.

The options are the fields of each model's config class, their help is the model's docstring: an option of a
model is written once, there.
"""

import inspect
import re
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any, Union, get_args

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
from fastflow.models.mnist_flow import VARIANTS, MNISTFlowConfig
from fastflow.models.model import Model
from fastflow.models.neural_spline_flow import NeuralSplineFlowConfig
from fastflow.models.nice import NICEConfig
from fastflow.models.options import ModelConfig, NetworkBuilder, literal_of
from fastflow.models.realnvp import RealNVPConfig
from fastflow.models.residual_flow import ResidualFlowConfig
from fastflow.models.vector_glow import VectorGlowConfig

# fields that follow from the data or from the model's name
_NOT_OPTIONS = {
    "image_shape",
    "features",
    "classes",
    "variant",
    "context_features",
    "context_image",
    "standardize",
}
# options that the trainer's own configuration declares: they also concern the data, or have more values
_DECLARED_ELSEWHERE = {"n_bits", "reversible"}


@dataclass(frozen=True)
class TrainerModel:
    """A model that ``--model`` names.

    ``defaults``: the trainer's own defaults, for runs of minutes. ``names``: fields that the trainer names
    differently. ``fixed``: fields that follow from the model's name. ``dimensions``: of the shapes of samples that it
    takes, 3 of an image and 1 of a row.
    """

    model: type[Model]
    config: type[ModelConfig]
    defaults: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    dimensions: tuple[int, ...] = (3,)

    def options(self) -> dict[str, Field]:
        """The model's fields by their names as options of the trainer."""
        return {
            self.names.get(f.name, f.name): f
            for f in fields(self.config)
            if f.name not in _NOT_OPTIONS and {*get_args(f.type)} != {NetworkBuilder, type(None)}
        }

    def default(self, option: str) -> Any:
        """The trainer's default of an option."""
        known = self.options()[option]
        return self.defaults.get(known.name, known.default)

    def takes_classes(self) -> bool:
        """Whether the model can be class-conditional."""
        return "classes" in {f.name for f in fields(self.config)}


MODELS = {
    "glow": TrainerModel(
        Glow,
        GlowConfig,
        defaults={"steps": 8, "hidden": 32, "output_start": 1.0},
        names={"steps": "steps_per_level"},
    ),
    "realnvp": TrainerModel(RealNVP, RealNVPConfig, names={"scales": "levels"}),
    "nice": TrainerModel(NICE, NICEConfig, names={"layers": "blocks"}),
    **{
        f"mnist-{variant}": TrainerModel(MNISTFlow, MNISTFlowConfig, fixed={"variant": variant})
        for variant in VARIANTS
    },
    "vector_glow": TrainerModel(
        VectorGlow,
        VectorGlowConfig,
        names={"steps": "steps_per_level"},
        dimensions=(1,),
    ),
    **{
        name: TrainerModel(model, config, names={"steps": "steps_per_level"}, dimensions=(1,))
        for name, model, config in (("maf", MAF, MAFConfig), ("iaf", IAF, IAFConfig))
    },
    "neural_spline_flow": TrainerModel(
        NeuralSplineFlow,
        NeuralSplineFlowConfig,
        names={"steps": "steps_per_level"},
        dimensions=(1,),
    ),
    "residual_flow": TrainerModel(
        ResidualFlow,
        ResidualFlowConfig,
        defaults={"blocks": 4},
        names={"scales": "levels"},
        dimensions=(1, 3),
    ),
}


def argument_docs(docstring: str) -> dict[str, str]:
    """The first sentence of every entry of the ``Args:`` section of a docstring, without markup."""
    lines = inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", lines, re.MULTILINE)
    plain = {name: re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split())) for name, text in entries}
    return {name: re.split(r"\. |\.$", text.replace("`", ""))[0] for name, text in plain.items()}


def _type(option: Field) -> type:
    """Type of an option on the command line, which names networks and priors and takes no functions or objects."""
    annotation: Any = option.type
    literal = literal_of(annotation)
    objects = [
        t
        for t in get_args(annotation)
        if t == NetworkBuilder or (isinstance(t, type) and t is not type(None))
    ]
    return literal if literal is not None and objects else annotation


def _dataclass_of_options() -> type:
    """A dataclass with one field for each option of any model.

    Its default is None if the models have different defaults; the help then lists them.
    """
    takers: dict[str, dict[str, TrainerModel]] = {}
    for name, known in MODELS.items():
        for option in known.options():
            if option not in _DECLARED_ELSEWHERE:
                takers.setdefault(option, {})[name] = known
    members, help_texts = [], []
    for option, models in takers.items():
        defaults = {known.default(option) for known in models.values()}
        types = [_type(known.options()[option]) for known in models.values()]
        default = defaults.pop() if len(defaults) == 1 else None
        members.append((option, Union[*types, *([type(None)] if defaults else [])], default))
        help_texts.append(f"    {option}: {_help(option, models, each_default=bool(defaults))}")
    doc = "\n".join(["Options of the models.", "", "Args:", *help_texts])
    return make_dataclass(
        "ModelOptions", members, frozen=True, namespace={"__doc__": doc, "__module__": __name__}
    )


def _help(option: str, models: dict[str, TrainerModel], each_default: bool) -> str:
    """The help of an option: one sentence per meaning, after the names of the models that take it."""
    meanings: dict[str, list[str]] = {}
    for name, known in models.items():
        text = argument_docs(known.model.__doc__ or "")[known.options()[option].name]
        text += f" (default: {known.default(option)})" if each_default else ""
        meanings.setdefault(text, []).append(name)
    if len(meanings) == 1 and len(models) == len(MODELS):
        text = next(iter(meanings))
        return f"{text[0].upper()}{text[1:]}."
    return " ".join(f"{', '.join(names)}: {text}." for text, names in meanings.items())


ModelOptions = _dataclass_of_options()
OPTIONS = {option for known in MODELS.values() for option in known.options()}
