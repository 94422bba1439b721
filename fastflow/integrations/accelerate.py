"""What the integrations share: layers that compute the same, faster, and a report of what was replaced.

A layer is accelerated in place by its class: the class of the module becomes a subclass of its own class, which computes
the same with FastFlow's ops. The module, its parameters, buffers and hooks stay the objects that they are, and so does
its state dict.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from fastflow import validation
from fastflow.integrations.check import Check, assert_close, checked
from fastflow.progress_bar import ProgressBar
from fastflow.reversible import has_hooks

Theirs = Any
"""A module of a library, in signatures: to a type checker its attributes would be those of ``nn.Module`` only."""


_Faster = TypeVar("_Faster", bound="type[Accelerated]")


class Accelerated(nn.Module):
    """Base of the faster classes; a faster class derives from it and from the class that it replaces."""

    if TYPE_CHECKING:  # attributes of the class that it replaces, and those of its methods that super() calls
        inverse: Callable[..., tuple[Tensor, Tensor]]
        _elementwise: Callable[..., tuple[Tensor, Tensor]]
        _piecewise_cdf: Callable[..., tuple[Tensor, Tensor]]
        _spline: Callable[..., tuple[Tensor, Tensor]]

        def __getattr__(self, name: str) -> Any: ...

    BYPASSED: tuple[str, ...] = ()
    """Names of the children that the faster class does not call. A hook in one of them would not run."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        """Why ``module``, an instance of the replaced class, is left alone; None if it is not."""
        return None

    @classmethod
    def replaced(cls) -> type[nn.Module]:
        """The class of the library."""
        bases = cls.__mro__
        return next(c for c in bases[1:] if not issubclass(c, Accelerated) and issubclass(c, nn.Module))


class Chain(Accelerated):
    """Base of chains of layers whose backward recomputes activations by inverses, and stores the output only."""

    @classmethod
    @abstractmethod
    def obstacle(cls, module: Theirs) -> str | None:
        """Why ``module``, an instance of the replaced class, stores its activations; None if it need not."""
        raise NotImplementedError(f"{cls.__name__} has no obstacle")


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; printing it lists the layers by class."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Class of the library, by the name of each layer that is faster now."""
    left_alone: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Class and reason, by the name of each layer of the library that stays as it was."""

    recomputing: dict[str, str] = field(default_factory=dict)
    """Class, by the name of each chain that recomputes its activations: with ``reversible=True``."""
    storing: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Class and reason, by the name of each chain that stores its activations with ``reversible=True``."""

    def __str__(self) -> str:
        named = {
            "replaced": self.replaced,
            "recomputes activations": self.recomputing,
            "left alone": self.left_alone,
            "stores activations": self.storing,
        }
        lines = []
        for state, found in named.items():
            for about, n in Counter(found.values()).items():
                name, *reason = (about,) if isinstance(about, str) else about
                lines.append(f"{n:4} {name}: {', '.join([state, *reason])}")
        return "\n".join(lines) or "nothing to replace was found"


def accelerate(
    model: nn.Module,
    classes: Mapping[type, type[Accelerated]],
    known: Callable[[type], bool],
    chains: Mapping[type, type[Chain]] | None = None,
    check: Check | None = None,
) -> Report:
    """Give every module of ``model`` whose class is a key of ``classes`` the faster class.

    ``known`` tells whether a class is one of the library's layers, to be named if it is left alone. Modules of the
    classes ``chains`` recompute their activations if they can; chains within them are part of them. ``check`` is
    called with copies of the model before and after, and must return the same.
    """
    if not isinstance(model, nn.Module):
        raise validation.argument_error("model", type(model).__name__, "a module")
    if check is not None and not callable(check):
        raise validation.argument_error("check", type(check).__name__, "a function of the model, or None")
    with ProgressBar(2, "check", check is not None) as bar:
        return _accelerated(model, classes, known, chains or {}, check, bar)


def _accelerated(
    model: nn.Module,
    classes: Mapping[type, type[Accelerated]],
    known: Callable[[type], bool],
    chains: Mapping[type, type[Chain]],
    check: Check | None,
    bar: ProgressBar,
) -> Report:
    wanted = None if check is None else checked(model, check)
    bar.step("of the model as it was")
    before = {m: type(m) for m in model.modules()}
    report, within = Report(), set()
    for name, module in model.named_modules():
        theirs = own_class(module)
        found, chain = classes.get(theirs), chains.get(theirs)
        if chain is not None and module not in within:
            reason = chain.obstacle(module)
            if reason is None:
                found = chain
                report.recomputing[name] = theirs.__name__
                within.update(module.modules())
            else:
                report.storing[name] = theirs.__name__, reason
        if found is not None and found is not type(module):
            reason = found.refusal(module) or _hooked(module, found)
            if reason is None:
                _set_class(module, found)
            else:
                report.left_alone[name] = theirs.__name__, reason
        elif found is None and isinstance(module, Accelerated):
            _set_class(module, theirs)
        if isinstance(module, Accelerated):
            report.replaced[name] = theirs.__name__
        elif found is None and any(issubclass(theirs, c) for c in classes):
            report.left_alone[name] = theirs.__name__, "a subclass of a layer that is covered"
        elif found is None and known(theirs):
            report.left_alone[name] = theirs.__name__, "not covered"
    if check is not None and wanted is not None:
        try:
            assert_close(checked(model, check), wanted)
        except BaseException:
            for module, c in before.items():
                _set_class(module, c)
            raise
    return report


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of the library that a module has, or had before it was accelerated."""
    return type(module).replaced() if isinstance(module, Accelerated) else type(module)


def not_invertible(layers: Iterable[nn.Module], package: str, names: frozenset[str]) -> str | None:
    """The obstacle for a chain that has a layer whose class is not one of ``names`` in ``package``."""
    for c in map(own_class, layers):
        if c.__name__ not in names or not c.__module__.startswith(f"{package}."):
            return f"{c.__name__} in it has no exact inverse in training"
    return None


def per_sample(log_det: Tensor | float, x: Tensor) -> Tensor:
    """Log-dets of the samples of x, of which the library may have one for all samples, or a number."""
    if not isinstance(log_det, Tensor):
        log_det = x.new_full((), log_det)
    return log_det.expand(x.shape[0])


def revert(model: nn.Module) -> int:
    """Give every accelerated module its own class again, and return their number."""
    found = [m for m in model.modules() if isinstance(m, Accelerated)]
    for module in found:
        _set_class(module, own_class(module))
    return len(found)


def _set_class(module: nn.Module, c: type[nn.Module]) -> None:
    module.__class__ = c


def _hooked(module: nn.Module, faster: type[Accelerated]) -> str | None:
    children = [getattr(module, name, None) for name in faster.BYPASSED]
    inner = [m for child in children if child is not None for m in child.modules()]
    return "a module inside it has hooks, which would not run" if any(map(has_hooks, inner)) else None


def faster_classes(
    namespace: dict[str, Any], layers: Mapping[type, _Faster], prefix: str = ""
) -> dict[type, _Faster]:
    """Faster classes of a library, by the class that each replaces.

    They are put into ``namespace``, the globals of a module, under the names of the library's classes after a
    ``prefix``, so that pickle finds them there.
    """
    made: dict[type, Any] = {}
    for theirs, ours in layers.items():
        name = prefix + theirs.__name__
        about = {"__module__": namespace["__name__"], "__doc__": f"{theirs.__name__} with FastFlow's ops."}
        made[theirs] = namespace[name] = type(name, (ours, theirs), about)
    return made
