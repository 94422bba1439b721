"""Several processes train what one would: the same statistics, gradients, losses and pictures, and an end when one of them dies."""

import copy
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastflow import checkpoint
from fastflow.distributed import merge_statistics
from fastflow.models import Glow, RealNVP
from fastflow.nn import ActNorm
from fastflow.trainer.captured import CaptureError
from fastflow.trainer.progress import read_metrics
from fastflow.trainer.ranks import DeviceError, LostRankError, Ranks, init_process_group, shard_bounds
from fastflow.trainer.step import DDP_WARM_UP, Step
from tests.support.processes import processes, waves

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

# 45 images in batches of 7, which two ranks share as 3 and 4 and three as 2, 2 and 3
SETTINGS = (
    "--batch-size 7 --warmup 5 --clip 2 --horizontal-flip True --levels 2 --steps-per-level 2 --hidden 8 "
    "--final-samples 2 --samples 4 --eval-every 5 --eval-images 4 --save-every 10 --schedule constant --float64 --ema 0.9 --reversible yes"
).split()


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    return waves(tmp_path_factory.mktemp("data"))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_of(index, count, port, log, work, args):
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(f"{log}-{index}.txt", "w", buffering=1)
    torch.set_num_threads(1)
    work(*args)


class Run:
    """``work(*args)`` in ``count`` processes, which find each other as torchrun's do."""

    def __init__(self, folder, count, work, *args):
        port, self.log = free_port(), Path(folder) / "log"
        self.ranks = [
            processes.Process(target=rank_of, args=(i, count, port, str(self.log), work, args))
            for i in range(count)
        ]
        for rank in self.ranks:
            rank.start()

    def said(self, index):
        return Path(f"{self.log}-{index}.txt").read_text()

    def end(self, seconds=120):
        """The exit codes; what hangs is killed."""
        until = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0, until - time.monotonic()))
        hung = [i for i, rank in enumerate(self.ranks) if rank.is_alive()]
        for rank in self.ranks:
            rank.kill()
            rank.join()
        assert not hung, [self.said(i) for i in hung]
        return [rank.exitcode for rank in self.ranks]

    def finish(self):
        codes = self.end()
        assert not any(codes), [self.said(i) for i in range(len(codes))]


def command_line(argv):
    from fastflow.trainer.cli import main

    sys.exit(main(argv))


def trained(folder, count, argv):
    Run(folder, count, command_line, ["train", *argv]).finish()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, arrays):
    """A run of one process over 20 steps."""
    folder = tmp_path_factory.mktemp("alone")
    trained(folder, 1, ["--data", str(arrays), "--out", str(folder / "run"), *SETTINGS, "--steps", "20"])
    return folder / "run"


def assert_same_metrics(run, expected):
    """Losses, norms of gradients and test bits/dim of each of 20 steps."""
    ours, theirs = (read_metrics(r / "metrics.csv")[:20] for r in (run, expected))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 21))
    for a, b in zip(ours, theirs, strict=True):
        assert [v is None for v in a.values()] == [v is None for v in b.values()]
        for name, value in a.items():
            assert value is None or abs(value - b[name]) <= 1e-10 * (1 + abs(b[name])), (a["step"], name)


def assert_same_run(run, expected):
    """The metrics, the weights, their averages, and Adam's averages of the gradients."""
    assert_same_metrics(run, expected)
    ours, theirs = (checkpoint.read(r / "last.pt") for r in (run, expected))
    for kept in (lambda c: c["state_dict"], lambda c: c["training"]["trained"]):
        torch.testing.assert_close(kept(ours), kept(theirs), rtol=1e-10, atol=1e-10)
    state = [c["training"]["optimizer"]["state"] for c in (ours, theirs)]
    assert state[0].keys() == state[1].keys()
    for each in zip(state[0].values(), state[1].values(), strict=True):
        torch.testing.assert_close(*each, rtol=1e-10, atol=1e-10)
    assert any(v["exp_avg"].abs().max() > 1e-3 for v in state[0].values())


@pytest.mark.parametrize("count, accumulate", [(2, 1), (3, 2), (1, 3)])
def test_ranks_train_what_one_process_trains(count, accumulate, alone, arrays, tmp_path):
    more = ["--steps", "20", "--accumulate", str(accumulate)]
    trained(tmp_path, count, ["--data", str(arrays), "--out", str(tmp_path / "run"), *SETTINGS, *more])
    assert_same_run(tmp_path / "run", alone)
    names = {f.name for f in (tmp_path / "run").iterdir() if not f.name.startswith("events")}
    assert names == {".lock", "last.pt", "best.pt", "metrics.csv", "samples.png", "curve.png", "result.json"}
    assert len(list((tmp_path / "run").glob("events*"))) == 1  # the first rank's alone
    assert (tmp_path / "run/samples.png").read_bytes() == (alone / "samples.png").read_bytes()


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3)])
def test_a_run_resumes_with_another_number_of_ranks(before, after, alone, arrays, tmp_path):
    run = tmp_path / "run"
    trained(tmp_path, before, ["--data", str(arrays), "--out", str(run), *SETTINGS, "--steps", "10"])
    trained(tmp_path, after, ["--resume", str(run), "--steps", "20"])
    assert_same_run(run, alone)


def test_other_commands_say_and_write_once(alone, tmp_path):
    """Evaluation gives the numbers of one process; the first rank draws samples."""
    argv = ["evaluate", str(alone), "--samples", "2", "--batch-size", "2"]
    Run(tmp_path, 1, command_line, argv).finish()
    expected = (tmp_path / "log-0.txt").read_text()
    assert expected.startswith("bits/dim on 5 test images\n")
    (tmp_path / "two").mkdir()
    two = Run(tmp_path / "two", 2, command_line, argv)
    two.finish()
    assert two.said(0) == expected and two.said(1) == ""
    sampled = Run(
        tmp_path / "two", 2, command_line, ["sample", str(alone), "--out", str(tmp_path), "--n", "2"]
    )
    sampled.finish()
    assert sampled.said(0).startswith(f"{tmp_path}/samples.png: 2 samples") and sampled.said(1) == ""


def stop_one(argv, index):
    """A signal for one rank alone."""
    if int(os.environ["RANK"]) == index:
        from fastflow.trainer.step import Step

        step = Step.__call__

        def signalled(self, *args):
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args)

        Step.__call__ = signalled
    command_line(argv)


@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(index, alone, arrays, tmp_path):
    run = tmp_path / "run"
    started = Run(
        tmp_path,
        2,
        stop_one,
        ["train", "--data", str(arrays), "--out", str(run), *SETTINGS, "--steps", "20"],
        index,
    )
    assert started.end() == [128 + signal.SIGTERM] * 2
    step = checkpoint.read(run / "last.pt")["training"]["step"]
    assert 12 <= step < 20 and f"stopped at step {step} of 20, saved {run}/last.pt" in started.said(0)
    assert "stopped" not in started.said(1) and "Traceback" not in started.said(0) + started.said(1)
    trained(tmp_path, 2, ["--resume", str(run)])
    assert_same_run(run, alone)


def test_a_rank_that_dies_ends_the_run_and_it_resumes(alone, arrays, tmp_path):
    """Under torchrun itself, which names the rank and how it died."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    argv = ["--data", str(arrays), "--out", str(run), *SETTINGS, "--steps", "1000000", "--workers", "1"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    with log.open("w") as file:
        torchrun = subprocess.Popen([*launcher, "-m", "fastflow", "train", *argv], stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.csv").exists() or (run / "metrics.csv").read_bytes().count(b"\n") < 13:
            assert torchrun.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.01)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        second = next(c for c in children if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes())
        os.kill(int(second), signal.SIGKILL)
        assert torchrun.wait(60) != 0
    finally:
        torchrun.kill()
        torchrun.wait()
    said = log.read_text()
    assert "error: rank 0: another rank died or does not respond; see its own error" in said
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in said
    step = checkpoint.read(run / "last.pt")["training"]["step"]
    assert step and step % 10 == 0
    trained(tmp_path, 1, ["--resume", str(run), "--steps", str(max(20, step))])
    assert_same_metrics(run, alone)


def fail_alone(argv):
    """The second rank's loss is not finite, or its disk is full, or ... : here, an error of Python's."""
    if os.environ["RANK"] == "1":
        from fastflow.trainer import train

        def broken(config, step, *_):
            if step == 3:
                raise ZeroDivisionError("of the second rank")
            return config.lr

        train.learning_rate = broken
    command_line(argv)


def test_an_error_of_one_rank_ends_the_others(arrays, tmp_path):
    started = Run(
        tmp_path,
        2,
        fail_alone,
        ["train", "--data", str(arrays), "--out", str(tmp_path / "run"), *SETTINGS, "--steps", "20"],
    )
    assert started.end(60) == [1, 1]
    assert "ZeroDivisionError: of the second rank" in started.said(1)
    assert started.said(0).splitlines()[-1].startswith("error: rank 0: another rank died or does not respond")


def collapse(argv):
    """The 5th step's loss is not finite, on every rank. Each rank prints the sum of its weights after the 7th."""
    take, calls = Step.__call__, []

    def broken(self, *args):
        calls.append(None)
        if len(calls) == 5:
            self.parameters[0].data.fill_(float("nan"))
        report = take(self, *args)
        if len(calls) == 7:
            print("weights", sum(p.abs().sum() for p in self.parameters).item())
        return report

    Step.__call__ = broken
    command_line(argv)


def test_all_ranks_go_back_after_a_collapse(arrays, tmp_path):
    more = ["--steps", "7", "--eval-every", "3", "--on-divergence", "rollback"]
    argv = ["train", "--data", str(arrays), "--out", str(tmp_path / "run"), *SETTINGS, *more]
    started = Run(tmp_path, 2, collapse, argv)
    started.finish()
    assert started.said(0).count("back to step 3 of best.pt, learning rate times 0.5") == 1
    assert "back to step" not in started.said(1)
    weights = [[line for line in started.said(i).splitlines() if "weights" in line] for i in range(2)]
    assert weights[0] == weights[1] and len(weights[0]) == 1
    rows = read_metrics(tmp_path / "run/metrics.csv")
    assert [row["back_to_step"] for row in rows] == [None] * 4 + [3] + [None] * 2
    assert all(math.isfinite(row["train_bits_per_dim"]) for row in rows[5:])


def wait_in_vain(argv):
    """The second rank hangs."""
    if os.environ["RANK"] == "1":
        from fastflow.trainer import train

        def hangs(config, step, *_):
            if step == 3:
                time.sleep(600)
            return config.lr

        train.learning_rate = hangs
    command_line(argv)


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(arrays, tmp_path):
    argv = [
        "train",
        "--data",
        str(arrays),
        "--out",
        str(tmp_path / "run"),
        *SETTINGS,
        "--steps",
        "20",
        "--timeout",
        "3",
    ]
    started = Run(tmp_path, 2, wait_in_vain, argv)
    started.ranks[0].join(60)
    code = started.ranks[0].exitcode
    started.ranks[1].kill()
    assert code == 1 and "another rank died or does not respond" in started.said(0)
    assert started.end() == [1, -signal.SIGKILL]


def test_settings_that_ranks_cannot_share(arrays, tmp_path):
    argv = [
        "train",
        "--data",
        str(arrays),
        "--out",
        str(tmp_path / "run"),
        "--batch-size",
        "5",
        "--accumulate",
        "3",
    ]
    started = Run(tmp_path, 2, command_line, argv)
    assert started.end() == [1, 1]
    assert (
        started.said(1)
        == "error: rank 1: batch_size: got 5, expected at least 6 (ranks times accumulate, 2 x 3)\n"
    )
    assert not (tmp_path / "run").exists()


def train_apart(folder, find_unused_parameters, reversible):
    """Three steps of DistributedDataParallel from an uninitialised model, as a user would take them; ranks differ in all they can."""
    with init_process_group() as (ranks, _):
        torch.manual_seed(ranks.rank)
        model = Glow((3, 8, 8), levels=2, steps=2, hidden=8, reversible=reversible)
        wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
        optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-2)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + ranks.rank)
            x = torch.randint(0, 40, (3 + ranks.rank, 3, 8, 8), generator=generator)
            x = (x * (1 + 4 * ranks.rank) + 20 * (1 - ranks.rank)).to(torch.uint8)
            optimizer.zero_grad()
            wrapped(x, seed=step, offset=3 * ranks.rank).mean().backward()
            optimizer.step()
        torch.save({"state": model.state_dict(), "x": x}, Path(folder) / f"{ranks.rank}.pt")


@pytest.mark.parametrize("find_unused_parameters, reversible", [(False, True), (True, True), (False, False)])
def test_ranks_whose_data_differ_keep_equal_parameters(find_unused_parameters, reversible, tmp_path):
    Run(tmp_path, 2, train_apart, str(tmp_path), find_unused_parameters, reversible).finish()
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    assert (
        first["x"].float().mean() < second["x"].float().mean() - 20 and first["x"].shape != second["x"].shape
    )
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert all(bool(v) for k, v in first["state"].items() if k.endswith("initialized"))


def sampled_by_one(folder):
    """The first rank alone draws pictures and looks at images, in training mode; then all train."""
    with init_process_group() as (ranks, _):
        states = []
        for looks in (False, True):
            torch.manual_seed(0)
            model = Glow((3, 8, 8), levels=2, steps=1, hidden=8)
            x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)[2 * ranks.rank :][:2]
            if looks and ranks.is_main:
                latents = model.encode(x)
                model.sample(2), model.decode(latents)
                z = model.splits[0].inverse(latents[0], latents[0])
                model.flows[0].inverse(z)
                model.flows[0].steps[0].check(z[:1, :, :1, :1])
                with torch.no_grad():
                    model(x)
                model.eval()(x), model.train()
            wrapped = DistributedDataParallel(model)
            wrapped(x, seed=1, offset=2 * ranks.rank).mean().backward()
            states.append(model.state_dict())
        torch.save(states, Path(folder) / f"{ranks.rank}.pt")


def test_samples_of_one_rank_wait_for_no_other(tmp_path):
    Run(tmp_path, 2, sampled_by_one, str(tmp_path)).finish()
    (alone, first), (_, second) = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    for name, value in alone.items():
        assert torch.equal(value, first[name]) and torch.equal(value, second[name]), name
    assert all(bool(v) for k, v in alone.items() if k.endswith("initialized"))


def trained_with_a_capture(folder):
    """Four steps of two ranks, uncaptured, and with a capture that fails on the second rank within backward."""

    def fail(gradient):
        raise CaptureError("no capture here")

    def trained(ranks, fails):
        torch.manual_seed(0)
        model = Glow((3, 8, 8), levels=1, steps=1, hidden=4, reversible=False).double()
        x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        model.initialize(x, seed=0)
        optimizer = torch.optim.Adam(model.train().parameters(), fused=True)
        reasons = []
        step = Step(model, optimizer, ranks, batch_size=4, uncaptured=reasons.append)

        def record(work, generators):
            if not ranks.is_main:
                handle = step.parameters[0].register_hook(fail)
                try:
                    step.forward(step.x, None, seed=0).sum().backward()
                finally:
                    handle.remove()

        if fails:
            step.record, step.calls = record, DDP_WARM_UP - 2  # in the second step, buckets are rebuilt
        for i in range(4):
            step(x, None, i, 1e-2)
        return reasons, list(model.parameters())

    with init_process_group() as (ranks, _):
        torch.save([trained(ranks, fails) for fails in (False, True)], Path(folder) / f"{ranks.rank}.pt")


def test_a_capture_that_fails_on_one_rank_fails_on_all(tmp_path):
    Run(tmp_path, 2, trained_with_a_capture, str(tmp_path)).finish()
    for rank, reason in enumerate(("it failed on another rank", "no capture here")):
        (none, expected), (reasons, found) = torch.load(tmp_path / f"{rank}.pt")
        assert none == [] and reasons == [reason]
        assert all(torch.equal(p, q) for p, q in zip(expected, found, strict=True))


def normalised_apart(folder):
    """Three steps of the trainer's Step on a model of batch normalizations, each rank with its own share of the batches."""
    with init_process_group() as (ranks, _):
        torch.manual_seed(0)
        model = RealNVP((3, 8, 8), hidden=4, blocks=1)
        step = Step(model, torch.optim.Adam(model.parameters(), fused=True), ranks, batch_size=6)
        for i in range(3):
            x = torch.randint(
                0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
            )
            if i == 2:
                before = [b.clone() for b in model.running_statistics()]
                each = copy.deepcopy(model)  # what this rank's batch alone makes of them
                each(x[3 * ranks.rank :][:3], seed=i, offset=3 * ranks.rank)
            step(x[3 * ranks.rank :][:3], None, i, 1e-2)
        found = {"before": before, "alone": each.running_statistics(), "after": model.running_statistics()}
        torch.save(
            found | {"parameters": [p.detach() for p in model.parameters()]},
            Path(folder) / f"{ranks.rank}.pt",
        )


def test_running_statistics_are_the_mean_of_those_of_the_ranks(tmp_path):
    Run(tmp_path, 2, normalised_apart, str(tmp_path)).finish()
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    assert all(
        torch.equal(a, b)
        for name in ("before", "after", "parameters")
        for a, b in zip(first[name], second[name], strict=True)
    )
    assert any(not torch.equal(a, b) for a, b in zip(first["alone"], second["alone"], strict=True))
    for a, b, after in zip(first["alone"], second["alone"], first["after"], strict=True):
        torch.testing.assert_close(after, ((a + b) / 2).to(after.dtype), rtol=1e-5, atol=1e-6)


def statistics(folder):
    with init_process_group() as (ranks, _):
        torch.manual_seed(0)
        x = 3 + 2 * torch.randn(7, 4, 3, dtype=torch.float64)
        found = {}
        for name, ends in {
            "shared": (0, 2, 7),
            "the first has none": (0, 0, 7),
            "the second has none": (0, 7, 7),
        }.items():
            layer = ActNorm(4).double()
            layer(x[ends[ranks.rank] : ends[ranks.rank + 1]])
            found[name] = (layer.log_scale.detach(), layer.bias.detach(), layer.initialized)
        none = ActNorm(4)
        none(torch.empty(0, 4))
        found["all have none"] = (none.log_scale.detach(), none.bias.detach(), none.initialized)
        # a group of its own, and one loaded on the first rank alone and broadcast
        groups = [dist.new_group([i]) for i in range(2)]
        own = ActNorm(4, process_group=groups[ranks.rank]).double()
        own(x + ranks.rank)
        found["own"] = (own.log_scale.detach(), own.bias.detach(), own.initialized)
        late = ActNorm(4).double()
        if ranks.is_main:
            late.load_state_dict(layer.state_dict())
        DistributedDataParallel(late)(x)
        found["broadcast"] = (late.log_scale.detach(), late.bias.detach(), late.initialized)
        torch.save(found, Path(folder) / f"{ranks.rank}.pt")


def test_statistics_are_those_of_all_ranks(tmp_path):
    Run(tmp_path, 2, statistics, str(tmp_path)).finish()
    found = [torch.load(tmp_path / f"{i}.pt") for i in (0, 1)]
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(7, 4, 3, dtype=torch.float64)
    expected = ActNorm(4).double()
    expected(x)
    for name in ("shared", "the first has none", "the second has none", "broadcast"):
        for rank in found:
            torch.testing.assert_close(
                rank[name][:2], (expected.log_scale.detach(), expected.bias.detach()), rtol=1e-14, atol=1e-14
            )
            assert rank[name][2]
        assert all(torch.equal(a, b) for a, b in zip(found[0][name], found[1][name], strict=True)), name
    assert not found[0]["all have none"][2] and not found[1]["all have none"][2]
    torch.testing.assert_close(found[1]["own"][1], expected.bias.detach() - 1)


def test_shares_are_whole_and_even():
    for n in range(12):
        for count in range(1, 6):
            ends = [shard_bounds(n, i, count) for i in range(count)]
            assert (
                ends[0][0] == 0
                and ends[-1][1] == n
                and all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
            )
            assert max(b - a for a, b in ends) - min(b - a for a, b in ends) <= 1


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with init_process_group("cpu") as (ranks, device):
        assert (
            ranks == Ranks() and ranks.is_main and device == torch.device("cpu") and not dist.is_initialized()
        )
        assert ranks.broadcast_str("a") == "a" and ranks.local_main_first(lambda: 3) == 3
        x = torch.ones(2)
        assert ranks.all_reduce_sum(x) is x and x.tolist() == [1, 1]
    mean, var = torch.ones(3), torch.zeros(3)
    assert merge_statistics(5, mean, var) == (5, mean, var)


def test_a_group_that_is_there_is_used_and_left():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with init_process_group() as (ranks, _):
            assert (ranks.rank, ranks.world_size) == (0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_environments_that_torchrun_would_not_set(monkeypatch):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, given, expected in (
        ("RANK", "2", "RANK: got '2', expected an integer, 0 to 1, as torchrun sets it"),
        ("RANK", "a", "RANK: got 'a', expected an integer, 0 to 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: got '0', expected an integer, at least 1"),
        ("MASTER_ADDR", None, "MASTER_ADDR: got none with RANK, expected the first rank's machine"),
        ("MASTER_PORT", None, "MASTER_PORT: got none with RANK, expected a port"),
        ("MASTER_PORT", "-1", "MASTER_PORT: got '-1', expected an integer, 1 to 65535"),
        ("LOCAL_RANK", "", "LOCAL_RANK: got '', expected an integer, at least 0"),
        (
            "MASTER_PORT",
            whole["MASTER_PORT"],
            r"the first rank .*Connection refused at 127.0.0.1:\d+ for 0.2 s",
        ),
    ):
        for each in ("LOCAL_RANK", *whole):
            monkeypatch.delenv(each, raising=False)
        for each, value in (whole | {name: given}).items():
            if value is not None:
                monkeypatch.setenv(each, value)
        with (
            pytest.raises((DeviceError, LostRankError), match=f"^{expected}"),
            init_process_group(timeout=0.2),
        ):
            pass


def test_ranks_that_are_started_again_do_not_look_for_those_before(commands, arrays, tmp_path):
    """torchrun keeps its store when it restarts its ranks, with the addresses of the ranks that died."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    argv = ["train", "--data", str(arrays), "--out", str(tmp_path / "run"), *SETTINGS, "--resume-if-present"]

    def start(rank, steps):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return commands.start(tmp_path / f"{rank}-{steps}.log", *argv, "--steps", str(steps), **environment)

    first = [start(rank, 100_000) for rank in (0, 1)]
    first[0].wait_for(lambda: (tmp_path / "run/last.pt").exists())
    os.kill(first[1].pid, signal.SIGKILL)
    assert [rank.wait() for rank in first] == [1, -signal.SIGKILL]
    second = start(1, 30)
    second.wait_for(lambda: store.num_keys() and store.check(["fastflow/1"]))
    time.sleep(1)  # it would connect to the first rank of before
    again = [start(0, 30), second]
    assert [rank.wait() for rank in again] == [0, 0], [rank.said() for rank in again]


def test_little_shared_memory_is_named():
    """The message of NCCL in a container of docker's 64 MB, which tests cannot have."""
    words = (
        "NCCL error in: NCCLUtils.hpp:268, unhandled system error\nncclSystemError: System call failed.\nLast error:\n"
        "Error while creating shared memory segment /dev/shm/nccl-1YsMbG (size 7340384)"
    )
    with (
        pytest.raises(
            DeviceError, match="^shared memory: got too little for NCCL, .*docker run --shm-size 1g$"
        ),
        Ranks(0, 2).translate_collective_errors(),
    ):
        raise RuntimeError(words)


def test_only_errors_of_collectives_are_another_ranks():
    ranks = Ranks(0, 2)
    with (
        pytest.raises(LostRankError, match=r"see its own error \(Connection closed by peer\)"),
        ranks.translate_collective_errors(),
    ):
        raise RuntimeError(
            "[/third_party/gloo/pair.cc:545] Connection closed by peer. This is typically caused by"
        )
    with pytest.raises(RuntimeError, match="^shapes"), ranks.translate_collective_errors():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="^gloo"), Ranks().translate_collective_errors():
        raise RuntimeError("gloo")
