"""Decides which of the two extensions can be built here; everything that is fixed stands in pyproject.toml.

``fastflow._C`` needs a C++ compiler and Python's headers, ``fastflow._cuda`` also a CUDA build of torch and nvcc of the
same major version; a visible GPU is never asked for.  What is missing is said in the output and left out: FastFlow then runs its PyTorch
reference.  ``FASTFLOW_CUDA=1`` turns a missing CUDA part into an error, ``FASTFLOW_CUDA=0`` leaves it out.
``FASTFLOW_EMULATOR=1`` also builds the CUDA kernels for the CPU, for tests, a minute of compilation.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path


def find_cuda_home() -> Path | None:
    """The toolkit's root.  torch's own guess, two folders above nvcc, is wrong where nvcc is a wrapper script."""
    if "CUDA_HOME" in os.environ:
        roots = [Path(os.environ["CUDA_HOME"])]
    else:
        nvcc = shutil.which("nvcc")
        roots = [Path(nvcc).resolve().parent.parent] if nvcc else []
        roots.append(Path("/usr/local/cuda"))
    return next(
        (r for r in roots if (r / "include/cuda_runtime.h").exists() and (r / "bin/nvcc").exists()), None
    )


# pip's ninja lies beside python, a folder that need not be on PATH; without ninja torch compiles one file after the other
os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"

cuda_home = find_cuda_home()
if cuda_home:  # before torch is imported, which reads it once
    os.environ["CUDA_HOME"] = str(cuda_home)
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")  # PTX: later chips start too

import pybind11  # noqa: E402
import torch  # noqa: E402
from setuptools import find_packages, setup  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def cuda_toolkit_version() -> str:
    out = subprocess.run(
        [f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return re.search(r"release (\d+\.\d+)", out)[1]


def switch(name: str) -> str:
    """The value of an environment variable that is 0, 1 or unset."""
    wish = os.environ.get(name, "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"fastflow: {name} is {wish!r}, expected 0, 1 or unset")
    return wish


def why_no_cpp() -> str | None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler} is not on PATH; CXX names another)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"no {header} (Debian and Ubuntu have it in python3-dev)"


def why_no_cuda() -> str | None:
    if switch("FASTFLOW_CUDA") == "0":
        return "FASTFLOW_CUDA=0"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    if not cuda_home:
        return "no nvcc (looked at CUDA_HOME, PATH and /usr/local/cuda)"
    if cuda_toolkit_version().split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {cuda_toolkit_version()}, torch of CUDA {torch.version.cuda}: majors must be equal"
    return None


def extensions() -> list:
    wish, emulator = switch("FASTFLOW_CUDA"), switch("FASTFLOW_EMULATOR") == "1"
    no_cpp = why_no_cpp()
    no_cuda = no_cpp or why_no_cuda()
    if wish == "1" and no_cuda:
        raise SystemExit(f"fastflow: FASTFLOW_CUDA=1, but the CUDA extension cannot be built: {no_cuda}")
    print(f"fastflow: C++ extension: {f'left out: {no_cpp}' if no_cpp else 'built'}")
    print(f"fastflow: CUDA extension: {f'left out: {no_cuda}' if no_cuda else 'built'}")
    if no_cpp:
        return []

    sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp") if emulator or p.stem != "emulated")
    headers = sorted(str(p) for p in Path("csrc").rglob("*.*h"))
    cuda_version, archs = (
        ("", "") if no_cuda else (cuda_toolkit_version(), os.environ["TORCH_CUDA_ARCH_LIST"])
    )
    built = [
        CppExtension(
            "fastflow._C",
            sources,
            include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
            define_macros=[
                ("FASTFLOW_CUDA", f'"{cuda_version}"'),
                ("FASTFLOW_CUDA_ARCHS", f'"{archs}"'),
                ("FASTFLOW_EMULATOR", '"1"' if emulator else '""'),
            ],
            # a root is one instruction, of vectors too, where it need not set errno
            extra_compile_args={"cxx": ["-O3", "-g0", "-fno-math-errno"]},
            depends=headers,
        )
    ]
    if not no_cuda:
        # No Python module inside, so torch.ops.load_library opens it; it links libcudart, so it stays apart from _C.
        built.append(
            CUDAExtension(
                "fastflow._cuda",
                sorted(map(str, Path("csrc").rglob("*.cu"))),
                include_dirs=[os.path.abspath("csrc")],
                py_limited_api=True,
                extra_compile_args={"cxx": ["-O3", "-g0"], "nvcc": ["-O3", "--threads=2"]},
                depends=headers,
            )
        )
    return built


setup(
    packages=[*find_packages(include=["fastflow", "fastflow.*"]), "fastflow.triton_kernels"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
