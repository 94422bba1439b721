"""Former names of arguments, attributes, functions and classes; they work for one more release and warn."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def _warn(old: str, new: str) -> None:
    # the caller of the function that calls this one
    warnings.warn(f"{old} is now {new}; the old name will be removed", DeprecationWarning, stacklevel=3)


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function whose keyword arguments have new names, given as ``old="new"``; it accepts both.

    Raises TypeError for a call with both names of an argument.
    """

    former = frozenset(new_names)

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def with_old_names(*args: P.args, **kwargs: P.kwargs) -> T:
            if not former.isdisjoint(kwargs):
                for old in former & kwargs.keys():
                    new = new_names[old]
                    if new in kwargs:
                        raise TypeError(f"{new}: got {old}, its former name, as well; expected one of them")
                    _warn(f"argument {old}", new)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return with_old_names

    return decorate


def renamed_function(old: str, function: Callable[P, T]) -> Callable[P, T]:
    """The function under its former name ``old``."""

    @functools.wraps(function)
    def under_old_name(*args: P.args, **kwargs: P.kwargs) -> T:
        _warn(old, function.__name__)
        return function(*args, **kwargs)

    return under_old_name


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """The method ``old`` of a class, which calls the method ``new``."""

    def method(self: object, *args: Any, **kwargs: Any) -> Any:
        _warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    method.__name__, method.__doc__ = old, f"Former name of :meth:`{new}`."
    return method


def renamed_property(old: str, new: str) -> property:
    """The attribute ``old`` of the instances of a class, which reads and writes the attribute ``new``."""

    def get(self: object) -> Any:
        _warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    def set_(self: object, value: Any) -> None:
        _warn(f"{type(self).__name__}.{old}", new)
        setattr(self, new, value)

    return property(get, set_, doc=f"Former name of ``{new}``.")


def renamed_attributes(module: str, **attributes: Any) -> Callable[[str], Any]:
    """``__getattr__`` of ``module`` with former names of its attributes, given as ``old=attribute``."""

    def get(name: str) -> Any:
        if name not in attributes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", attributes[name].__name__)
        return attributes[name]

    return get
