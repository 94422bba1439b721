"""Captured times: notes for calls that cannot be captured, and no call that synchronizes in a capture."""

import functools

import pytest
import torch

from benchmarks.tools import capture, harness
from tests.support.rows import rows_of


def double(x):
    return 2 * x


def case(**more) -> harness.Case:
    providers = {"eager": double, "fastflow": lambda x: x + x}
    return harness.Case("doubling", "5x3", torch.float32, lambda: (torch.randn(5, 3),), providers, **more)


@pytest.fixture
def options(tmp_path):
    return harness.arguments("tiny", ["--quick", "--device", "cpu", "--results", str(tmp_path)])


def test_rows_have_the_captured_times_or_the_reason_without(options, monkeypatch):
    answers = iter([[4.0, 2.0, 3.0], RuntimeError("operation not permitted\nsecond line"), [1.5]] * 2)

    def time(call, seconds):
        call()
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setitem(harness.CAPTURED, "cpu", functools.partial(capture.captured, time=time))
    harness.run("doubling", [case(bytes_moved=120)], options)
    eager, ours = rows_of(options.results / "doubling.csv")
    assert (eager["captured_us"], eager["captured_note"]) == ("3.00", "")
    assert (ours["captured_us"], ours["captured_note"]) == ("", "not captured: operation not permitted")
    assert {row["same_size_copy_captured_us"] for row in (eager, ours)} == {"1.50"}


def test_other_errors_are_raised():
    def time(call, seconds):
        raise KeyError("a mistake of the benchmark")

    with pytest.raises(KeyError):
        capture.captured({"eager": print}, 0.1, time)


def test_a_call_that_synchronizes_is_refused_before_the_capture(monkeypatch):
    """With stubs of torch and Triton, since a capture needs a GPU."""
    testing = pytest.importorskip("triton.testing")
    modes, benched = [], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    bench = lambda call, rep, return_mode: benched.append((rep, return_mode)) or [0.25]  # noqa: E731
    monkeypatch.setattr(testing, "do_bench_cudagraph", bench)

    def synchronizes():
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    assert capture.times(lambda: None, 0.4) == [250.0]
    assert modes == ["error", "default"] and benched == [(20.0, "all")]
    with pytest.raises(RuntimeError, match="synchronizing"):
        capture.times(synchronizes, 0.4)
    assert modes == ["error", "default"] * 2 and len(benched) == 1


@pytest.mark.gpu
def test_a_graph_on_a_gpu():
    x = torch.randn(64, 12, 16, 16, device="cuda", requires_grad=True)
    upstream = torch.randn_like(x)
    calls = {
        "forward": lambda: double(x),
        "backward": lambda: torch.autograd.grad(double(x), x, upstream),
        "synchronizes": lambda: double(x).sum().item(),
        "random": lambda: torch.rand_like(x),
    }
    medians, notes = capture.captured(calls, 0.1)
    assert medians.keys() == {"forward", "backward", "random"} and min(medians.values()) > 0
    assert notes.keys() == {"synchronizes"} and "synchroniz" in notes["synchronizes"]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device="cuda").sum().item()  # the generator works after a call that was refused
