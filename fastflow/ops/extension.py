"""Loads the C++ and CUDA extensions, whose ops are ``torch.ops.fastflow_C``.

``cpu`` and ``cuda`` are True if the extension is loaded, and ``emulator`` if it has the CUDA kernels for the
CPU, for tests. ``build`` has its build settings. A missing extension is not an error, because every op has a
PyTorch fallback. An extension that is present but does not load gives one warning with the reason, which
``missing`` keeps.
"""

import importlib
import warnings
from pathlib import Path

import torch

cpu: bool = False
cuda: bool = False
emulator: bool = False
build: dict[str, str] = {}
missing: dict[str, str] = {}


def _load_cpu() -> None:
    global cpu, emulator
    try:
        module = importlib.import_module("fastflow._C")
    except ModuleNotFoundError:
        return
    except ImportError as error:
        _warn("fastflow._C", error)
    else:
        cpu = True
        build.update(module.build)
        emulator = bool(build.get("emulator"))


def _load_cuda() -> None:
    global cuda
    for library in Path(__file__).parents[1].glob("_cuda.*"):
        try:
            torch.ops.load_library(library)
        except OSError as error:
            _warn("fastflow._cuda", error)
        else:
            cuda = True


def _warn(name: str, error: Exception) -> None:
    missing[name] = f"is installed but does not load: {error}"
    warnings.warn(f"{name} is installed but does not load, so its ops run in PyTorch: {error}", stacklevel=3)


_load_cpu()
# without CUDA in the build of _C, a CUDA library is left over from an earlier build
if cpu and build["cuda"]:
    _load_cuda()
