"""What was built works, and what is packed holds what it must."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fastflow.ops import extension
from fastflow.ops.registry import OPS

ROOT = Path(__file__).parents[2]
DATA = {"fastflow/py.typed", "fastflow/nn/networks/glow_network.json"}


def test_a_compiler_means_an_extension():
    assert extension.cpu == (shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None)
    if extension.cpu:
        assert set(extension.build) == {"torch", "compiler", "cpu_targets", "cuda", "cuda_archs", "emulator"}
    # tests of the emulator are skipped without one
    assert extension.emulator == extension.cpu, (
        "build the extension with FASTFLOW_EMULATOR=1, as `make setup`"
    )


@pytest.mark.skipif(
    not extension.cuda, reason="the CUDA extension was not built here: no nvcc, or no CUDA build of torch"
)
def test_every_op_of_the_extension_has_each_body():
    compiled = {name: op.compiled for name, op in OPS.items() if op.compiled}
    assert compiled
    for name, devices in compiled.items():
        places = [("fastflow_C", device.upper()) for device in devices]
        if "cuda" in devices:
            places.append(("fastflow_emulated", "CPU"))
        for namespace, key in places:
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)
            assert found, (namespace, name, key)
    assert extension.build["cuda"] and extension.build["cuda_archs"]


# The wheel's ops give what the reference gives, gradients too.
USE = """
import torch, fastflow
from fastflow.models import Glow
from fastflow.ops import extension, triangular_solve, uniform_noise
import fastflow.triton_kernels as kernels

def run():
    torch.manual_seed(0)
    model = Glow((3, 8, 8), levels=2, steps=1, hidden=4)
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    model.initialize(x, seed=0)
    loss = model(x, seed=1).mean()
    loss.backward()
    A, B = 2 * torch.eye(3).expand(2, 3, 3), torch.ones(2, 3, 4)
    sample = model.sample(2, generator=torch.Generator().manual_seed(3)).float()
    return loss, sample, triangular_solve(A, B, upper=True), *[p.grad for p in model.parameters()]

found, noise = run(), uniform_noise((3, 70), seed=5)
with fastflow.backend("reference"):
    torch.testing.assert_close(found, run(), rtol=1e-4, atol=1e-4)
    assert torch.equal(noise, uniform_noise((3, 70), seed=5))
try:
    fastflow.backend("emulated")
except RuntimeError as error:
    assert "FASTFLOW_EMULATOR=1" in str(error)
else:
    raise AssertionError("a wheel with the emulator")
print(extension.cpu, extension.cuda, extension.build["cpu_targets"] if extension.cpu else "none", kernels.__file__)
"""

# In one process, which imports torch once; an index would do the same in two.
PACK = """
import os, sys, tarfile
from setuptools import build_meta
out = sys.argv[1]
sdist = os.path.join(out, build_meta.build_sdist(out))
tarfile.open(sdist).extractall(out)
os.chdir(sdist.removesuffix(".tar.gz"))
build_meta.build_wheel(out)
"""


# Compiles torch's headers once: the first file that includes them makes the precompiled header, with its own options.
# A file that comes too early for it, and a compiler that refuses it, read the header's text.
COMPILER = """#!/bin/sh
case " $* " in
  *"/module.cpp "*) ;;
  *" -c "*)
    if mkdir {folder}/precompiling 2>/dev/null; then
      (
        for word; do
          shift
          case $word in -c | -MMD | -MF | *.cpp | *.o | *.d) ;; *) set -- "$@" "$word" ;; esac
        done
        {compiler} "$@" {options} -x c++-header {folder}/headers.h -o {folder}/headers.tmp
      ) && mv {folder}/headers.tmp {folder}/headers.h.gch
    fi
    exec {compiler} "$@" {options} -include {folder}/headers.h ;;
esac
exec {compiler} "$@" {options}
"""


def other_compiler(folder):
    """The C++ compiler as elsewhere: without versions for AVX2 and AVX-512, as clang and ARM get none.

    -O0 after the build's own -O3 takes a third of the time, and one precompiled header half of that; `make setup`
    compiles at -O3, each file with its own headers.
    """
    headers = ["stable.h", "algorithm", "optional", "string", "tuple", "type_traits", "vector"]
    (folder / "headers.h").write_text("".join(f"#include <{name}>\n" for name in headers))
    script, compiler = folder / "c++", os.environ.get("CXX", "c++")
    options = "-O0 -DFASTFLOW_ONE_VERSION"
    script.write_text(COMPILER.format(folder=folder, compiler=compiler, options=options))
    script.chmod(0o755)
    return script


def pack(out):
    """An sdist, and the wheel built from that sdist; without CUDA, whose compilation alone takes half a minute.

    Users' wheels do not have the emulator, and `make setup` compiles it.
    """
    skip = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "data", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, out / "tree", ignore=skip)
    env = {**os.environ, "FASTFLOW_CUDA": "0", "FASTFLOW_EMULATOR": "", "CCACHE_DISABLE": "1"}
    if extension.cpu:
        env["CXX"] = str(other_compiler(out))
    done = subprocess.run(
        [sys.executable, "-c", PACK, out], cwd=out / "tree", env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "CUDA extension: left out: FASTFLOW_CUDA=0" in done.stdout
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_sdist_and_wheel(tmp_path):
    """One test, since parallel workers would each build for their own."""
    sdist, wheel = pack(tmp_path)
    sdist_holds_all_sources(sdist, tmp_path / "tree")
    wheel_works_outside_the_checkout(wheel, tmp_path / "site")


def sdist_holds_all_sources(sdist, tree):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for folder, pattern in [
        ("csrc", "*.*"),
        ("triton_kernels", "*.py"),
        ("fastflow", "*.py"),
        ("tests", "*.py"),
    ]:
        assert {str(path.relative_to(tree)) for path in (tree / folder).rglob(pattern)} <= names
    assert {"LICENSE", "README.md", "Makefile", "setup.py", "pyproject.toml", *DATA} <= names
    assert not [name for name in names if name.endswith(".so")]


def wheel_works_outside_the_checkout(wheel, site):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert {"fastflow/triton_kernels/__init__.py", *DATA} <= names
    assert not [name for name in names if name.startswith(("tests", "csrc", "triton_kernels", "benchmarks"))]
    assert bool([name for name in names if name.startswith("fastflow/_C.")]) == extension.cpu
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", USE], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    targets = "default" if extension.cpu else "none"
    assert done.stdout.split() == [
        str(extension.cpu),
        "False",
        targets,
        f"{site}/fastflow/triton_kernels/__init__.py",
    ]
