"""Building the model of a run from its settings and its images."""

from dataclasses import fields

from fastflow.models.model import Model
from fastflow.trainer.config import Config, ConfigError, config_error
from fastflow.trainer.data import Source
from fastflow.trainer.model_options import MODELS, OPTIONS


def build_model(config: Config, source: Source) -> Model:
    """Build the model of ``config`` for the images of ``source``. Raises ConfigError if they do not fit."""
    _check_options(config, source)
    known, shape = MODELS[config.model], tuple(source.image_shape)
    arguments = dict(known.fixed)
    for option, field in known.options().items():
        given = getattr(config, option)
        if option == "reversible":
            given = {"yes": True, "no": False}.get(given)
        arguments[field.name] = known.default(option) if given is None else given
    of_data = {"image_shape": shape, "features": shape}
    of_data["classes"] = source.classes if config.class_conditional else None
    arguments |= {f.name: of_data[f.name] for f in fields(known.config) if f.name in of_data}
    try:
        model = known.model(**arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if model.shape != shape:
        raise config_error("data", f"{source.name} with images {shape}", f"{model.shape} for {config.model}")
    if config.scale_l2 and not model.weight_scales():
        expected = f"0: {config.model} has no weight normalization to penalize"
        raise config_error("scale_l2", config.scale_l2, expected)
    return model


def _check_options(config: Config, source: Source) -> None:
    known = MODELS[config.model]
    options = known.options()
    for field in fields(config):
        given = getattr(config, field.name)
        if field.name in OPTIONS - options.keys() and given != field.default:
            expected = f"no value: {config.model} has no such option, it takes {', '.join(options)}"
            raise config_error(field.name, given, expected)
    if config.class_conditional and not known.takes_classes():
        raise config_error("class_conditional", True, f"False: {config.model} cannot be class-conditional")
    if config.class_conditional and source.classes is None:
        raise config_error("class_conditional", True, f"False: {source.name} has no labels")
