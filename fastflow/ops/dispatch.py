"""Chooses the implementation of an op: a Triton kernel, a compiled op of the extension, or the reference."""

import functools
import importlib
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fastflow import validation
from fastflow.ops import extension

BACKENDS = ("auto", "reference", "triton", "emulated")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "emulated" and not extension.emulator:
        raise RuntimeError(
            f'{source}: got "emulated", which needs the extension built with FASTFLOW_EMULATOR=1, for tests'
        )
    return name


# One setting for all threads, not a ContextVar: autograd runs backward passes in threads of its own.
_backend = _checked(os.environ.get("FASTFLOW_BACKEND", "auto"), "FASTFLOW_BACKEND")


def runs_compiled_ops() -> bool:
    """Whether the backend runs the extension's ops on CPU tensors."""
    return extension.cpu and _backend in ("auto", "emulated")


class backend:
    """Selects the implementation of every op within a block.

    - ``"auto"`` (default): Triton and CUDA C++ kernels for CUDA tensors, C++ for CPU tensors, otherwise
      PyTorch.
    - ``"reference"``: plain PyTorch.
    - ``"triton"`` (for tests): every op with a Triton kernel runs it, other ops run as in ``"auto"``. CPU
      tensors run in Triton's interpreter, which requires ``TRITON_INTERPRET=1`` in the environment before
      Python starts.
    - ``"emulated"`` (for tests): every op with a CUDA C++ kernel runs it on CPU tensors, block by block. This
      requires an extension built with ``FASTFLOW_EMULATOR=1``, as ``make setup`` does.

    The environment variable ``FASTFLOW_BACKEND`` sets the default of a process. The setting applies to all
    threads.
    Raises ValueError for any other name, and RuntimeError for ``"emulated"`` without the emulator.

    Example:
        >>> import fastflow, torch
        >>> with fastflow.backend("reference"):
        ...     y, log_det = fastflow.ops.actnorm(torch.zeros(2, 3), torch.zeros(3), torch.ones(3))
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")

    def __enter__(self) -> None:
        global _backend
        self.previous, _backend = _backend, self.name

    def __exit__(self, *exc: object) -> None:
        global _backend
        _backend = self.previous


@dataclass(frozen=True)
class Implementations:
    """Implementations of an op on each device. This class computes the table of docs/backends.md.

    Attributes:
        name: name of the op, its reference, its Triton launcher and its compiled op.
        folder: folder of the op in ``fastflow/ops``; also the module of its Triton launcher.
        fallback: plain PyTorch, for every device.
        device_of: position of the argument whose device decides.
        triton: whether the op has a Triton launcher.
        compiled: devices with a compiled op in the extension: ``()``, ``("cpu",)`` or ``("cpu", "cuda")``.
        eligible: whether the Triton kernels support the arguments; the fallback runs otherwise.
        eligible_compiled: whether the compiled op does.
        call: calls the compiled op, its first argument, if the signature of the compiled op differs.
    """

    name: str
    folder: str
    fallback: Callable[..., Any]
    device_of: int = 0
    triton: bool = False
    compiled: tuple[str, ...] = ()
    eligible: Callable[..., bool] | None = None
    eligible_compiled: Callable[..., bool] | None = None
    call: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if _backend == "reference":
            return self.fallback(*args)
        tensor = args[self.device_of]
        on_gpu_or_told = tensor.is_cuda or _backend == "triton"
        if self.triton and on_gpu_or_told and tensor.numel() and _runs_kernels(tensor.device):
            supported = self.eligible is None or self.eligible(*args)
            return self._launch(tensor, args) if supported else self.fallback(*args)
        return self._compiled(tensor, args)

    def _compiled(self, tensor: torch.Tensor, args: tuple[Any, ...]) -> Any:
        op = None
        if tensor.is_cpu and extension.cpu:  # reading device.type takes 0.8 us
            op = self._ops["emulated" if _backend == "emulated" else "cpu"]
        elif tensor.is_cuda and "cuda" in self.compiled and has_code_for(tensor.device):
            op = self._ops["cuda"]
        if op is None or not (self.eligible_compiled is None or self.eligible_compiled(*args)):
            return self.fallback(*args)
        try:
            return op(*args) if self.call is None else self.call(op, *args)
        except RuntimeError as error:
            raise_argument_error(error)
            raise

    @functools.cached_property  # attribute lookups in torch.ops are slow
    def _ops(self) -> dict[str, torch._ops.OpOverload | None]:
        """The compiled op of each device, and its emulation, the CUDA kernel run on the CPU."""

        def op(namespace: str) -> torch._ops.OpOverload:
            return getattr(getattr(torch.ops, namespace), self.name).default

        cpu, cuda = (op("fastflow_C") if device in self.compiled else None for device in ("cpu", "cuda"))
        return {"cpu": cpu, "cuda": cuda, "emulated": op("fastflow_emulated") if cuda and cpu else cpu}

    def _launch(self, tensor: torch.Tensor, args: tuple[Any, ...]) -> Any:
        launcher, device = getattr(triton_kernels(self.folder), self.name), tensor.device
        try:
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return launcher(*args)
            with torch.cuda.device(device):  # Triton launches on the current device
                return launcher(*args)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            if _backend == "triton" or not _needs_c_compiler(error):
                raise
            _disable_triton(error)
            return self._compiled(tensor, args)


def raise_argument_error(error: RuntimeError) -> None:
    """Raises a compiled op's error about argument values as a ValueError, without the C++ file, line and trace."""
    if singular := re.search(r"\w+( \(an earlier call\))?: diagonal of matrix \d+: .*", str(error)):
        raise validation.SingularError(singular[0]) from None
    if perm := re.search(r"\w+( \(an earlier call\))?: perm of matrix \d+: .*", str(error)):
        raise ValueError(perm[0]) from None
    if order := re.search(r"\w+: ((channel_)?order|ends|places): .*", str(error)):
        raise ValueError(order[0].split(": ", 1)[1]) from None


@functools.cache
def has_code_for(device: torch.device) -> bool:
    """Whether the CUDA extension was compiled for this GPU, or for an older architecture with PTX."""
    if not extension.cuda:
        return False
    oldest = min(re.findall(r"\d+\.\d+", extension.build["cuda_archs"]), key=float, default=None)
    return oldest is not None and torch.cuda.get_device_capability(device) >= tuple(
        map(int, oldest.split("."))
    )


def raise_singular() -> None:
    """See :func:`fastflow.ops.raise_singular`."""
    if extension.cuda and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            # without a context, synchronizing would create one, which takes hundreds of MB
            if torch._C._cuda_hasPrimaryContext(device):  # pyright: ignore[reportAttributeAccessIssue] # not in its stub
                torch.cuda.synchronize(device)
        _raise_singular("fastflow_C")
    if extension.emulator:
        _raise_singular("fastflow_emulated")


def _raise_singular(namespace: str) -> None:
    try:
        getattr(torch.ops, namespace).raise_singular.default()
    except RuntimeError as error:
        raise_argument_error(error)
        raise


_triton_works = True  # False after a kernel could not be built, for lack of a C compiler


@functools.cache
def triton_kernels(module: str) -> ModuleType | None:
    """Returns ``fastflow.triton_kernels.MODULE``, or None if triton is not installed.

    The module is imported on first use, because importing triton takes a second.
    """
    try:
        return importlib.import_module(f"fastflow.triton_kernels.{module}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


def _runs_kernels(device: torch.device) -> bool:
    """Whether the backend runs Triton kernels on this device.

    Raises RuntimeError if the backend is ``"triton"`` and Triton cannot run.
    """
    if _backend == "auto":
        return device.type == "cuda" and _triton_works and triton_kernels("tiles") is not None
    if _backend == "triton":
        tiles = triton_kernels("tiles")
        if tiles is None:
            raise RuntimeError(
                'backend: got "triton", which needs the package triton, expected "auto" or "reference": '
                "triton is not installed"
            )
        if device.type == "cpu" and not tiles.INTERPRETED:
            raise RuntimeError(
                'backend: got "triton" with tensors on the CPU, expected TRITON_INTERPRET=1 in the '
                'environment before Python starts, or the backend "auto" or "reference"'
            )
    return _backend == "triton"


def _needs_c_compiler(error: Exception) -> bool:
    """Whether Triton failed to build its launcher: no C compiler, or it failed (e.g. without Python.h)."""
    return isinstance(error, subprocess.CalledProcessError) or "Failed to find C compiler" in str(error)


def _disable_triton(error: Exception) -> None:
    global _triton_works
    if _triton_works:
        _triton_works = False
        warnings.warn(
            f"Triton cannot build its kernels, so ops run in PyTorch, slower and with more memory: {error}. "
            "Install a C compiler (or name one in CC) to use the kernels.",
            stacklevel=2,
        )
