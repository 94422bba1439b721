"""Signatures of public names name the types of what containers and functions hold: ``dict[str, Tensor]``, no ``dict``."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

from tests.support.public_names import MODULES, defined, functions, is_ours

BARE = (dict, list, tuple, set, Callable)
NAMES = re.compile(r"\b(dict|list|tuple|set|Callable)\b(?!\[)")


def public_functions() -> Iterator[tuple[str, Any]]:
    """Public functions and methods, each once, with a name."""
    found = {}
    for module in MODULES:
        names = importlib.import_module(module)
        for name in sorted(getattr(names, "__all__", defined(names))):
            value = getattr(names, name)
            if inspect.isclass(value) and is_ours(value):
                of_class = functions(value)
            else:
                of_class = [("", value)] if inspect.isfunction(value) else []
            for method, function in of_class:
                found.setdefault(inspect.unwrap(function), f"{module}.{name}.{method}".rstrip("."))
    return ((name, function) for function, name in found.items())


def bare(annotation: Any) -> bool:
    """Whether an annotation has a container or a function of which it names no types."""
    if isinstance(annotation, str):
        return NAMES.search(annotation) is not None
    if isinstance(annotation, list):  # the parameters of a Callable
        return any(map(bare, annotation))
    return annotation in BARE or any(map(bare, get_args(annotation)))


@pytest.mark.parametrize(
    "annotation",
    [dict, "dict | None", list | None, dict[str, tuple], Callable, Callable[[list], int], "Callable | None"],
    ids=repr,
)
def test_bare_annotations_are_found(annotation):
    assert bare(annotation)


@pytest.mark.parametrize(
    "annotation", [dict[str, int], "dict[str, int]", tuple[()], Callable[..., int] | None, int], ids=repr
)
def test_others_are_not(annotation):
    assert not bare(annotation)


def test_public_signatures_have_no_bare_containers():
    found = [
        f"{name}: {parameter}: {annotation}"
        for name, function in public_functions()
        for parameter, annotation in function.__annotations__.items()
        if bare(annotation)
    ]
    assert found == []


def test_public_parameters_are_annotated():
    found = [
        f"{name}: {parameter.name}"
        for name, function in public_functions()
        for i, parameter in enumerate(inspect.signature(function).parameters.values())
        if parameter.annotation is parameter.empty and not (i == 0 and parameter.name in ("self", "cls"))
    ]
    assert found == []
