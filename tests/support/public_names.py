"""The modules with public names, and their names and methods."""

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

MODULES = (
    "fastflow",
    "fastflow.distributed",
    "fastflow.explore",
    "fastflow.export",
    "fastflow.integrations.accelerate",
    "fastflow.models",
    "fastflow.nn",
    "fastflow.ops",
    "fastflow.reference",
    "fastflow.reversible",
)


def is_ours(value: object) -> bool:
    return (getattr(value, "__module__", None) or "").startswith("fastflow")


def defined(module: ModuleType) -> list[str]:
    """Names without a leading underscore that the module defines, for modules without ``__all__``."""
    return [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    ]


def functions(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods of a class that are ours, inherited ones too, and what computes its public properties."""
    for name in sorted(dir(cls)):
        value = inspect.getattr_static(cls, name)
        is_property = isinstance(value, property)
        function = value.fget if is_property else getattr(value, "__func__", value)
        public = name[0] != "_" or (name == "__init__" and not is_property)
        if public and inspect.isfunction(function) and is_ours(function):
            yield name, function
