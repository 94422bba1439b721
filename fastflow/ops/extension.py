"""The compiled ops, where they were built: importing this registers ``torch.ops.fastflow_C``.

``cpu`` and ``cuda`` tell which bodies are there, ``build`` with what they were built.  One that is absent is left out
in silence, since FastFlow is whole without it; one that is there and does not load gives one warning with the reason.
"""

import importlib
import warnings
from pathlib import Path

import torch

cpu: bool = False
cuda: bool = False
build: dict[str, str] = {}


def _load_cpu() -> None:
    global cpu
    try:
        module = importlib.import_module("fastflow._C")
    except ModuleNotFoundError:
        return
    except ImportError as error:
        _warn("fastflow._C", error)
    else:
        cpu = True
        build.update(module.build)


def _load_cuda() -> None:
    global cuda
    for library in Path(__file__).parents[1].glob("_cuda.*"):
        try:
            torch.ops.load_library(library)
        except OSError as error:
            _warn(library.name, error)
        else:
            cuda = True


def _warn(name: str, error: Exception) -> None:
    warnings.warn(
        f"{name} is installed but does not load, so its ops run from PyTorch: {error}", stacklevel=3
    )


_load_cpu()
if (
    cpu and build["cuda"]
):  # _C registers the schemas of the CUDA bodies, and knows whether a library is only left over
    _load_cuda()
