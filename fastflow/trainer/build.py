"""Building the model of a run from its settings and its data."""

from dataclasses import fields, replace

from fastflow.models.model import Model
from fastflow.trainer.config import Config, ConfigError, config_error
from fastflow.trainer.data import Folder, Source
from fastflow.trainer.kinds import kind_of
from fastflow.trainer.model_options import MODELS, OPTIONS, TrainerModel


def with_defaults(config: Config, source: Source) -> Config:
    """``config`` with values for the options that are left open and depend on the kind of the data."""
    defaults = kind_of(source.shape).defaults
    if source.validation is not None:
        defaults = {**defaults, "validation": None}  # the data's own
    left_open = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return replace(config, **left_open, model=model_name(config, source))


def model_name(config: Config, source: Source) -> str:
    """The name of the model, also if it is left open."""
    return kind_of(source.shape).defaults["model"] if config.model == "auto" else config.model


def build_model(config: Config, source: Source) -> Model:
    """Build the model of ``config`` for the samples of ``source``. Raises ConfigError if they do not fit."""
    check_options(config, source)
    name = model_name(config, source)
    known, shape = MODELS[name], tuple(source.shape)
    arguments = dict(known.fixed)
    for option, field in known.options().items():
        given = getattr(config, option)
        if option == "reversible":
            given = {"yes": True, "no": False}.get(given)
        arguments[field.name] = known.default(option) if given is None else given
    rows = len(shape) == 1
    of_data = {"image_shape": shape, "features": shape[0] if rows else shape, "standardize": rows}
    of_data["context_features"] = source.context_features
    of_data["classes"] = source.classes if config.class_conditional else None
    arguments |= {f.name: of_data[f.name] for f in fields(known.config) if f.name in of_data}
    try:
        model = known.model(**arguments)
    except ValueError as error:
        raise ConfigError(_with_names_of_options(str(error), known)) from error
    if model.shape != shape:
        raise config_error("data", f"{source.name} with images {shape}", f"{model.shape} for {name}")
    if config.scale_l2 and not model.weight_scales():
        expected = f"0: {name} has no weight normalization to penalize"
        raise config_error("scale_l2", config.scale_l2, expected)
    return model


def _with_names_of_options(message: str, known: TrainerModel) -> str:
    """A model's message about an argument that has another name as an option."""
    argument, colon, rest = message.partition(":")
    names = {field.name: option for option, field in known.options().items()}
    return names.get(argument, argument) + colon + rest


def check_options(config: Config, source: Source) -> None:
    """Raise ConfigError for options that the model does not have, and for a model of other data."""
    name, shape = model_name(config, source), source.shape
    known = MODELS[name]
    if len(shape) not in known.dimensions:
        fitting = [each for each, other in MODELS.items() if len(shape) in other.dimensions]
        expected = f"{' or '.join(fitting)} for {kind_of(shape).noun} such as those of {source.name}"
        raise config_error("model", name, expected)
    if len(shape) == 1 and config.horizontal_flip:
        raise config_error("horizontal_flip", True, "no value for rows")
    if shape == (1,) and source.context_features is None:
        raise config_error("columns", "1 column", "2 or more, or columns of --context that it depends on")
    if not isinstance(source, Folder):
        for option in ("skip_damaged", "background"):
            if given := getattr(config, option):
                raise config_error(option, given, f"no value: {source.name} is no folder of images")
    options = known.options()
    for field in fields(config):
        given = getattr(config, field.name)
        if field.name in OPTIONS - options.keys() and given != field.default:
            expected = f"no value: {name} has no such option, it takes {', '.join(options)}"
            raise config_error(field.name, given, expected)
    if config.class_conditional and not known.takes_classes():
        raise config_error("class_conditional", True, f"False: {name} cannot be class-conditional")
    if config.class_conditional and source.classes is None:
        raise config_error("class_conditional", True, f"False: {source.name} has no labels")
