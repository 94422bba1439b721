"""Each file with cases writes complete rows, and a provider that computes something else is never timed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.tools import harness
from benchmarks.tools.traffic import Traffic
from tests.support.rows import DEVICES, rows_of

ALWAYS = (
    "name",
    "case",
    "shape",
    "dtype",
    "layout",
    "provider",
    "mode",
    "device",
    "torch",
    "fastflow",
    "date",
)
NUMBERS = ("p20_us", "p50_us", "p80_us", "error", "tolerance", "ratio")


@pytest.fixture
def options(tmp_path):
    return harness.arguments("tiny", ["--quick", "--device", "cpu", "--results", str(tmp_path / "results")])


def double(x):
    return 2 * x


def case(provider, **more) -> harness.Case:
    providers = {"eager": double, "fastflow": provider}
    return harness.Case("doubling", "5x3", torch.float32, lambda: (torch.randn(5, 3),), providers, **more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "script", harness.with_cases().values(), ids=lambda script: script.__name__.split(".")[-1]
)
def test_rows_are_complete(script, device, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(harness.COPIED, device, 1 << 20)  # filling a gigabyte takes longer than the cases
    script.main(["--quick", "--device", device, "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    rows = rows_of(path)
    assert path.stem == script.__name__.split(".")[-1] == rows[0]["name"]
    assert {row["provider"] for row in rows} >= {"eager", "fastflow"}
    cases = script.cases(harness.arguments("tiny", ["--quick", "--device", device]))
    assert {row["mode"] for row in rows} == {mode for case in cases for mode in harness.modes(case)}
    for row in rows:
        assert all(row[column] for column in ALWAYS)
        assert all(float(row[column]) >= 0 for column in NUMBERS)
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["error"]) <= float(row["tolerance"])
        assert float(row["copy_gb_s"]) > 0 and int(row["launches"]) > 0
    cases = [
        tuple(row[column] for column in ("case", "shape", "dtype", "layout", "provider", "mode"))
        for row in rows
    ]
    assert len(set(cases)) == len(rows)
    assert "above 1 is slower" in capsys.readouterr().out


def test_rows_are_added_to_a_file_that_is_there(tmp_path, capsys):
    script, found = harness.with_cases()["triangular_solve"], []
    for _ in range(2):
        found += script.main(["--quick", "--device", "cpu", "--results", str(tmp_path)])
    rows = rows_of(tmp_path / "triangular_solve.csv")
    assert rows == [{column: str(value) for column, value in row.items()} for row in found]
    assert [row["mode"] for row in rows[: len(rows) // 2]] == [row["mode"] for row in rows[len(rows) // 2 :]]


def test_pytest_benchmark_takes_the_cases(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--quick",
        "-q",
        "-k",
        "uniform or (actnorm-inverse and channels_last and not modules)",
        "--benchmark-max-time",
        "0.01",
    ]
    alone = {
        k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")
    }  # beside other workers it measures nothing
    saved = tmp_path / "run.json"
    done = subprocess.run(
        [*command, "--benchmark-json", saved], cwd=harness.ROOT, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(saved.read_text())["benchmarks"]
    assert {
        "noise-uniform-2x3x4x4-float32-contiguous-forward",
        "actnorm-inverse-2x3x5x5-float32-channels_last-forward+backward",
    } <= {each["group"] for each in found}
    for each in found:
        about = each["extra_info"]
        assert (
            float(about["error"]) <= float(about["tolerance"])
            and about["launches"] > 0
            and float(about["copy_gb_s"]) > 0
        )
        assert bool(about["gb_s"]) == (about["mode"] == "forward") and each["stats"]["median"] > 0


def test_a_copy_of_the_same_size_is_timed_with_each_case(options):
    """In forward only, since ``bytes_moved`` counts forward."""
    moving = case(double, gradients_of=(0,), bytes_moved=120)
    rows = harness.run("doubling", [moving, case(double)], options)
    shares = [bool(row["same_size_copy_us"]) for row in rows]
    assert shares == [True, True, False, False, False, False]
    assert rows[0]["same_size_copy_us"] == rows[1]["same_size_copy_us"]
    assert float(rows[0]["same_size_copy_us"]) > 0
    assert {row["provider"] for row in rows} == {"eager", "fastflow"}
    assert {row["captured_us"] for row in rows} == {""}  # on a GPU only


def test_the_copy_moves_as_many_bytes_as_the_case():
    with Traffic() as traffic:
        harness.same_size_copy(120, "cpu")()
    assert traffic.bytes["aten::copy"] == 120


def wrong_gradient(x):
    return 2 * x + (x - x.detach())


@pytest.mark.parametrize(
    "provider, gradients_of, what",
    [
        (lambda x: x + x, (0,), None),
        (lambda x: 2 * x + 1e-3, (), "off by .*e-0"),
        (lambda x: 2 * x[:1], (), "off by inf"),
        (lambda x: x * torch.nan, (), "off by nan"),
        (wrong_gradient, (0,), "backward, output 1: fastflow is off"),
    ],
    ids=["the same otherwise", "an offset", "another shape", "NaN", "a wrong gradient"],
)
def test_a_provider_that_computes_something_else_is_refused(provider, gradients_of, what, options):
    right = case(double)
    wrong = case(provider, gradients_of=gradients_of)
    if what is None:
        assert len(harness.run("doubling", [right, wrong], options)) == 6
    else:
        with pytest.raises(ValueError, match=what):
            harness.run("doubling", [wrong, right], options)
        rows = rows_of(options.results / "doubling.csv")
        assert [row["provider"] for row in rows] == ["eager", "fastflow"] * (len(rows) // 2)
        assert {row["mode"] for row in rows} == {"forward"} and len(rows) == (4 if gradients_of else 2)


def test_no_row_where_a_published_library_is_faster_than_the_reference(options, monkeypatch):
    options.quick = False
    for theirs, written in ((2.0, 3), (1.9, 0)):
        taken = {"eager": [1.0, 2.0, 3.0], "fastflow": [1.0, 1.0, 1.0], "nflows": [1.0, theirs, 3.0]}
        monkeypatch.setattr(
            harness,
            "microseconds",
            lambda calls, *_, t=taken: {name: t.get(name, [1, 1, 1]) for name in calls},
        )
        compared = case(double)
        compared.providers["nflows"] = double
        if written:
            assert len(harness.run("doubling", [compared], options)) == written
        else:
            with pytest.raises(
                ValueError, match="the reference takes 2.0 us, nflows 1.9: a straw man; no row is written"
            ):
                harness.run("doubling", [compared], options)


class Scaled(torch.nn.Module):
    def __init__(self, scale, wrong=0.0):
        super().__init__()
        self.scale, self.wrong = scale, wrong

    def forward(self, x):
        return x * self.scale + self.wrong * (self.scale - self.scale.detach())


def test_modules_are_compared_in_float64_with_the_gradients_of_shared_parameters(options):
    scale = torch.nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
    right, wrong = case(Scaled(scale), gradients_of=(0,)), case(Scaled(scale, wrong=1e-9), gradients_of=(0,))
    for each in (right, wrong):
        each.providers["eager"] = Scaled(scale)
    assert {(row["tolerance"], row["dtype"]) for row in harness.run("scaling", [right], options)} == {
        ("1.0e-12", "float32")
    }
    with pytest.raises(
        ValueError, match="float64 contiguous forward.backward, output 2: fastflow is off by .*e-1[01]"
    ):
        harness.run("scaling", [wrong], options)
    assert scale.dtype == torch.float64  # what is timed is a copy


def test_new_columns_are_empty_in_older_rows(tmp_path):
    path = tmp_path / "rows.csv"
    harness.append(path, [{"a": 1, "b": 2}])
    harness.append(path, [{"a": 3, "c": 4}])
    assert rows_of(path) == [{"a": "1", "c": "", "b": "2"}, {"a": "3", "c": "4", "b": ""}]
