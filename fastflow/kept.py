"""Values that are kept until the tensors that they were computed from change."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastflow.transforms import in_transform

T = TypeVar("T")


class Kept:
    """Values computed from tensors, kept until one of these changes. A copy is empty.

    A write to ``tensor.data`` changes no version and is not noticed.
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()

    def forget(self) -> None:
        self.tensors: Sequence[Tensor] = []
        self.state: list[tuple[int, int, torch.dtype, torch.device]] = []
        self.values: dict[object, Any] = {}

    def get(self, tensors: Sequence[Tensor], name: object, compute: Callable[[], T]) -> T:
        """The value ``name`` of ``tensors``: what ``compute`` returned for them as they are now."""
        if not self.may_keep(tensors):
            return compute()
        state = [(t._version, t.data_ptr(), t.dtype, t.device) for t in tensors]
        if len(tensors) != len(self.tensors) or any(
            a is not b for a, b in zip(tensors, self.tensors, strict=True)
        ):
            self.state = []
        if state != self.state:
            self.tensors, self.state, self.values = tensors, state, {}
        if name not in self.values:
            with torch.inference_mode(False), torch.no_grad():  # also for passes that autograd records
                self.values[name] = compute()
        return self.values[name]

    @staticmethod
    def may_keep(tensors: Sequence[Tensor]) -> bool:
        """False in transforms and graphs, and for tensors without values, of which none may be read."""
        if in_transform() or torch.compiler.is_compiling():
            return False
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return False
        return not any(t.is_inference() or t.is_meta or isinstance(t, FakeTensor) for t in tensors)
