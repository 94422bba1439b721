"""The model that a run trains, from its settings and its images."""

from dataclasses import fields

from fastflow import models
from fastflow.models.mnist_flow import VARIANTS
from fastflow.trainer.config import Config, ConfigError

# what each --model takes of the settings that not every model has
_OPTIONS = {
    "glow": "levels steps_per_level hidden coupling conv1x1 scale logit learned_prior class_conditional n_bits activations_every".split(),
    "realnvp": "levels hidden blocks scale_l2 class_conditional n_bits activations_every".split(),
    "nice": "hidden blocks n_bits prior".split(),
    **{f"mnist-{variant}": [] for variant in VARIANTS},
}
MODELS = tuple(_OPTIONS)


def build_model(config, source):
    """The model that ``config`` describes for the images of ``source``; ConfigError where they do not fit."""
    if config.model not in MODELS:
        raise ConfigError(f"model is {config.model!r}, expected one of {', '.join(MODELS)}")
    taken = _OPTIONS[config.model]
    others = {name for names in _OPTIONS.values() for name in names} - set(taken)
    for field in fields(Config):
        given = getattr(config, field.name)
        if field.name in others and given != field.default:
            raise ConfigError(
                f"{field.name} is {given}, but {config.model} has none; it takes {', '.join(taken) or 'no such option'}"
            )
    if config.class_conditional and source.classes is None:
        raise ConfigError(f"class_conditional: {source.name} has no labels")
    try:
        return _build(config, source)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _build(config, source):
    shape, classes = source.image_shape, source.classes if config.class_conditional else None
    if config.model == "glow":
        return models.Glow(
            image_shape=shape,
            levels=config.levels or 3,
            steps=config.steps_per_level,
            hidden=config.hidden or 32,
            coupling=config.coupling,
            conv1x1=config.conv1x1,
            scale=config.scale,
            n_bits=config.n_bits,
            classes=classes,
            learned_prior=config.learned_prior,
            logit=config.logit,
            reversible=config.reversible,
            checkpoint_every=config.activations_every,
        )
    if config.model == "realnvp":
        return models.RealNVP(
            image_shape=shape,
            scales=config.levels or 2,
            hidden=config.hidden or 64,
            blocks=config.blocks or 8,
            n_bits=config.n_bits,
            classes=classes,
            reversible=config.reversible,
            checkpoint_every=config.activations_every,
        )
    if config.model == "nice":
        return models.NICE(
            features=shape,
            hidden=config.hidden or 1000,
            layers=config.blocks or 5,
            prior=config.prior,
            n_bits=config.n_bits,
            reversible=config.reversible,
        )
    if shape != (1, 28, 28):
        raise ConfigError(f"{config.model} takes images (1, 28, 28), {source.name} has {shape}")
    return models.mnist_flow(config.model.removeprefix("mnist-"), config.reversible)
