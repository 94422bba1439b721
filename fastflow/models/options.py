"""Options of a model as one frozen dataclass; its fields are the arguments of the constructor."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args, get_origin

from fastflow import validation
from fastflow.nn.networks.builder import NetworkBuilder

P = ParamSpec("P")
Self = TypeVar("Self")
Options = TypeVar("Options", bound="ModelConfig")
# former names of options, in arguments and in checkpoints of 0.1.0
FORMER_NAMES = {"checkpoint_every": "activation_checkpoint_every"}


@dataclass(frozen=True)
class ModelConfig:
    """Base class of the options of a model.

    A field annotated with a ``Literal`` takes one of its values, a field annotated with ``NetworkBuilder`` a
    function, a field annotated ``int`` a positive integer, a field annotated ``bool`` True or False; other values
    raise ValueError. Sequences become tuples, so that equal options compare equal.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            annotation: Any = field.type
            value, literal = getattr(self, field.name), literal_of(annotation)
            if NetworkBuilder in get_args(annotation):
                _check_network(field.name, value, literal)
            elif literal is not None and not isinstance(value, classes := _classes_of(annotation)):
                if classes and value not in get_args(literal):
                    names = ", ".join(map(repr, get_args(literal)))
                    expected = f"one of {names}, or a {' or a '.join(c.__name__ for c in classes)}"
                    raise validation.argument_error(field.name, repr(value), expected)
                validation.one_of(field.name, value, get_args(literal))
            elif annotation in (int, int | None):
                validation.positive_int(field.name, value, optional=annotation is not int)
            elif annotation is bool:
                validation.boolean(field.name, value)
            elif isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, field.name, tuple(value))

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name; values are not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def literal_of(annotation: type) -> type | None:
    """The ``Literal`` that an annotation is or has; None if there is none."""
    return next((t for t in (annotation, *get_args(annotation)) if get_origin(t) is Literal), None)


def _classes_of(annotation: type) -> tuple[type, ...]:
    """Classes of which a field with a ``Literal`` also takes instances."""
    return tuple(t for t in get_args(annotation) if isinstance(t, type))


def _check_network(argument: str, value: object, literal: type | None) -> None:
    names = (None,) if literal is None else get_args(literal)
    if value not in names and not callable(value):
        expected = f"one of {', '.join(map(repr, names))}, or a function of (in_channels, out_channels)"
        raise validation.argument_error(argument, repr(value), expected)


def check_image_shape(image_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``image_shape`` is ``(C, H, W)``."""
    validation.sample_shape("image_shape", image_shape, "(C, H, W)")
    if len(image_shape) != 3:
        raise validation.argument_error("image_shape", image_shape, "(C, H, W)")


def context_shape_of(
    image_shape: tuple[int, ...], context_features: int | None, context_image: bool, classes: int | None
) -> tuple[int, ...] | None:
    """Shape of one context of the flows of an image model; raises ValueError for options that exclude others."""
    if context_features is None:
        if context_image:
            raise validation.argument_error("context_image", True, "False without context_features")
        return None
    if classes is not None:
        raise validation.argument_error(
            "classes", classes, "None with context_features: there is one context"
        )
    return (context_features, *image_shape[1:]) if context_image else (context_features,)


def takes_fields_of(
    config_class: Callable[P, Options],
) -> Callable[[Callable[[Self, Options], None]], Callable[Concatenate[Self, P], None]]:
    """Decorate ``__init__(self, config)``: it then takes the fields of ``config_class`` as its arguments."""

    def decorate(init: Callable[[Self, Options], None]) -> Callable[Concatenate[Self, P], None]:
        @functools.wraps(init)
        def with_fields(self: Self, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, config_class(*args, **kwargs))

        arguments = inspect.signature(config_class).parameters.values()
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([this, *arguments], return_annotation=None)
        with_fields.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue] # which inspect reads
        return with_fields

    return decorate
