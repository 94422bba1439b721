"""What runs here, and why not: versions, extensions, kernels and devices, for people and for reports of bugs."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastflow
from fastflow.ops import dispatch, extension

PACKAGES = (
    "numpy",
    "triton",
    "torchvision",
    "torchdiffeq",
    "nflows",
    "glasflow",
    "zuko",
    "normflows",
    "FrEIA",
)
VARIABLES = (
    "FASTFLOW_",
    "TRITON_",
    "TORCH",
    "PYTORCH_",
    "CUDA_VISIBLE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def info() -> str:
    """Versions, what each device runs, and what is missing, as text; what ``python -m fastflow info`` prints.

    Example:
        >>> import fastflow
        >>> fastflow.info().startswith("fastflow")
        True
    """
    lines = {
        "fastflow": f"{fastflow.__version__}, commit {commit()}" if commit() else fastflow.__version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "C++ extension": _cpp(),
        "CUDA extension": _cuda(),
        "on the CPU": "compiled C++" if extension.cpu else "PyTorch, slower and with more memory",
        **{f"cuda:{i}": _device(i) for i in range(torch.cuda.device_count())},
    }
    if not torch.cuda.is_available():
        lines["GPU"] = "none that torch can use" if torch.version.cuda else "none: torch is no CUDA build"
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    lines["environment"] = (
        " ".join(f"{k}={v}" for k, v in variables.items()) or "no variable of FastFlow, Triton or torch"
    )
    return "\n".join(f"{name:15} {text}" for name, text in lines.items())


@functools.cache
def commit() -> str | None:
    """Short hash of the checkout's commit, with "-dirty" if its files changed; None outside a checkout, and without git."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--exclude=*", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=checkout, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _cpp() -> str:
    if not extension.cpu:
        return extension.missing.get(
            "fastflow._C",
            "not built: a C++ compiler and Python's headers were not both there when fastflow was installed",
        )
    build = extension.build
    return (
        f"for torch {build['torch']}, by compiler {build['compiler']}, with code for {build['cpu_targets']}"
    )


def _cuda() -> str:
    if extension.cuda:
        return f"of CUDA {extension.build['cuda']}, with code for {extension.build['cuda_archs']}"
    if reason := extension.missing.get("fastflow._cuda"):
        return reason
    return "not built: nvcc and a CUDA build of torch, of one major version, were not both there"


def _device(index: int) -> str:
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    triton = "Triton kernels" if dispatch.triton_kernels("tiles") is not None else "no Triton: PyTorch"
    cuda = (
        "CUDA kernels"
        if dispatch.has_code_for(device)
        else "no CUDA kernels for this GPU: PyTorch in their place"
    )
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, {memory:.0f} GiB: {triton}; {cuda}"
