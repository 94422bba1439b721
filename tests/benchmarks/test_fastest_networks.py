"""The table of ``network="auto"`` from measured rows."""

import csv

import pytest
import torch

from benchmarks.ops import glow_network
from benchmarks.tools import fastest_networks, harness
from fastflow.nn.networks import fastest
from fastflow.nn.networks.fastest import Setting, read_table
from tests.support.rows import rows_of


def row(way, us, device="a GPU", mode="forward", captured="", shape="2x6x4x8", dtype="bfloat16"):
    provider, layout = way
    about = {"case": "hidden 512", "shape": shape, "dtype": dtype, "layout": layout, "provider": provider}
    return about | {"mode": mode, "device": device, "p50_us": str(us), "captured_us": captured}


def of_ways(times, **more):
    return [row(way, us, **more) for way, us in zip(fastest_networks.WAYS, times, strict=True)]


def table(rows, tmp_path):
    with (tmp_path / "glow_network.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    path = tmp_path / "table.json"
    fastest_networks.main(["--results", str(tmp_path), "--table", str(path)])
    return read_table(path)


SETTING = Setting("a GPU", "bfloat16", 6, 512, 12, "evaluation")


def test_the_fastest_way_of_each_mode_and_number_of_pixels(tmp_path, capsys):
    rows = of_ways((40, 30, 10, 20)) + of_ways((40, 30, 50, 60), mode="forward+backward")
    rows += of_ways((1, 2, 3, 4), shape="4x6x4x8") + of_ways((4, 3, 2, 1), device="another")
    assert table(rows, tmp_path) == {
        SETTING: {64: "fused", 128: "plain"},
        SETTING._replace(mode="training"): {64: "plain, channels_last"},
        SETTING._replace(gpu="another"): {64: "im2col"},
    }
    assert (
        "4 settings; fastest plain: 1, plain, channels_last: 1, fused: 1, im2col: 1"
        in capsys.readouterr().out
    )


def test_times_in_a_graph_count_if_all_ways_have_one(tmp_path):
    rows = of_ways((40, 30, 10, 20))
    for each, captured in zip(rows, ("8", "9", "9", "9"), strict=True):
        each["captured_us"] = captured
    assert table(rows, tmp_path) == {SETTING: {64: "plain"}}
    rows[1]["captured_us"] = ""
    assert table(rows, tmp_path) == {SETTING: {64: "fused"}}


def test_the_last_rows_count_and_settings_with_a_missing_way_are_left_out(tmp_path):
    rows = of_ways((1, 2, 3, 4)) + of_ways((4, 3, 2, 9)) + of_ways((1, 2, 3, 4), dtype="float32")[1:]
    rows += of_ways((1, 2, 3, 4), device="some CPU, 2 threads")
    assert table(rows, tmp_path) == {SETTING: {64: "fused"}}


def test_measured_rows_have_all_ways(tmp_path, monkeypatch, capsys):
    """The rows of the benchmark, as if a GPU had measured them."""
    monkeypatch.setitem(harness.COPIED, "cpu", 1 << 20)
    monkeypatch.setattr(harness, "metadata", lambda device: {"device": "a GPU"})
    glow_network.main(["--quick", "--device", "cpu", "--results", str(tmp_path)])
    settings = fastest_networks.fastest(rows_of(tmp_path / "glow_network.csv"))
    assert [(each["mode"], each["pixels"]) for each in settings] == [("evaluation", 50), ("training", 50)]
    assert {*fastest_networks.WAYS.values()} == {*fastest.WAYS}


def test_the_table_of_the_package_is_that_of_the_rows():
    path = harness.RESULTS / "glow_network.csv"
    rows = rows_of(path) if path.exists() else []
    measured = {}
    for each in fastest_networks.fastest(rows):
        setting = Setting(*(each[name] for name in Setting._fields))
        measured.setdefault(setting, {})[each["pixels"]] = each["fastest"]
    assert read_table(fastest.TABLE) == measured


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_rounding_in_half_precision_does_not_decide_about_gradients(layout):
    """No hidden activation is near zero, so that gradients of all ways can be compared."""
    case = glow_network.of_size(2, 6, 8, 64, torch.bfloat16, layout)
    inputs = harness._input_set(case, "forward+backward", "cpu")
    errors, tolerance = harness._errors(case, "forward+backward", inputs)
    assert {*errors} == {*case.providers} and max(errors.values()) <= tolerance
