"""What the integrations share: layers that compute the same, faster, and a report of what was replaced.

A layer is accelerated in place by its class: the class of the module becomes a subclass of its own class, which computes
the same with FastFlow's ops. The module, its parameters, buffers and hooks stay the objects that they are, and so does
its state dict.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fastflow import validation
from fastflow.reversible import has_hooks


class Accelerated:
    """Base of the faster classes; a faster class derives from it and from the class that it replaces."""

    BYPASSED: tuple[str, ...] = ()
    """Names of the children that the faster class does not call: a hook in one of them would not run."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why ``module``, an instance of the replaced class, is left alone; None if it is not."""
        return None

    @classmethod
    def replaced(cls) -> type[nn.Module]:
        """The class of the library."""
        bases = cls.__mro__
        return next(c for c in bases[1:] if not issubclass(c, Accelerated) and issubclass(c, nn.Module))


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; printing it lists the layers by class."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Class of the library, by the name of each layer that is faster now."""
    left_alone: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Class and reason, by the name of each layer of the library that stays as it was."""

    def __str__(self) -> str:
        lines = [f"{n:4} {name}: replaced" for name, n in Counter(self.replaced.values()).items()]
        lines += [
            f"{n:4} {name}: left alone, {reason}"
            for (name, reason), n in Counter(self.left_alone.values()).items()
        ]
        return "\n".join(lines) or "nothing to replace was found"


def accelerate(model: nn.Module, classes: Mapping[type, type[Accelerated]], known: Callable) -> Report:
    """Give every module of ``model`` whose class is a key of ``classes`` the faster class.

    ``known`` tells whether a class is one of the library's layers, to be named if it is left alone.
    """
    if not isinstance(model, nn.Module):
        raise validation.argument_error("model", type(model).__name__, "a module")
    report = Report()
    for name, module in model.named_modules():
        found = classes.get(type(module))
        if found is not None:
            reason = found.refusal(module) or _hooked(module, found)
            if reason is None:
                module.__class__ = found
                report.replaced[name] = found.replaced().__name__
            else:
                report.left_alone[name] = type(module).__name__, reason
        elif isinstance(module, Accelerated):
            report.replaced[name] = type(module).replaced().__name__
        elif any(isinstance(module, c) for c in classes):
            report.left_alone[name] = type(module).__name__, "a subclass of a layer that is covered"
        elif known(type(module)):
            report.left_alone[name] = type(module).__name__, "not covered"
    return report


def revert(model: nn.Module) -> int:
    """Give every accelerated module its own class again, and return their number."""
    found = [m for m in model.modules() if isinstance(m, Accelerated)]
    for module in found:
        module.__class__ = type(module).replaced()
    return len(found)


def _hooked(module: nn.Module, faster: type[Accelerated]) -> str | None:
    children = [getattr(module, name, None) for name in faster.BYPASSED]
    inner = [m for child in children if child is not None for m in child.modules()]
    return "a module inside it has hooks, which would not run" if any(map(has_hooks, inner)) else None


def faster_classes(
    namespace: dict[str, object], layers: Mapping[type, type[Accelerated]]
) -> dict[type, type[Accelerated]]:
    """Faster classes of a library, by the class that each replaces.

    They are put into ``namespace``, the globals of a module, under the names of the library's classes, so that pickle
    finds them there.
    """
    made = {}
    for theirs, ours in layers.items():
        about = {"__module__": namespace["__name__"], "__doc__": f"{theirs.__name__} with FastFlow's ops."}
        made[theirs] = namespace[theirs.__name__] = type(theirs.__name__, (ours, theirs), about)
    return made
