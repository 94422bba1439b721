"""Peak memory and the largest batch: rows, tables, the search, and errors that mean a lack of memory."""

import argparse
import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.models import memory
from fastflow.models import Glow
from fastflow.trainer.activations import stored_bytes
from tests.support.rows import DEVICES, assert_tables, rows_of


def modeled_peak(way, k, options):
    """In place of a process of its own, which takes seconds: other tests start some."""
    grows_with = options.batch * (1 if way == "reversible" else k)
    return 0.5 * grows_with, 8 + 0.5 * grows_with


@pytest.mark.parametrize("device", DEVICES)
def test_memory_writes_rows_tables_and_picture(device, memory_page, tmp_path, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(memory, "peak_in_a_process", modeled_peak)
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


# Measures each in a fork of one process, whose peak begins with what it holds then: torch is imported once.
IN_FORKS = """
import argparse, json, os, sys
from benchmarks.models import memory
options, cases = json.loads(sys.argv[1])
for way, k in cases:
    if not os.fork():
        print(json.dumps([way, k, *memory.peak_or_inf(way, k, argparse.Namespace(**options))]), flush=True)
        os._exit(0)
    os.wait()
"""


def peaks_in_forks(cases, options):
    """``memory.peak_in_a_process`` of each way and number of steps."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_FORKS, json.dumps([vars(options), cases])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=memory.harness.ROOT, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(cases), done.stderr
    return {(way, k): (peak, in_all) for way, k, peak, in_all in rows}


def test_a_process_of_its_own_prints_what_is_read(monkeypatch, capsys):
    def run(command, **_):
        memory.main(command[3:])
        return subprocess.CompletedProcess(command, 0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(memory.subprocess, "run", run)
    monkeypatch.setattr(memory, "peak", lambda way, k, options: (k, options.side))
    assert memory.peak_in_a_process("stored", 3, memory_options(side=16, batch=2, hidden=4)) == (3, 16)


@pytest.mark.slow
def test_peak_memory_grows_with_stored_activations_alone():
    """MiB per step of a small Glow: some 8 are activations with hidden 64; reversible adds Python's objects.

    The trainer's estimate of stored activations is within 20% of it. The peak is between forward and backward,
    when there are no gradients.
    """
    options = memory_options(side=32, batch=32, hidden=64)
    growth = {}
    found = peaks_in_forks([(way, k) for way in ("stored", "reversible") for k in (2, 6)], options)
    for way in ("stored", "reversible"):
        peaks = {k: found[way, k] for k in (2, 6)}
        growth[way] = memory.growth([(k, peak) for k, (peak, _) in peaks.items()])
        if way == "stored":
            in_all = memory.growth([(k, in_all) for k, (_, in_all) in peaks.items()])
    assert growth["reversible"] <= 0.6 and growth["stored"] >= 3, growth
    make = functools.partial(Glow, (3, 32, 32), hidden=64, reversible=False, network="plain")
    estimates = {k: stored_bytes(lambda k=k: make(steps=k), 32, torch.device("cpu")) for k in (2, 6)}
    stored, weights = (
        memory.growth([(k, estimate[i] / memory.MIB) for k, estimate in estimates.items()]) for i in (0, 1)
    )
    assert stored == pytest.approx(in_all - weights, rel=0.2)


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

    monkeypatch.setattr(memory, "peak_in_a_process", took)
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


# cuDNN's error if the allocator refuses its workspace
NO_ENGINE = "GET was unable to find an engine to execute this computation"


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
    assert memory.peak_in_a_process("stored", 2, options) == (float("inf"), float("inf"))
