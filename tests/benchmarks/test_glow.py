"""Glow next to plain PyTorch and published libraries: no row unless every provider computes the same."""

import argparse
import importlib.util
import itertools
import re

import pytest
import torch

from benchmarks.models import glow, libraries
from benchmarks.tools import report
from tests.support.processes import processes
from tests.support.rows import DEVICES, assert_tables, rows_of


@pytest.mark.parametrize("device", DEVICES)
def test_glow_beside_plain_pytorch(device, training_page, tmp_path, capsys, monkeypatch):
    # a process for each provider still, but forked from one that has imported torch
    monkeypatch.setattr(glow.multiprocessing, "get_context", lambda method: processes)
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


@pytest.mark.parametrize("coupling", libraries.COUPLINGS)
@pytest.mark.parametrize("wrong", ["a gradient", "bits/dim without gradients", "a pixel", "a weight"])
def test_a_glow_that_computes_something_else_is_refused(wrong, coupling, monkeypatch):
    model = glow.build(coupling, 8, 2, 1, 4, 2).double()
    found = {name: make(model) for name, make in glow.ways(coupling, compiled=False).items()}
    given = glow.inputs(8, 2, "cpu", torch.float64)
    assert max(glow.check(found, given, glow.TOLERANCE).values()) <= glow.TOLERANCE
    refused = "fastflow"
    if wrong == "a weight":
        refused = libraries.COUPLINGS[coupling]
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


@pytest.mark.parametrize("coupling", libraries.COUPLINGS)
@pytest.mark.parametrize("mode", report.GLOW_MODES)
def test_no_row_where_a_published_library_is_faster_than_plain_pytorch(mode, coupling, monkeypatch):
    library = libraries.COUPLINGS[coupling]
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
