"""How an op is registered with torch, and which of its bodies runs."""

import functools
import importlib
import os
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastflow import check
from fastflow.ops import extension

BACKENDS = ("auto", "reference", "triton", "emulated")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_backend = _checked(os.environ.get("FASTFLOW_BACKEND", "auto"), "FASTFLOW_BACKEND")


class backend:
    """Chooses the body of every op within a block.

    ``"auto"``: the fastest one there is: Triton's kernels for CUDA tensors, compiled code where there is some, else PyTorch.
    ``"reference"``: plain PyTorch. ``"triton"``: every op that has a Triton kernel runs it, CPU tensors in Triton's interpreter, which
    takes ``TRITON_INTERPRET=1`` in the environment before Python starts and serves to test, not to compute; other ops as in ``"auto"``.
    ``"emulated"``: the ops of the C++ extension run their CUDA kernels on CPU tensors too, block by block, likewise to test.

    The environment variable ``FASTFLOW_BACKEND`` sets it for a process. It holds for all threads. Raises ValueError for another name.

    Example:
        >>> with fastflow.backend("reference"):
        ...     y, log_det = flow(x)
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")

    def __enter__(self) -> None:
        global _backend
        self.previous, _backend = _backend, self.name

    def __exit__(self, *exc: object) -> None:
        global _backend
        _backend = self.previous


def _extension(device: torch.device) -> str | None:
    """The namespace of torch.ops that holds the extension's bodies for tensors of this device; None where PyTorch is to run."""
    if _backend == "reference" or not (
        extension.cpu if device.type == "cpu" else device.type == "cuda" and _has_code_for(device)
    ):
        return None
    return "fastflow_emulated" if _backend == "emulated" and device.type == "cpu" else "fastflow_C"


@functools.cache
def _has_code_for(device: torch.device) -> bool:
    """Whether the CUDA extension was compiled for this GPU: for its generation, or an earlier one's PTX."""
    oldest = (
        min(re.findall(r"\d+\.\d+", extension.build["cuda_archs"]), key=float, default="0.0")
        if extension.cuda
        else None
    )
    return oldest is not None and torch.cuda.get_device_capability(device) >= tuple(
        map(int, oldest.split("."))
    )


@functools.cache
def _compiled_op(namespace: str, name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, namespace), name).default


def with_compiled(
    name: str, reference: Callable, on: Callable[..., Tensor], applies: Callable[..., bool] = lambda *_: True
) -> Callable:
    """The body that calls the extension's op ``name`` where it is built and ``applies`` to the arguments, else ``reference``.

    ``on`` gives the argument whose device decides.
    """

    def body(*args):
        namespace = _extension(on(*args).device)
        if namespace is None or not applies(*args):
            return reference(*args)
        return _call(_compiled_op(namespace, name), *args)

    return body


def cpu_op(name: str, tensor: Tensor) -> Callable | None:
    """The extension's op for the CPU alone, where ``tensor`` lies there and the op is to run; else None."""
    if tensor.device.type != "cpu" or _extension(tensor.device) is None:
        return None
    return _compiled_op("fastflow_C", name)


def with_cpu(reference: Callable) -> Callable:
    """The body that calls the extension's op named as the reference is, on CPU tensors where it is built, else ``reference``.

    For :func:`with_kernel`: an op that Triton has for GPUs, and C++ for the CPU. Their first argument decides.
    """

    @functools.wraps(reference)
    def body(*args):
        return (cpu_op(reference.__name__, args[0]) or reference)(*args)

    return body


def _call(op: torch._ops.OpOverload, *args):
    """What compiled code says of the values it was given is a ValueError, as in Python; the place in C++ and its trace are left out."""
    try:
        return op(*args)
    except RuntimeError as error:
        if singular := re.search(r"\w+: matrix \d+ of the stack has .*", str(error)):
            raise check.SingularError(singular[0]) from None
        if perm := re.search(r"\w+: perm of matrix \d+ .*", str(error)):
            raise ValueError(perm[0]) from None
        raise


def raise_singular() -> None:
    """See :func:`fastflow.ops.raise_singular`."""
    if extension.cuda and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            if torch._C._cuda_hasPrimaryContext(
                device
            ):  # a synchronisation would make one, of hundreds of MB
                torch.cuda.synchronize(device)
        _call(torch.ops.fastflow_C.raise_singular.default)
    if extension.cpu:
        _call(torch.ops.fastflow_emulated.raise_singular.default)


@functools.cache
def _kernels(family: str):
    """``triton_kernels/FAMILY.py``, imported when first run: triton takes a second, and is not everywhere. None where it is not."""
    try:
        return importlib.import_module(f"fastflow.triton_kernels.{family}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


def _runs_kernels(device: torch.device) -> bool:
    """Whether the backend has tensors of this device go to Triton. Raises RuntimeError where it is told to and cannot."""
    if _backend == "auto":
        return device.type == "cuda" and _kernels("tiles") is not None
    if _backend == "triton":
        if _kernels("tiles") is None:
            raise RuntimeError(
                'backend: "triton" needs the package triton, which is not installed; "auto" and "reference" do without'
            )
        if device.type == "cpu" and not _kernels("tiles").INTERPRETED:
            raise RuntimeError(
                'backend: "triton" takes tensors on the CPU to Triton\'s interpreter, which wants TRITON_INTERPRET=1 in the environment '
                'before Python starts; "auto" and "reference" do without'
            )
    return _backend == "triton"


def with_kernel(reference: Callable, family: str, on: Callable[..., Tensor] = lambda x, *_: x) -> Callable:
    """The body that runs the launcher of ``triton_kernels/FAMILY.py`` named as the reference is: on CUDA tensors, or when told to.

    ``on`` gives the argument whose device decides; where it has no elements, the reference says what nothing looks like.
    """
    name = reference.__name__

    def body(*args):
        tensor = on(*args)
        if not _runs_kernels(tensor.device) or not tensor.numel():
            return reference(*args)
        kernel = getattr(_kernels(family), name)
        if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(tensor.device):  # Triton launches on the current device
            return kernel(*args)

    return body


def register(
    name: str,
    signature: str,
    body: Callable,
    fake: Callable,
    function: type[torch.autograd.Function] | None = None,
) -> None:
    """Defines ``torch.ops.fastflow.NAME``: ``body`` for every device, ``fake`` for tracing, ``function`` under the Autograd key.

    Under the Autograd key the op itself is differentiable: opcheck holds for inputs that require grad, torch.compile sees one node.
    One body chooses among those of the devices, since ``backend`` decides too.
    """
    qualified = f"fastflow::{name}"
    torch.library.define(qualified, signature)
    torch.library.impl(qualified, "CompositeExplicitAutograd", _without_autocast(body))
    torch.library.register_fake(qualified, fake)
    if function is not None:
        torch.library.impl(qualified, "Autograd", _with_gradient(name, function))


def _with_gradient(name: str, function: type[torch.autograd.Function]) -> Callable:
    """``function.apply``, past which an op goes where no gradient is wanted: it takes 7 us, half as long as a small op.

    Not past it within forward mode, which ``no_grad`` leaves on: it says there that it has no such derivative.
    """

    def body(*args):
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fastflow, name).default(*args)

    return body


def _without_autocast(body: Callable) -> Callable:
    """An op computes in the dtypes that it says: under autocast PyTorch's products of matrices in it would be rounded to half precision."""

    def exact(*args):
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return body(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return body(*args)

    return exact
