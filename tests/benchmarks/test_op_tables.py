"""The tables in docs/backends.md follow from the ops' registrations and specs, and so do the benchmarks."""

import shutil

import pytest

from benchmarks.tools import harness, op_tables
from fastflow.ops import spec
from fastflow.ops.registry import OPS, folders

PAGE = harness.ROOT / "docs" / "backends.md"


def test_the_tables_in_the_docs_are_those_of_the_specs(tmp_path):
    page = shutil.copy(PAGE, tmp_path / "backends.md")
    op_tables.main(["--out", str(page)])
    assert page.read_text() == PAGE.read_text(), "python -m benchmarks.tools.op_tables"


def test_every_registered_op_is_in_the_table_of_implementations():
    cells = " ".join(line.split("|")[1] for line in op_tables.implementations().splitlines()[2:])
    assert sorted(cells.replace(",", "").replace("`", "").split()) == sorted(OPS)


def test_limits_name_ops_and_devices():
    assert {
        (op, device) for op, device in op_tables.limits() if op not in OPS or device not in ("cuda", "cpu")
    } == set()


def test_each_folder_of_ops_has_a_benchmark():
    assert {*folders()} <= harness.with_cases().keys()


def test_bytes_of_a_case():
    assert spec.bytes_per_element("actnorm", "forward") == 8
    assert spec.bytes_per_element("conv1x1_inverse_backward") == 16
    for op, variant in (("actnorm", "sideways"), ("lu_weight", "")):
        with pytest.raises(ValueError, match=f"got '{variant}' of {op}, expected a case with bytes_moved"):
            spec.bytes_per_element(op, variant)
