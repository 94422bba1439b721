"""The benchmark scripts run on tiny sizes, their rows are complete, and a provider that computes something else is never timed."""

import argparse
import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.models import (
    glow,
    inverse_precision,
    memory,
    photos,
    published,
    reversible_gradients,
    reversible_soak,
    training_speed,
)
from benchmarks.tools import harness, profile, report
from benchmarks.tools.traffic import Traffic

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
def test_rows_are_complete(script, device, tmp_path, capsys):
    for _ in range(2):  # the second time to a file that is there
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
    assert cases[: len(rows) // 2] == cases[len(rows) // 2 :] and len(set(cases)) == len(rows) // 2
    assert "above 1 is slower" in capsys.readouterr().out


def test_pytest_benchmark_takes_the_cases(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--quick",
        "-q",
        "-k",
        "uniform or (actnorm and not modules)",
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


@pytest.mark.parametrize("device", DEVICES)
def test_inverse_precision_writes_rows_tables_and_picture(device, tmp_path):
    page = tmp_path / "precision.md"
    shutil.copy(harness.ROOT / "docs" / "precision.md", page)
    inverse_precision.main(
        ["--quick", "--device", device, "--results", str(tmp_path / "results"), "--docs", str(tmp_path)]
    )
    rows = rows_of(tmp_path / "results" / "inverse_precision.csv")
    assert {row["dtype"] for row in rows} == {"float32", "float64", "bfloat16", "float16"}
    assert len({row["way"] for row in rows}) == 5
    assert all(row[column] for row in rows for column in row if column not in ("triton", "commit"))
    assert (tmp_path / "pictures" / "inverse_precision.png").stat().st_size > 10_000
    assert_tables(page, "errors", "ratios", "dtypes", "times")


@pytest.mark.parametrize(
    "kind, setting",
    [(kind, settings[-1]) for kind, settings in inverse_precision.SETTINGS.items() if kind != "trained"],
)
def test_every_way_inverts(kind, setting):
    """In float64: what a table shows is rounding, not a mistake of the benchmark."""
    with torch.no_grad():
        perm, *rest = inverse_precision.parameters(kind, 2, 5, 3)
        rest = [v.double() for v in rest]
        L, U = inverse_precision.triangles(perm, *rest)
        x = torch.randn(3, 5, 7, dtype=torch.float64)
        y = (L @ U @ x).gather(1, perm.unsqueeze(2).expand_as(x))
        for way, inverse in inverse_precision.ways(perm, *rest).items():
            torch.testing.assert_close(inverse(y), x, rtol=1e-9, atol=1e-9, msg=way)


def assert_tables(page: Path, *names: str) -> None:
    for name in names:
        assert (
            "\n| --- | --- |" in page.read_text().split(f"<!-- {name}: ")[1].split(f"<!-- end of {name}")[0]
        )


@pytest.fixture
def memory_page(tmp_path):
    return Path(shutil.copy(harness.ROOT / "docs" / "memory.md", tmp_path))


@pytest.mark.parametrize("device", DEVICES)
def test_memory_writes_rows_tables_and_picture(device, memory_page, tmp_path):
    memory.main(["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)])
    found = {name: rows_of(tmp_path / f"{name}.csv") for name in ("memory", "memory_time", "memory_batch")}
    for name, count in (("memory", 3), ("memory_time", 1)):  # of two depths and two batches one is the same
        assert {row["way"] for row in found[name]} == set(memory.ways()) and len(found[name]) == count * len(
            memory.ways()
        )
    assert [row["way"] for row in found["memory_batch"]] == ["stored", "reversible"]
    for row in found["memory_batch"]:
        assert int(row["largest_batch"]) >= 1 and 0 < float(row["peak_mib"]) <= float(row["limit_mib"])
    assert all(float(row["gradient_error"]) <= 1e-9 for rows in found.values() for row in rows)
    assert_tables(memory_page, "peaks", "largest", "times")
    for what in ("k", "batch"):
        assert [{*ways} for ways in memory.against(what, found["memory"]).values()] == [{*memory.ways()}]
    assert (tmp_path / "pictures" / "memory.png").stat().st_size > 10_000


def test_a_way_with_another_gradient_is_not_measured(monkeypatch):
    options = memory_options(side=8, batch=2, hidden=4)
    assert max(memory.check(options).values()) <= 1e-9
    monkeypatch.setattr(memory, "checkpoint", lambda step, x, **_: step(1.001 * x))
    with pytest.raises(ValueError, match="checkpoint: its gradient is off by .*; no row is written"):
        memory.check(options)


def memory_options(**more):
    return argparse.Namespace(**{"device": "cpu", "quick": True, "limit_mib": 64} | more)


def test_peak_memory_grows_with_stored_activations_alone():
    """Of a small Glow, in MiB for a step more: its activations with hidden 64 are some 5, what reversible backprop adds is Python's."""
    options = memory_options(side=32, batch=32, hidden=64)
    growth = {
        way: memory.growth([(k, memory.peak_of_its_own(way, k, options)[0]) for k in (2, 10)])
        for way in ("stored", "reversible")
    }
    assert growth["reversible"] <= 0.6 and growth["stored"] >= 3, growth


@pytest.mark.parametrize("guess", [1, 2, 16, 17, 30, 33, 100, 1000, 5000])
@pytest.mark.parametrize("fitting", [0, 1, 2, 3, 17, 31, 32, 33, 100, 1000, 4097])
def test_the_largest_batch_is_one_that_was_tried(fitting, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= fitting

    found = memory.largest(fits, guess)
    assert found in [0, *tried] and min(tried) >= 1 and len(set(tried)) == len(tried)
    assert found == fitting if fitting < 32 else fitting * 16 / 17 <= found <= fitting
    if guess == 1:
        doubled = [2**i for i in range(len(tried)) if 2 ** (i - 1) <= fitting]
        assert tried[: len(doubled)] == doubled
    if guess == fitting:
        assert len(tried) == 2


def test_a_batch_that_once_fits_and_once_does_not_is_none_that_failed():
    for threshold in range(1, 9):
        answers = {}
        found = memory.largest(
            lambda batch, a=answers, t=threshold: a.setdefault(batch, batch % 9 < t and batch < 500), 5
        )
        assert found == 0 or answers[found]


def test_the_largest_batch_is_within_the_limit_and_guessed_from_others(monkeypatch):
    """Of 3 MiB and 2 for an image; a way that had no two batches is found all the same."""
    tried = []

    def took(way, k, options):
        tried.append(options.batch)
        return None, 3 + 2.0 * options.batch

    monkeypatch.setattr(memory, "peak_of_its_own", took)
    options = memory_options(limit_mib=43)
    assert memory.largest_batch("stored", 2, [(4, 11.0), (32, 67.0)], options) == (20, 43.0) and tried == [
        20,
        21,
    ]
    assert memory.largest_batch("stored", 2, [(4, 11.0)], options) == (20, 43.0)
    found, mib = memory.largest_batch("stored", 2, [], memory_options(limit_mib=4))
    assert found == 0 and mib != mib


class Refusing:
    """torch.cuda.memory_stats that counts one refusal in between."""

    def __init__(self) -> None:
        self.num_ooms = -1

    def __call__(self) -> dict[str, int]:
        self.num_ooms += 1
        return {"num_ooms": self.num_ooms}


NO_ENGINE = "GET was unable to find an engine to execute this computation"  # cuDNN's words when the allocator refuses its workspace


@pytest.mark.parametrize(
    "error, refusing, fits_not",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False, True),
        (RuntimeError(NO_ENGINE), True, True),
        (RuntimeError(NO_ENGINE), False, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False, False),
        (MemoryError(), False, False),
    ],
)
def test_only_a_gpu_without_memory_is_one_in_which_a_batch_does_not_fit(
    error, refusing, fits_not, monkeypatch
):
    def fail(*_):
        raise error

    monkeypatch.setattr(memory, "peak", fail)
    if refusing:
        monkeypatch.setattr(torch.cuda, "memory_stats", Refusing())
    if fits_not:
        assert memory.peak_or_inf("stored", 2, memory_options()) == (float("inf"), float("inf"))
    else:
        with pytest.raises(type(error)):
            memory.peak_or_inf("stored", 2, memory_options())


def test_a_process_that_fails_is_not_a_batch_that_does_not_fit():
    with pytest.raises(RuntimeError, match=r"stored, K=1, batch 1: [\s\S]*levels"):
        memory.largest_batch("stored", 1, [], memory_options(side=6, hidden=4))


@pytest.mark.gpu
def test_a_gpu_s_batch_fits_until_it_is_out_of_memory():
    options = memory_options(device="cuda", side=32, hidden=16, limit_mib=256)
    found, mib = memory.largest_batch("stored", 2, [], options)
    assert found >= 1 and mib <= 256
    options.batch = 2 * found
    assert memory.peak_of_its_own("stored", 2, options) == (float("inf"), float("inf"))


def test_reversible_gradients_after_20_steps(memory_page, tmp_path, capsys):
    """Float64 to 1e-12; float32 and bfloat16 networks hardly less exact than with stored activations: Glow L=3 K=32 hidden 64.

    Ten batches: float32's errors, stored or not, differ by 50 times from one batch to another.
    """
    given = [
        "--after",
        "20",
        "--batch",
        "8",
        "--batches",
        "10",
        "--results",
        str(tmp_path),
        "--docs",
        str(tmp_path),
    ]
    rows = reversible_gradients.main(given)
    assert reversible_gradients.failures(rows) == [] and "WORSE" not in capsys.readouterr().out
    assert len(rows) == len(rows_of(tmp_path / "reversible_gradients.csv")) == 2 * 10 * (3 + 4 + 3)
    assert_tables(memory_page, "gradients")
    for numbers in ("float64", "float32", "bfloat16 networks"):
        worse = [
            row | {"error": 3 * row["error"] + 1e-11} if row["backprop"] == "reversible" else row
            for row in rows
        ]
        assert any(numbers in failure for failure in reversible_gradients.failures(worse))


def test_soak_compares_runs(tmp_path, capsys):
    given = [
        "--steps",
        "30",
        "--steps-per-level",
        "2",
        "--hidden",
        "4",
        "--results",
        str(tmp_path),
        "--docs",
        str(tmp_path),
    ]
    rows = reversible_soak.main(given)
    assert len(rows) == 3 * 6 and rows_of(tmp_path / "reversible_soak.csv")[0]["way"] == "stored"
    assert max(map(abs, reversible_soak.differences(rows, "reversible"))) < 1e-3
    assert max(reversible_soak.column(rows, "reversible", "drift")[1]) < 1e-4
    assert (tmp_path / "pictures" / "reversible_soak.png").stat().st_size > 10_000
    assert "MiB" in capsys.readouterr().out


@pytest.fixture
def training_page(tmp_path):
    return Path(shutil.copy(harness.ROOT / "docs" / "training.md", tmp_path))


@pytest.mark.parametrize("device", DEVICES)
def test_glow_beside_plain_pytorch(device, training_page, tmp_path, capsys):
    rows = glow.main(["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)])
    assert rows_of(tmp_path / "glow.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    expected = []
    for coupling, library in (("soft_clamp", "nflows"), ("sigmoid, shift first", "normflows")):
        published = [library] if importlib.util.find_spec(library) else []
        if device == "cpu" or coupling == "soft_clamp" or published:
            providers = ["plain", *published, "fastflow", "fastflow, reversible"]
            expected += itertools.product([coupling], ("forward+backward", "log_prob", "sample"), providers)
    assert [(row["coupling"], row["mode"], row["provider"]) for row in rows] == expected
    assert all(float(row["error"]) <= float(row["tolerance"]) for row in rows)
    assert_tables(training_page, "glow")
    ((_, files),) = report.read(tmp_path).items()
    assert files["glow"] == rows_of(tmp_path / "glow.csv") and report.plot(
        "here", files, tmp_path / "glow.png"
    )
    assert "(1.00)" in capsys.readouterr().out


@pytest.mark.parametrize("coupling", published.COUPLINGS)
@pytest.mark.parametrize("wrong", ["a gradient", "bits/dim without gradients", "a pixel", "a weight"])
def test_a_glow_that_computes_something_else_is_refused(wrong, coupling, monkeypatch):
    model = glow.build(coupling, 8, 2, 1, 4, 2).double()
    found = {name: make(model) for name, make in glow.ways(coupling, compiled=False).items()}
    given = glow.inputs(8, 2, "cpu", torch.float64)
    assert max(glow.check(found, given, glow.TOLERANCE).values()) <= glow.TOLERANCE
    refused = "fastflow"
    if wrong == "a weight":
        refused = published.COUPLINGS[coupling]
        if refused not in found:
            pytest.skip(f"{refused} is not installed")
        shared = {id(p) for p in found["plain"].parameters}
        with torch.no_grad():
            next(p for p in found[refused].parameters if id(p) not in shared).add_(1e-3)
    elif wrong == "a gradient":
        last = found["fastflow"].made.flows[1].steps[0].coupling
        last.net.register_full_backward_hook(lambda m, grad_in, grad_out: (1.001 * grad_in[0],))
    elif wrong == "bits/dim without gradients":
        forward = found["fastflow"].forward
        monkeypatch.setattr(
            found["fastflow"],
            "forward",
            lambda x, seed: forward(x, seed=seed) * (1 if torch.is_grad_enabled() else 1.001),
        )
    else:
        monkeypatch.setattr(
            found["fastflow"], "decode", lambda n, generator: torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
        )
    with pytest.raises(ValueError, match=f"^{refused}: .* no row is written"):
        glow.check(found, given, glow.TOLERANCE)


@pytest.mark.parametrize("coupling", published.COUPLINGS)
@pytest.mark.parametrize("mode", report.GLOW_MODES)
def test_no_row_where_a_published_library_is_faster_than_plain_pytorch(mode, coupling, monkeypatch):
    library = published.COUPLINGS[coupling]
    taken = {m: {name: [1.0, 2.0, 3.0] for name in ("plain", library, "fastflow")} for m in report.GLOW_MODES}
    monkeypatch.setattr(glow, "times", lambda *_: taken)
    given = "tiny", coupling, (8, 2, 1, 4, 2), argparse.Namespace(device="cpu", quick=False, compiled=False)
    assert len(glow.measure(*given)) == 3 * 3
    taken[mode][library] = [1.0, 1.9, 3.0]
    refusal = (
        f"tiny, {coupling}, {mode}: plain PyTorch takes 2.0 ms, {library} 1.9: a straw man; no row is written"
    )
    with pytest.raises(ValueError, match=re.escape(refusal)):
        glow.measure(*given)


def test_the_second_coupling_is_timed_on_a_gpu_beside_normflows_alone(monkeypatch):
    for installed, expected in ((None, ["soft_clamp"]), (True, ["soft_clamp", "sigmoid, shift first"])):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, installed=installed: installed)
        assert glow.couplings("cuda") == expected and glow.couplings("cpu") == [
            "soft_clamp",
            "sigmoid, shift first",
        ]


def speed_options(tmp_path, device: str) -> list[str]:
    return ["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)]


@pytest.mark.parametrize("device", DEVICES)
def test_training_speed_turns_on_one_after_the_other_and_sweeps_batches(device, training_page, tmp_path):
    rows = training_speed.main(speed_options(tmp_path, device))
    assert rows_of(tmp_path / "training_speed.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    expected = [
        f"+ {name}"
        for name in training_speed.IN_TURN
        if name != "compile" and (name != "graph" or device == "cuda")
    ]
    assert [row["way"] for row in rows if row["way"].startswith("+")] == expected
    assert all(
        float(row["error"]) <= float(row["tolerance"]) and float(row["images_s_p50"]) > 0 for row in rows
    )
    default = next(row["way"] for row in rows if row["way"].endswith(training_speed.IS_DEFAULT))
    for way in ("plain", default):
        assert sorted(training_speed.batch_of(row) for row in rows if row["way"] == way) == [2, 4, 8]
    for row in rows:
        tflop_s = float(row["model_gflop_image"]) * float(row["images_s_p50"]) / 1e3
        assert float(row["tflop_s"]) == pytest.approx(tflop_s, rel=2e-2)
        assert float(row["share_of_matmul"]) == pytest.approx(
            tflop_s / float(row["matmul_tflop_s"]), rel=2e-2, abs=1e-4
        )
    assert {float(row["over_plain"]) for row in rows if row["way"] == "plain"} == {1.0}
    assert len(rows_of(tmp_path / "loader.csv")) == 4 and all(
        float(row["images_s"]) > 0 for row in rows_of(tmp_path / "loader.csv")
    )
    assert_tables(training_page, "speed", "loader")


def test_what_is_worth_most_is_measured_first():
    """A run may be cut: the curves against batch, then options turned on in turn, then what takes minutes to compile; nothing twice."""
    planned = training_speed.plan(argparse.Namespace(quick=False, device="cuda", compiled=True))
    measured = [(shape[-1], way) for shape, way, _ in planned]
    plain, default, *_, compiled = training_speed.ways("cuda", compiled=True)
    assert default.endswith(training_speed.IS_DEFAULT) and compiled == training_speed.COMPILED
    assert measured[:6] == [(batch, way) for batch in (512, 128, 32) for way in (plain, default)]
    assert measured[-4:] == [(batch, compiled) for batch in (512, 128, 32, 64)]
    assert compiled not in {way for _, way in measured[:-4]} and len(measured) == len(set(measured))


def test_a_way_that_is_out_of_memory_has_no_row(training_page, tmp_path, monkeypatch, capsys):
    def out_of_memory_at(batch, make):
        def made(shape, *rest):
            if shape[-1] == batch:
                raise torch.OutOfMemoryError
            return make(shape, *rest)

        return made

    for name, batch in (("ours", 2), ("plain", 8)):
        monkeypatch.setattr(training_speed, name, out_of_memory_at(batch, getattr(training_speed, name)))
    rows = training_speed.main(speed_options(tmp_path, "cpu"))
    assert {training_speed.batch_of(row) for row in rows} == {2, 4}
    assert [row["way"] for row in rows if training_speed.batch_of(row) == 2] == ["plain"]
    said = "".join(capsys.readouterr())
    assert said.count("out of memory; no row is written") == 2
    assert re.search("batch 8, .*default here: .*to compare with; no row is written", said)


def test_a_way_that_trains_otherwise_has_no_row(training_page, tmp_path, monkeypatch):
    ours = training_speed.ours

    def made(*args):
        step = ours(*args)
        return lambda x, seed: 1.05 * step(x, seed)

    monkeypatch.setattr(training_speed, "ours", made)
    with pytest.raises(ValueError, match="batch 2, channels_last, reversible: .*; no row is written"):
        training_speed.main(speed_options(tmp_path, "cpu"))
    assert {row["way"] for row in rows_of(tmp_path / "training_speed.csv")} == {"plain"}


def test_model_flops_are_those_of_a_hand_count():
    """Glow L=2 K=2 hidden 8 of 8x8 images, by arXiv:1807.03039, figure 2: backward has a product by the input and one by the weight."""
    batch, hidden, k = 3, 8, 2

    def convolution(inputs, outputs, kernel, side):
        return 2 * kernel**2 * inputs * outputs * side**2

    def step(c, side):
        network = [(c // 2, hidden, 3), (hidden, hidden, 1), (hidden, c, 3)]
        return convolution(c, c, 1, side) + sum(convolution(*each, side) for each in network)

    an_image = k * step(12, 4) + convolution(6, 12, 3, 4) + k * step(24, 2)
    # of a level's weights P (L U): two products forward, and backward three, since P is no parameter
    weights = k * sum(5 * 2 * c**3 for c in (12, 24))
    assert training_speed.model_flops((8, 2, k, hidden, batch)) == 3 * batch * an_image + weights


def test_the_gpu_pass_runs_without_a_gpu_at_tiny_sizes(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the pass is run by itself, in minutes")
    script = ["bash", str(harness.ROOT / "benchmarks" / "gpu_pass.sh")]
    about = {
        "env": os.environ | {"PYTHON": sys.executable, "MINUTES": "6"},
        "capture_output": True,
        "text": True,
    }
    refused = subprocess.run(script, **about)
    assert refused.returncode == 2 and "give a folder" in refused.stderr
    done = subprocess.run([*script, str(tmp_path)], **about)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "gpu_pass" / "summary.txt").read_text()
    stages = [
        "small_cases",
        "training_speed",
        "glow",
        "memory",
        "profile",
        *harness.with_cases(),
        "inverse_precision",
    ]
    for stage in stages:
        assert re.search(rf"^{stage} +\d+ s  passed$", summary, re.M), summary
    for stage in stages[1:]:
        assert rows_of(tmp_path / f"{stage}.csv")
    cut = subprocess.run(
        [*script, str(tmp_path / "cut")], **about | {"env": about["env"] | {"MINUTES": "0.2"}}
    )
    assert cut.returncode == 1 and "left out: no time" in cut.stdout


@pytest.fixture
def reported(tmp_path):
    """Makes the report of the rows in ``tmp_path``, or those given, and hands out its page and README."""
    (tmp_path / "docs").mkdir()
    page, readme = (
        Path(shutil.copy(harness.ROOT / name, tmp_path / name))
        for name in ("docs/benchmarks.md", "README.md")
    )

    def run(results: Path = tmp_path) -> tuple[str, str]:
        report.main(["--results", str(results), "--docs", str(page.parent), "--readme", str(readme)])
        return page.read_text(), readme.read_text()

    return run


def test_the_report_shows_the_newest_row_of_each_case_wins_and_losses_alike(tmp_path, reported):
    row = {
        "name": "doubling",
        "case": "a",
        "shape": "5x3",
        "dtype": "float32",
        "layout": "contiguous",
        "mode": "forward",
        "gb_s": "",
    }
    about = {
        "device": "A GPU",
        "torch": "2.11",
        "triton": "",
        "fastflow": "0",
        "commit": "abc",
        "date": "2026-01-01",
        "copy_gb_s": "3000",
    }
    times = [("eager", 10.0, 1.0), ("compile", 8.0, 0.8), ("fastflow", 99.0, 9.9), ("fastflow", 5.0, 0.5)]
    rows = [row | {"provider": p, "p50_us": f"{us:.2f}", "ratio": f"{r:.3f}"} | about for p, us, r in times]
    rows[-1] |= {"gb_s": "1500", "launches": "1"}
    rows[0]["launches"] = "7"
    rows += [
        other | {"case": "b", "ratio": "1.250" if other["provider"] == "fastflow" else "1.000"}
        for other in rows[::2]
    ]
    harness.append(tmp_path / "doubling.csv", rows)
    text, readme = reported()
    assert "A GPU" not in readme  # which has whole models and memory alone
    assert "## A GPU" in text and "AMD" not in text.split("<!-- sections")[1].split("<!-- end")[0]
    assert (
        "| doubling | forward | 2 | 0.88 (0.50 to 1.25) | 1 of 2 | 0.80 (0.80 to 0.80) | 1 / 7 | 50% |"
        in text
    )
    assert "9.9" not in text and re.search(
        r"\| doubling \| forward \| b 5x3 float32 contiguous \| 99.00 \| 10.00 \| 1.250 \|", text
    )
    assert (tmp_path / "docs" / "pictures" / "benchmarks_a_gpu.png").stat().st_size > 5000


def test_the_report_has_the_largest_batch_for_each_limit_and_the_times_of_the_ways():
    row = {
        "side": "32",
        "hidden": "64",
        "k": "32",
        "way": "reversible",
        "limit_mib": "256",
        "largest_batch": "99",
        "peak_mib": "250.25",
    }
    time = {
        "side": "32",
        "batch": "8",
        "hidden": "64",
        "k": "32",
        "way": "stored",
        "p50_s": "0.1000",
        "ratio": "1.000",
    }
    about = {"torch": "2.11", "commit": "abc", "date": "2026-01-01"}
    files = {
        "memory_batch": [row | about, row | about | {"limit_mib": "512", "largest_batch": "199"}],
        "memory_time": [time | about],
    }
    text = report.section("A CPU", files, {})
    assert (
        "### The largest batch that fits" in text
        and "| 32x32 | 64 | 32 | reversible | 512 | 199 | 250.25 |" in text
    )
    assert "| 32x32 | 8 | 64 | 32 | stored | 0.1000 | 1.000 |" in text and report.KEYS.keys() >= files.keys()


def test_the_report_in_the_docs_and_in_the_readme_is_that_of_the_rows(reported):
    committed = tuple((harness.ROOT / name).read_text() for name in ("docs/benchmarks.md", "README.md"))
    assert reported(harness.RESULTS) == committed, "python -m benchmarks.tools.report"


def test_no_number_in_the_readme_but_from_rows():
    """Beside its code and what benchmarks wrote from rows."""
    text = (harness.ROOT / "README.md").read_text()
    (row,) = rows_of(harness.RESULTS / "photos.csv")[-1:]
    assert photos.text(row) in text
    by_hand = re.sub(r"```.*?```|<!-- (\w+): written by .*?<!-- end of \1 -->", "", text, flags=re.S)
    measured = (
        r"(?<!\w)\d[\d.,]* ?(?:%|x\b|times|[kKMG]i?B|[mun]?s\b|seconds|minutes|hours|images|bits|nats|FLOP)"
    )
    assert re.findall(measured, "0.29 MiB, 1.2 times, 3 minutes") and re.findall(measured, by_hand) == []


def test_the_report_shows_throughput_against_batch(tmp_path, reported):
    about = {
        "device": "A GPU",
        "torch": "2.11",
        "commit": "abc",
        "date": "2026-01-01",
        "over_plain": "1.000",
        "peak_mib": "nan",
    }
    older = {"size": "L=1 K=2 hidden 4 batch 16", "way": "plain", "images_s_p50": "300.0"} | about

    def reported_with(rows):
        harness.append(tmp_path / "training_speed.csv", rows)
        return reported()[0]

    picture = tmp_path / "docs" / "pictures" / "training_speed_a_gpu.png"
    text = reported_with([older])
    assert "| L=1 K=2 hidden 4 batch 16 | plain | 300 | 1.00 |\n" in text and not picture.exists()
    text = reported_with(
        [older | {"size": f"L=1 K=2 hidden 4 batch {n}", "share_of_matmul": "0.1234"} for n in (64, 4)]
    )
    shares = [("4", "12%"), ("16", ""), ("64", "12%")]
    assert re.findall(r"batch (\d+) \| plain \| 300 \| 1.00 \| (\S*) \|", text) == shares
    assert picture.stat().st_size > 5000 and f"(pictures/{picture.name})" in text


@pytest.mark.parametrize("device", DEVICES)
def test_profile_tells_where_a_step_s_time_goes_and_its_bytes(device, tmp_path, capsys):
    timed, moved = profile.main(
        ["--quick", "--device", device, "--results", str(tmp_path), "--trace", str(tmp_path / "trace.json")]
    )
    assert (tmp_path / "trace.json").stat().st_size > 1000
    kept = rows_of(tmp_path / "profile.csv")
    assert {row["by"] for row in kept} == {"time", "bytes"} and all(
        bool(row["us"]) == (row["by"] == "time") for row in kept
    )
    for rows in (timed, moved):
        shares = [row["share"] for row in rows]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    names = " ".join(row["name"] for row in timed)
    assert "conv" in names if device == "cpu" else "coupling" in names
    found = {row["name"]: row for row in moved}
    assert found.keys() >= {
        "aten::convolution_backward",
        "fastflow::affine_coupling_inverse_backward",
        "aten::_fused_adam",
    }
    assert all(row["calls"] > 0 and row["mib"] > 0 for row in moved)
    # the profiler has seen the same calls
    assert found["aten::convolution"]["gb_s"] > 0 and found["fastflow::affine_coupling"]["gb_s"] > 0
    said = capsys.readouterr().out
    assert "MiB a step in all" in said and "| us | share |" in said and "| MiB | share | GB/s |" in said


def test_bytes_are_those_of_a_hand_count():
    x, weight, shift = (
        torch.randn(2, 3, 8, 8),
        torch.randn(5, 3, 1, 1, requires_grad=True),
        torch.randn(5, 1, 1),
    )
    upstream = torch.randn(2, 5, 8, 8)
    with Traffic() as traffic:
        (torch.nn.functional.conv2d(x, weight) + shift).backward(upstream)
    elements = {
        "aten::convolution": 384 + 15 + 640,
        "aten::add": 640 + 5 + 640,
        "aten::convolution_backward": 640 + 384 + 15 + 15,
    }
    assert traffic.bytes == {name: 4 * n for name, n in elements.items()}
    assert traffic.calls == dict.fromkeys(elements, 1)


@pytest.mark.parametrize(
    "run, elements",
    [
        (lambda x: x.view(6, 2)[1:].detach(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.new_empty(5), 0),
        (lambda x: x * x, 24),  # the same twice is read once
        (lambda x: x.mul_(2), 24),
        (lambda x: x.copy_(torch.ones(())), 1 + 12 + 1),  # and what ones() writes
        (lambda x: torch.neg(x, out=x), 24),
        (lambda x: x[0].expand(3, 4) + 1, 4 + 12),
        (lambda x: torch._foreach_add_([x, x[0].clone()], 1), 24 + 8 + 8),
    ],
    ids=["views", "empty", "new", "squared", "in place", "copied over", "out", "expanded", "a list"],
)
def test_bytes_of_operators(run, elements):
    x = torch.randn(3, 4)
    with Traffic() as traffic:
        run(x)
    assert traffic.bytes.total() == 4 * elements, traffic.bytes


def test_photos_writes_its_row_and_the_readme(tmp_path):
    readme = Path(shutil.copy(harness.ROOT / "README.md", tmp_path))
    photos.main(["--quick", "--device", "cpu", "--results", str(tmp_path), "--readme", str(readme)])
    (row,) = rows_of(tmp_path / "photos.csv")
    shown = readme.read_text().split("<!-- photos: ")[1].split("<!-- end of photos")[0]
    for name in ("test_bits_per_dim", "test_bits_per_dim_1_sample", "png_bits_per_dim", "webp_bits_per_dim"):
        assert f"{float(row[name]):.3f}" in shown
    assert row["step"] == "2" and float(row["seconds"]) > 1
    assert {p.name for p in (tmp_path / "docs" / "pictures").iterdir()} == {
        "photos_curve.png",
        "photos_samples.png",
    }
