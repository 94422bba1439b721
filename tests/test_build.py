"""What was built works, and what is packed holds what it must."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch

from fastflow.ops import extension

ROOT = Path(__file__).parents[1]
VARIANTS = list(product([False, True], repeat=3))  # upper, unit_diagonal, transpose
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
needs_cpu = pytest.mark.skipif(not extension.cpu, reason="the C++ extension was not built here: no compiler")


def solve(A, B, upper=False, unit_diagonal=False, transpose=False):
    return torch.ops.fastflow_C.triangular_solve(A, B, upper, unit_diagonal, transpose)


def expected(A, B, upper=False, unit_diagonal=False, transpose=False):
    op_A = A.mT if transpose else A
    return torch.linalg.solve_triangular(op_A, B, upper=upper != transpose, unitriangular=unit_diagonal)


def system(K, n, m, dtype=torch.float64, device="cpu"):
    A = torch.randn(K, n, n, dtype=dtype) / max(n, 1) + 2 * torch.eye(n, dtype=dtype)
    return A.to(device), torch.randn(K, n, m, dtype=dtype).to(device)


def test_a_compiler_means_an_extension():
    assert extension.cpu == (shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None)
    if extension.cpu:
        assert set(extension.build) == {"torch", "compiler", "cpu_targets", "cuda", "cuda_archs"}


@needs_cpu
@pytest.mark.parametrize("upper, unit_diagonal, transpose", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, n, m", [(1, 1, 1), (3, 1, 33), (4, 5, 7), (48, 12, 12), (2, 40, 65), (1, 96, 3)])
def test_solve(K, n, m, dtype, upper, unit_diagonal, transpose):
    A, B = system(K, n, m, dtype)
    # Only the named triangle may be read, so the rest is poison.
    unread = torch.ones(n, n, dtype=torch.bool).triu(1) if not upper else torch.ones(n, n, dtype=torch.bool).tril(-1)
    if unit_diagonal:
        unread = unread | torch.eye(n, dtype=torch.bool)
    X = solve(A.masked_fill(unread, torch.nan), B, upper, unit_diagonal, transpose)
    torch.testing.assert_close(X, expected(A, B, upper, unit_diagonal, transpose), rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert X.is_contiguous()


@needs_cpu
@pytest.mark.parametrize("K, n, m", [(0, 3, 2), (2, 3, 0), (2, 0, 3), (0, 0, 0)])
def test_solve_of_nothing(K, n, m):
    assert solve(*system(K, n, m)).shape == (K, n, m)


@needs_cpu
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [5, 40])  # above 32 the body copies a matrix that it would walk down the columns
def test_solve_takes_any_strides(n, transpose):
    A, B = system(3, n, 9)
    torch.testing.assert_close(
        solve(A.mT, B.mT.contiguous().mT, True, False, transpose), solve(A.mT.contiguous(), B, True, False, transpose)
    )
    wide = torch.cat([B, B], 2)[:, :, 4:13]
    torch.testing.assert_close(solve(A, wide, transpose=transpose), solve(A, wide.contiguous(), transpose=transpose))
    shared = A[:1].expand(3, n, n)
    torch.testing.assert_close(solve(shared, B, transpose=transpose), solve(shared.contiguous(), B, transpose=transpose))


@needs_cpu
def test_solve_many_right_hand_sides():
    """Past 524,288 columns: a batch of 512 images at 32x32, where cuBLAS fails."""
    A, B = system(1, 4, 524_289)
    torch.testing.assert_close(solve(A, B), expected(A, B))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solve_same_bits_however_it_is_split(dtype):
    A, B = system(3, 48, 333, dtype)
    X, threads = solve(A, B), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(solve(A, B), X)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(solve(A, B[:, :, 100:111]), X[:, :, 100:111])
    assert torch.equal(solve(A[1:2], B[1:2]), X[1:2])


@needs_cpu
@pytest.mark.parametrize(
    "A, B, message",
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 1), r"A has shape \[2, 3\], expected \[K, n, n\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), r"A has shape \[2, 3, 4\], expected \[K, n, n\]"),
        (
            torch.zeros(2, 3, 3),
            torch.zeros(2, 4, 1),
            r"B has shape \[2, 4, 1\], expected \[K, n, m\] with K = 2 and n = 3",
        ),
        (
            torch.zeros(2, 3, 3),
            torch.zeros(1, 3, 1),
            r"B has shape \[1, 3, 1\], expected \[K, n, m\] with K = 2 and n = 3",
        ),
        (torch.zeros(2, 3, 3).half(), torch.zeros(2, 3, 1).half(), "A has dtype Half, expected Float or Double"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 3, 1).double(), "B has dtype Double, expected A's, Float"),
    ],
)
def test_solve_errors_say_what_came_and_what_was_expected(A, B, message):
    with pytest.raises(RuntimeError, match=message):
        solve(A, B)


@pytest.mark.skipif(not extension.cuda, reason="the CUDA extension was not built here: no nvcc, or no CUDA build of torch")
def test_cuda_extension_registers_its_body():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastflow_C::triangular_solve", "CUDA")
    assert extension.build["cuda"] and extension.build["cuda_archs"]


@pytest.mark.gpu
@pytest.mark.parametrize("upper, unit_diagonal, transpose", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, n, m", [(0, 3, 2), (3, 1, 33), (48, 12, 12), (2, 40, 65), (1, 4, 524_289)])
def test_solve_on_cuda(K, n, m, dtype, upper, unit_diagonal, transpose):
    A, B = system(K, n, m, dtype)
    X = solve(A.cuda(), B.cuda(), upper, unit_diagonal, transpose).cpu()
    torch.testing.assert_close(X, solve(A, B, upper, unit_diagonal, transpose), rtol=DTYPES[dtype], atol=DTYPES[dtype])


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


def pack(out):
    """An sdist, and the wheel built from that sdist; without CUDA, whose compilation alone takes half a minute."""
    skip = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "data", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, out / "tree", ignore=skip)
    env = {**os.environ, "FASTFLOW_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", PACK, out], cwd=out / "tree", env=env, capture_output=True, text=True)
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
    for folder, pattern in [("csrc", "*.*"), ("triton_kernels", "*.py"), ("fastflow", "*.py"), ("tests", "*.py")]:
        assert {str(path.relative_to(tree)) for path in (tree / folder).rglob(pattern)} <= names
    assert {"LICENSE", "README.md", "Makefile", "setup.py", "pyproject.toml", "fastflow/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so")]


def wheel_works_outside_the_checkout(wheel, site):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert {"fastflow/triton_kernels/__init__.py", "fastflow/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "csrc", "triton_kernels", "benchmarks"))]
    assert bool([name for name in names if name.startswith("fastflow/_C.")]) == extension.cpu
    code = (
        "import torch, fastflow.triton_kernels as t; from fastflow.ops import extension, triangular_solve\n"
        "A, B = 2 * torch.eye(3).expand(2, 3, 3), torch.ones(2, 3, 4)\n"
        "print(triangular_solve(A, B, upper=True).sum().item(), extension.cpu, extension.cuda, t.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "12.0",
        str(extension.cpu),
        "False",
        f"{site}/fastflow/triton_kernels/__init__.py",
    ]
