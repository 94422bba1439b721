"""The trainer's step with its options turned on in turn and at several batches, and its FLOPs."""

import argparse
import re

import pytest
import torch

from benchmarks.models import training_speed
from benchmarks.tools import harness
from fastflow import ops
from fastflow.nn.networks import glow_network
from fastflow.trainer import activations
from tests.support.rows import DEVICES, assert_tables, rows_of


def speed_options(tmp_path, device: str) -> list[str]:
    return ["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)]


def measure_options(tmp_path) -> argparse.Namespace:
    """For the models only, not the loader."""
    return harness.arguments("tiny", ["--quick", "--device", "cpu", "--results", str(tmp_path)])


@pytest.mark.parametrize("device", DEVICES)
def test_training_speed_turns_on_one_after_the_other_and_sweeps_batches(device, training_page, tmp_path):
    rows = training_speed.main(speed_options(tmp_path, device))
    assert rows_of(tmp_path / "training_speed.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    expected = [
        f"+ {name}"
        for name in training_speed.IN_TURN
        if name != "compile" and (name not in training_speed.ON_GPUS or device == "cuda")
    ]
    assert [row["way"] for row in rows if row["way"].startswith("+")] == expected
    assert all(
        float(row["error"]) <= float(row["tolerance"]) and float(row["images_s_p50"]) > 0 for row in rows
    )
    for way in ("plain", training_speed.IS_DEFAULT):
        assert sorted(training_speed.batch_of(row) for row in rows if row["way"].endswith(way)) == [2, 4, 8]
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


def test_the_loader_only(training_page, tmp_path, monkeypatch):
    def speed(page):
        return page.read_text().split("<!-- speed: ")[1].split("<!-- end of speed")[0]

    monkeypatch.setattr(training_speed, "measure", lambda options: pytest.fail("steps are measured"))
    before = speed(training_page)
    assert training_speed.main([*speed_options(tmp_path, "cpu"), "--loader"]) == []
    rows = rows_of(tmp_path / "loader.csv")
    assert len(rows) == 4 and speed(training_page) == before
    assert f"| photographs | {int(rows[1]['images_s']):,} |" in training_page.read_text()


def test_networks_as_one_op_are_measured_on_a_gpu_and_train_as_others(monkeypatch):
    monkeypatch.setattr(training_speed, "default", lambda shape, device: training_speed.DEFAULT[device])
    every = {"channels_last", "bf16", "graph", "reversible", "fused"}
    assert training_speed.ways((), "cuda", compiled=True)["+ fused"] == every
    assert "+ fused" not in training_speed.ways((), "cpu", compiled=True)
    monkeypatch.setattr(glow_network, "is_fused_on_cpu", lambda dtype: False)  # the other step is as on a GPU
    shape, calls, op = (8, 2, 1, 8, 2), [], ops.glow_network
    monkeypatch.setattr(ops, "glow_network", lambda *args, **tf32: calls.append(1) or op(*args, **tf32))
    steps = [training_speed.ours(shape, "cpu", on) for on in ({"fused"}, set())]
    (x,) = training_speed.batches(shape, 1, "cpu")
    losses = [[step(x, seed) for seed in range(3)] for step in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(calls) == 2 * (1 + 3)  # two networks; initialization and three steps


def test_what_is_worth_most_is_measured_first(monkeypatch):
    """The curves against batch, then options turned on in turn, then slow compilations; nothing twice."""
    monkeypatch.setattr(training_speed, "default", lambda shape, device: training_speed.DEFAULT[device])
    planned = training_speed.plan(argparse.Namespace(quick=False, device="cuda", compiled=True))
    measured = [(shape[-1], way) for shape, way, _ in planned]
    plain, default, *_, compiled = training_speed.ways((), "cuda", compiled=True)
    assert default.endswith(training_speed.IS_DEFAULT) and compiled == training_speed.COMPILED
    assert measured[:6] == [(batch, way) for batch in (512, 128, 32) for way in (plain, default)]
    assert measured[-4:] == [(batch, compiled) for batch in (512, 128, 32, 64)]
    assert compiled not in {way for _, way in measured[:-4]} and len(measured) == len(set(measured))


def test_a_way_that_is_out_of_memory_has_no_row(tmp_path, monkeypatch, capsys):
    def out_of_memory_at(batch, make):
        def made(shape, *rest):
            if shape[-1] == batch:
                raise torch.OutOfMemoryError
            return make(shape, *rest)

        return made

    for name, batch in (("ours", 2), ("plain", 8)):
        monkeypatch.setattr(training_speed, name, out_of_memory_at(batch, getattr(training_speed, name)))
    plan = training_speed.plan

    def two(given):
        return [each for each in plan(given) if each[1].endswith(("plain", training_speed.IS_DEFAULT))]

    monkeypatch.setattr(training_speed, "plan", two)
    rows = training_speed.measure(measure_options(tmp_path))
    assert {training_speed.batch_of(row) for row in rows} == {2, 4}
    assert [row["way"] for row in rows if training_speed.batch_of(row) == 2] == ["plain"]
    said = "".join(capsys.readouterr())
    assert said.count("out of memory; no row is written") == 2
    assert re.search("batch 8, .*default here: .*to compare with; no row is written", said)


def test_a_way_that_trains_otherwise_has_no_row(tmp_path, monkeypatch):
    ours, plan = training_speed.ours, training_speed.plan

    def made(*args):
        step = ours(*args)
        return lambda x, seed: 1.05 * step(x, seed)

    monkeypatch.setattr(training_speed, "ours", made)
    monkeypatch.setattr(
        training_speed, "plan", lambda given: [each for each in plan(given) if each[0][-1] == 2]
    )
    with pytest.raises(ValueError, match="batch 2, channels_last: .*; no row is written"):
        training_speed.measure(measure_options(tmp_path))
    assert {row["way"] for row in rows_of(tmp_path / "training_speed.csv")} == {"plain"}


@pytest.mark.parametrize(
    "free, expected", [(1e12, ("channels_last",)), (0.0, ("channels_last", "reversible"))]
)
def test_the_default_follows_the_free_memory(free, expected, monkeypatch):
    monkeypatch.setattr(activations, "free_bytes", lambda device: free)
    assert training_speed.default.__wrapped__((8, 2, 1, 8, 2), "cpu") == expected


def test_model_flops_are_those_of_a_hand_count():
    """Glow L=2 K=2 hidden 8 on 8x8 images, by arXiv:1807.03039, figure 2.

    Backward has one product for the gradient by the input and one for the gradient by the weight.
    """
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
