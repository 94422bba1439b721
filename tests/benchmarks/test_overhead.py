"""Host time per call: a row for every op; run as a file, it measures the FastFlow that is installed."""

import subprocess
import sys

import pytest

from benchmarks.tools import harness, overhead
from fastflow import ops
from tests.support.rows import DEVICES, rows_of

NOT_OPS = {"SingularError", "acc_dtype", "backend", "checkerboard_transformed", "positions", "raise_singular"}


@pytest.mark.parametrize("device", DEVICES)
def test_each_op_has_a_row(device, tmp_path, capsys):
    rows = overhead.main(["--quick", "--device", device, "--results", str(tmp_path)])
    assert {row["op"] for row in rows if row["mode"] == "forward"} == {*ops.__all__} - NOT_OPS
    assert {row["op"] for row in rows if row["mode"] == "forward+backward"} >= {"actnorm", "squeeze2d"}
    assert all(float(row["us"]) > 0 for row in rows)
    assert rows_of(tmp_path / "overhead.csv") == rows
    assert "| actnorm | forward+backward |" in capsys.readouterr().out


def test_as_a_file_it_measures_another_fastflow(tmp_path):
    other = tmp_path / "fastflow"
    other.mkdir()
    (other / "__init__.py").write_text('raise SystemExit("the other one")')
    file = harness.ROOT / "benchmarks" / "tools" / "overhead.py"
    run = f"runpy.run_path({str(file)!r}, run_name='__main__')"
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); {run}"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == "the other one"
