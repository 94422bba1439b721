"""Every kernel compiled for the GPUs of three generations, in a process of its own: where kernels are interpreted, none compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

DEFECTS = """
for spec in chosen(specs):
    for capability in CAPABILITIES:
        for fault in triton_code.defects(spec, triton_code.compiled(spec, capability), capability):
            print(f"sm_{capability}", *spec.row(), fault, sep=", ")
"""

RECORDED = """
import importlib, pkgutil
import fastflow.triton_kernels
from triton.runtime.jit import JITFunction

modules = [importlib.import_module(f"fastflow.triton_kernels.{m.name}") for m in pkgutil.iter_modules(fastflow.triton_kernels.__path__)]
written = {name for m in modules for name, v in vars(m).items() if isinstance(v, JITFunction) and name.endswith("_kernel")}
print("never launched:", written - {spec.kernel for spec in specs})
print("given no images:", *sorted({spec.kernel for spec in specs} - {spec.kernel for spec in specs if spec.images}))
recorded = {kernel: (shared, set(rows)) for kernel, (shared, rows) in triton_code.described(specs).items()}
listed = triton_code.listed(triton_code.PAGE.read_text())
print("not as on the page:", [kernel for kernel in recorded.keys() | listed.keys() if recorded.get(kernel) != listed.get(kernel)])
"""

# Each kernel in each dtype and layout, and with each constant; not in all products of these, at all levels of Glow.
CHOSEN = """
def chosen(specs):
    def parts(spec):
        constants = (v for v in spec.variant() if not v.startswith(("splits", "blocks", "precision")))
        return {(spec.kernel, spec.dtype, spec.layout), *((spec.kernel, v) for v in constants)}

    missing, found = set().union(*map(parts, specs)), []
    while missing:
        found.append(max(specs, key=lambda spec: len(parts(spec) & missing)))
        missing -= parts(found[-1])
    return found
"""

DEFECTS_OF_WORSE = """
from dataclasses import replace
spec = next(s for s in specs if s.kernel == "affine_coupling_backward_kernel" and s.layout == "contiguous")
for changed in (
    spec,
    replace(spec, attrs=()),
    replace(spec, attrs=spec.attrs[1:]),  # the first pointer alone
    replace(spec, options=(*spec.options, ("maxnreg", 24))),
):
    found = triton_code.compiled(changed, 90)
    print(len(triton_code.defects(changed, found, 90)))
print(*triton_code.defects(spec, replace(found, stack=0, shared=(227 << 10) + 1), 90))
for rows in (64, 16):
    products = triton_code.Counter({"mma.sync": 1})
    print(*triton_code.defects(spec, replace(found, stack=0, product_rows=rows, products=products), 90))
"""

PREDICTED = """
import torch
from benchmarks.tools import bandwidth
text = bandwidth.PAGE.read_text()
listed = bandwidth.listed(text)
some = bandwidth.recorded([torch.bfloat16], ["channels_last"], bandwidth.SHAPES[:1])
print("not on the page:", some.keys() - listed.keys())
if f"by Triton {bandwidth.triton.__version__}," in text:  # another one allots other registers
    row, (spec, launch) = min(some.items(), key=lambda item: item[0])
    found = bandwidth.cells(bandwidth.predict(bandwidth.code_of(spec, launch), spec.warps(), launch))
    if found != listed[row]:
        print(row, "has", found, "and not", listed[row])
"""

EVERY = """
def chosen(specs):
    return specs
"""

BETWEEN = "--- the next part ---"


def run(cache: Path, *parts: str) -> list[str]:
    """Output of each part, in one process with ``triton_code`` and ``specs``; its cache is empty, so that all is compiled."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTFLOW_BACKEND")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    between = f"print({BETWEEN!r}, end='')\n"
    script = "from benchmarks.tools import triton_code\nspecs = triton_code.recorded()\n" + between.join(
        parts
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(BETWEEN)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    parts = {
        "defects": "CAPABILITIES = (90,)" + CHOSEN + DEFECTS,
        "recorded": RECORDED,
        "defects of worse kernels": DEFECTS_OF_WORSE,
        "predicted": PREDICTED,
    }
    return dict(zip(parts, run(tmp_path_factory.mktemp("cache"), *parts.values()), strict=True))


def test_no_kernel_spills_or_moves_less_than_16_bytes_at_a_time(found):
    """On sm_90, each dtype, layout and constant of a kernel; `benchmarks.tools.triton_code` compiles all, for three generations."""
    assert not found["defects"], found["defects"]


@pytest.mark.gpu
def test_no_kernel_spills_on_any_generation(tmp_path):
    (defects,) = run(tmp_path, "CAPABILITIES = (80, 90, 100)" + EVERY + DEFECTS)
    assert not defects, defects


def test_every_kernel_is_recorded_and_on_the_page(found):
    # the width of loads is checked of images: only what sums over programs may be given none
    expected = "never launched: set()\ngiven no images: merge_statistics_kernel sum_slots_kernel\nnot as on the page: []\n"
    assert found["recorded"] == expected, "python -m benchmarks.tools.triton_code writes the page"


def test_the_check_sees_a_misaligned_pointer_a_scalar_load_a_spill_and_slow_products(found):
    shared, products = "takes 232449 of 232448 bytes of shared memory", "multiplies matrices without wgmma"
    assert found["defects of worse kernels"] == f"0\n2\n1\n1\n{shared}\n{products}\n\n"


# Kernels that are predicted to miss what is expected of a dtype, in percent of a copy; the page has the reasons.
CHANNELS_LAST, FEW, MANY = "channels_last", "12 × 16 × 16", "48 × 16 × 16"
MISSED = {
    ("affine_coupling_kernel", "bfloat16", CHANNELS_LAST, MANY): 55,
    ("bias_relu_backward_kernel", "float32", CHANNELS_LAST, FEW): 79,
    ("bias_relu_backward_kernel", "float32", CHANNELS_LAST, MANY): 79,
    ("dequantize_kernel", "bfloat16", CHANNELS_LAST, FEW): 38,
    ("dequantize_kernel", "bfloat16", CHANNELS_LAST, MANY): 54,
    ("dequantize_kernel", "float32", CHANNELS_LAST, FEW): 65,
    ("dequantize_kernel", "float32", CHANNELS_LAST, MANY): 80,
}


def test_kernels_are_predicted_to_reach_a_share_of_a_copys_bandwidth():
    from benchmarks.tools import bandwidth

    assert bandwidth.EXPECTED == {"float32": 85, "bfloat16": 75}
    rows = bandwidth.listed(bandwidth.PAGE.read_text())
    assert len(rows) == 80
    assert bandwidth.missed(rows) == MISSED


def test_the_page_of_predictions_is_of_this_code(found):
    assert found["predicted"] == "not on the page: set()\n", (
        "python -m benchmarks.tools.bandwidth writes the page"
    )
