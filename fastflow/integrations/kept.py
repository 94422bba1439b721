"""What the faster layers found in modules of a library, kept until it changes."""

import weakref
from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.kept import Kept

# not in the modules, whose attributes are those of the library
_OF_TENSORS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_OF_MODULES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def kept_of(module: nn.Module, name: object) -> Kept:
    """Values of tensors of a module; another one for each name."""
    return _OF_TENSORS.setdefault(module, {}).setdefault(name, Kept())


def value_of(module: nn.Module, name: str, compute: Callable, *args: object) -> Any:
    """``compute(tensor, *args)`` of a buffer or parameter of a module, computed again when the tensor changes."""
    tensor = getattr(module, name)
    return kept_of(module, (name, compute)).get([tensor], None, lambda: compute(tensor, *args))


def found_in(module: nn.Module, find: Callable, *args: object) -> Any:
    """``find(module, *args)``, found again when the module, or one inside it, is not as it was.

    That is its class, attributes, children, parameters, buffers and hooks, and dtype, device and shape of its tensors.
    Elements of lists that are attributes count. Values of tensors, and other objects that are changed in place, do not.
    """
    if torch.compiler.is_compiling():
        return find(module, *args)
    found = _OF_MODULES.get(module)
    if found is None or not found.is_valid():
        found = _OF_MODULES[module] = _Found(module)
    key = find, *args
    if key not in found.values:
        found.values[key] = find(module, *args)
    return found.values[key]


class _Found:
    """What was found in a module, and how that was."""

    CONTENTS = ("_modules", "_parameters", "_buffers")
    HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def __init__(self, module: nn.Module) -> None:
        self.values: dict[tuple, Any] = {}
        # not the module itself, by which the dictionary would keep it
        self.root, self.inner = weakref.ref(module), list(module.modules())[1:]
        attributes = [vars(m) for m in (module, *self.inner)]
        self.contents = [*attributes, *(a[name] for a in attributes for name in self.CONTENTS)]
        self.hooks = [a[name] for a in attributes for name in self.HOOKS]
        self.tensors = [t for a in self.contents for t in a.values() if isinstance(t, Tensor)]
        self.lists = [v for a in self.contents for v in a.values() if isinstance(v, list)]
        self.objects, self.others = self._objects(), self._others()

    def is_valid(self) -> bool:
        objects = self._objects()
        same = len(objects) == len(self.objects) and all(map(is_, objects, self.objects))
        return same and self._others() == self.others

    def _objects(self) -> list[object]:
        """Attributes, which are also the dictionaries of contents and hooks, contents, and elements of lists."""
        return list(chain(*map(dict.values, self.contents), *self.lists))

    def _others(self) -> tuple[list, ...]:
        modules = (self.root(), *self.inner)
        return (
            list(map(type, modules)),
            # the dictionaries in ``contents`` live, so that no other one has their ids
            list(map(id, map(vars, modules))),
            list(map(bool, self.hooks)),  # a hook itself may refer to its module
            list(map(_KIND, self.tensors)),
            list(map(len, self.lists)),
        )


_KIND = attrgetter("dtype", "device", "shape")
