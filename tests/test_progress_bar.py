"""Progress of calls that take long: on a terminal only, not of short calls, and as much as was done."""

import io
import re
import sys
import time

import pytest
import torch

import fastflow
from fastflow import explore, progress_bar
from fastflow.integrations.accelerate import accelerate
from fastflow.models import VectorGlow
from fastflow.progress_bar import ProgressBar

pytest.importorskip("tqdm")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch, delay=0.0):
    """Standard error as a terminal, on which a call is long after ``delay`` seconds."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress_bar, "DELAY", delay)
    return sys.stderr


def small():
    return VectorGlow(features=2, steps=1, hidden=4)


def fit():
    fastflow.fit(small(), torch.randn(40, 2), batch_size=10, max_epochs=3)


def fit_density():
    explore.fit_density(small(), lambda x: -x.square().sum(1), 5, n=10)


def distill():
    explore.distill(small(), small(), 5)


def checked():
    accelerate(torch.nn.Linear(2, 2), {}, lambda c: False, check=lambda m: m(torch.ones(1, 2)))


CALLS = {
    "3/3 .*epoch.*train .*held out": fit,
    "5/5 .*step.*nats": fit_density,
    "5/5 .*step.* nats": distill,
    "1/2 .*check.*as it was": checked,
}


@pytest.mark.parametrize("shown", CALLS)
def test_long_calls_show_a_bar(monkeypatch, shown):
    written = terminal(monkeypatch)
    CALLS[shown]()
    *_, last = written.getvalue().strip().split("\r")
    assert re.search(shown, last), last


@pytest.mark.parametrize("call", CALLS.values())
def test_short_calls_and_calls_without_a_terminal_are_quiet(monkeypatch, capfd, call):
    monkeypatch.setattr(sys, "stderr", Terminal())
    call()
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress_bar, "DELAY", 0.0)
    call()
    assert sys.stderr.getvalue() == "" and capfd.readouterr() == ("", "")


def test_progress_false_is_quiet(monkeypatch):
    written = terminal(monkeypatch)
    fastflow.fit(small(), torch.randn(40, 2), max_epochs=2, progress=False)
    explore.distill(small(), small(), 2, progress=False)
    assert written.getvalue() == ""


def test_a_first_step_that_takes_long_shows_the_bar(monkeypatch):
    written = terminal(monkeypatch, 0.01)
    with ProgressBar(2, "epoch"):
        for _ in range(500):
            if "0/2" in written.getvalue():
                break
            time.sleep(0.01)
    assert "0/2" in written.getvalue() and written.getvalue().endswith("\n")


def test_a_bar_that_appears_late_counts_the_steps_before(monkeypatch):
    written = terminal(monkeypatch, 0.2)
    with ProgressBar(4, "step") as bar:
        bar.step()
        bar.step("second")
        assert written.getvalue() == ""
        time.sleep(0.3)
        bar.note("of the third")
        assert "2/4" in written.getvalue() and "of the third" in written.getvalue()
        bar.note("too soon")
        bar.step("third")
    assert "3/4" in written.getvalue() and "too soon" not in written.getvalue()
