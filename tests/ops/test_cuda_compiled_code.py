"""What nvcc made of the CUDA kernels: no spill on any architecture, no warning, every kernel on the page. No GPU is needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

pytest.importorskip("triton")  # its package has cuobjdump

from benchmarks.tools import cuda_code  # noqa: E402
from fastflow.ops import extension  # noqa: E402

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
pytestmark = pytest.mark.skipif(
    not extension.cuda, reason="the CUDA extension was not built here: no nvcc, or no CUDA build of torch"
)


@pytest.fixture(scope="module")
def found():
    return cuda_code.resources(cuda_code.library())


def test_no_kernel_spills_on_any_architecture(found):
    assert cuda_code.spills(found) == []
    assert all(set(each) == set(cuda_code.ARCHITECTURES) for each in found.values())
    ptx = cuda_code.cuobjdump("--list-ptx", cuda_code.library())
    assert ptx.count(".ptx") == len(SOURCES) and ptx.count("sm_100") == len(
        SOURCES
    )  # so that later chips start too


def test_the_page_says_what_was_built(found):
    text = cuda_code.PAGE.read_text()
    listed, built = cuda_code.listed(text), cuda_code.cells(found)
    assert listed.keys() == built.keys(), "python -m benchmarks.tools.cuda_code writes the page"
    if f"as nvcc {extension.build['cuda']} compiles" in text:  # another one allots other registers
        assert listed == built, "python -m benchmarks.tools.cuda_code writes the page"


STREAMING = ("Conv1x1Kernel<BFloat16, 24>", "Conv1x1BackwardKernel<float, 24, true>")


def test_conv1x1_has_four_loads_in_flight():
    """Two kernels on sm_90, which between them have all paths: rows, planes, single channels."""
    moved = cuda_code.accesses(cuda_code.library(), STREAMING, "sm_90")
    assert moved.keys() == set(STREAMING)
    for kernel, each in moved.items():
        groups = each["sm_90"].wide_groups()
        assert len(groups) >= 2 and min(groups) >= 4, (kernel, groups)
        assert each["sm_90"].narrow_group() >= 8, kernel


def test_loads_in_flight_end_where_one_is_used():
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P1 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/               @P0 BRA 0x50 ;
        /*0030*/                   FADD R12, R0, R1 ;
        /*0040*/                   LDG.E R13, desc[UR4][R2.64+0x20] ;
        /*0050*/                   STS.128 [R0], R8 ;
        /*0060*/                   FADD R13, R13, R1 ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
    """
    assert cuda_code.in_flight(code) == [{16: 2, 4: 1}, {16: 1}, {16: 1}]


def compile_for_sm_90(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    nvcc = shutil.which(
        "nvcc",
        path=os.pathsep.join(
            [f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ["PATH"], "/usr/local/cuda/bin"]
        ),
    )
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem={folder}" for folder in include_paths())]
    command = [nvcc, "-std=c++20", "-arch=sm_90", *includes, *options, source, "-o", out]
    return subprocess.run(command, capture_output=True, text=True)


STRICT = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra")
# Warnings are the front end's. Without its optimizer nvcc takes an eighth of the time; spills are looked for in the
# built library.
FRONT_END = ("-ptx", "-Xcicc", "-O0")


@pytest.mark.slow
def test_no_warning(tmp_path):
    """All sources as one, since torch's headers take most of the time; `make setup` compiles each for itself."""
    together = tmp_path / "all.cu"
    together.write_text("".join(f'#include "{source}"\n' for source in SOURCES))
    assert len(SOURCES) >= 4
    done = compile_for_sm_90(together, tmp_path / "ptx", *FRONT_END, *STRICT)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


def test_the_checks_see_a_stack_and_a_warning(tmp_path):
    source, out = tmp_path / "careless.cu", tmp_path / "careless.cubin"
    source.write_text("""
struct Careless { float* x; int n; };
template <class Kernel> __global__ void run(Kernel k) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = k.x[i];
  int unused;
  kept[k.n] = 1;
  for (int i = 0; i < k.n; ++i) k.x[i] = kept[k.n - i];
}
template __global__ void run<Careless>(Careless);
""")
    assert compile_for_sm_90(source, out, *FRONT_END, *STRICT).returncode != 0
    assert compile_for_sm_90(source, out, "-cubin", "-O3").returncode == 0
    assert cuda_code.spills(cuda_code.resources(out)) == ["Careless on cubin: 256 bytes of stack"]
