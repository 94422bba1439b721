"""The benchmark of autoregressive flows: rows with and without libraries, and no row of a model that differs."""

import pytest
import torch

from benchmarks.models import autoregressive_flow, libraries
from benchmarks.tools import harness, sizes
from tests.support.rows import DEVICES, assert_tables, rows_of

MARKERS = (
    "<!-- autoregressive_flow: written by benchmarks/models/x.py -->\n<!-- end of autoregressive_flow -->\n"
)


@pytest.fixture
def options(tmp_path, monkeypatch):
    (tmp_path / "autoregressive.md").write_text(MARKERS)
    monkeypatch.setattr(sizes, "keep_memory", lambda: None)  # of this process
    monkeypatch.setattr(harness, "ROUNDS", 1)
    return ["--quick", "--results", str(tmp_path), "--docs", str(tmp_path)]


@pytest.mark.parametrize("device", DEVICES)
def test_rows(device, options, tmp_path):
    rows = autoregressive_flow.main([*options, "--device", device])
    assert rows_of(tmp_path / "autoregressive_flow.csv") == [
        {k: str(v) for k, v in row.items()} for row in rows
    ]
    for library in ("nflows", "zuko"):
        own = [library] * libraries.installed(library)
        for mode in autoregressive_flow.MODES:
            passes = [autoregressive_flow.PASSES] * (mode == "sample")
            found = [r["provider"] for r in rows if (r["library"], r["mode"]) == (library, mode)]
            assert found == [*passes, "fastflow", *own]
    assert_tables(tmp_path / "autoregressive.md", "autoregressive_flow")


def test_processor_time_is_of_one_thread(options):
    threads = torch.get_num_threads()
    rows = autoregressive_flow.main([*options, "--clock", "processor", "--device", "cpu"])
    assert all(row["device"].endswith("1 threads") and row["clock"] == "processor" for row in rows)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="^clock: got 'processor' on cuda, expected 'wall'"):
        autoregressive_flow.main([*options, "--clock", "processor", "--device", "cuda"])


@pytest.mark.parametrize("size", autoregressive_flow.QUICK, ids=lambda size: size.library)
@pytest.mark.parametrize("wrong", ["log_prob", "decode", None])
def test_another_model_is_refused(size, wrong, monkeypatch):
    monkeypatch.setattr(libraries, "installed", lambda name: False)
    found = autoregressive_flow.models(size, torch.float64, "cpu")
    given = autoregressive_flow.inputs(size, torch.float64, "cpu")
    if wrong is None:
        assert autoregressive_flow.check(found, *given)["fastflow"] <= autoregressive_flow.TOLERANCE
        return
    right = getattr(found["fastflow"], wrong)
    setattr(found["fastflow"], wrong, lambda *args: right(*args) * (1 + 1e-6))
    with pytest.raises(
        ValueError, match=r"^fastflow: log-densities or samples are off by .* no row is written"
    ):
        autoregressive_flow.check(found, *given)
