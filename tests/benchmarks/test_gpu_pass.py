"""The script that runs on a machine with a GPU, with a stub in place of Python for its stages."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks.tools import harness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the pass runs by itself")

# Runs Python, except for the stages: it writes their command lines to $STARTED, and $FAILING fails.
STUB = """#!/usr/bin/env bash
[ "$1" = -m ] || exec {python} "$@"
printf '%q ' "$@" >>"$STARTED"
echo >>"$STARTED"
[ "$2" != "$FAILING" ]
"""


def run(
    tmp_path, folder: str | None, minutes: str = "6", failing: str = ""
) -> tuple[subprocess.CompletedProcess, list]:
    """The finished pass, and the command line of each stage that it started."""
    stub, started = tmp_path / "python", tmp_path / "started"
    stub.write_text(STUB.format(python=shlex.quote(sys.executable)))
    stub.chmod(0o755)
    started.write_text("")
    given = {"PYTHON": str(stub), "MINUTES": minutes, "STARTED": str(started), "FAILING": failing}
    script = ["bash", str(harness.ROOT / "benchmarks" / "gpu_pass.sh"), *([] if folder is None else [folder])]
    done = subprocess.run(script, env=os.environ | given, capture_output=True, text=True)
    return done, [shlex.split(line)[1:] for line in started.read_text().splitlines()]


STAGES = {
    "small_cases",
    "training_speed",
    "glow",
    "memory",
    "profile",
    "inverse_precision",
    *harness.with_cases(),
}


def test_without_a_gpu_it_takes_a_folder(tmp_path):
    done, started = run(tmp_path, None)
    assert done.returncode == 2 and "give a folder" in done.stderr and not started


def test_every_stage_starts_with_options_that_its_program_takes(tmp_path, capsys):
    done, started = run(tmp_path, str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "gpu_pass" / "summary.txt").read_text()
    for stage in STAGES:
        assert re.search(rf"^{stage} +\d+ s  passed$", summary, re.M), summary
    assert {module.rsplit(".")[-1] for module, *_ in started} == STAGES
    for module, *options in started:
        assert module.endswith("small_cases") or str(tmp_path / "out") in options
        # a parser names all the options that it does not know
        with pytest.raises(SystemExit):
            importlib.import_module(module).main([*options, "--unknown"])
        assert capsys.readouterr().err.strip().endswith("unrecognized arguments: --unknown"), module


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    done, started = run(tmp_path, str(tmp_path / "out"), failing="benchmarks.models.glow")
    assert done.returncode == 1 and re.search(r"^glow +\d+ s  failed \(1\)", done.stdout, re.M), done.stdout
    assert len(started) == len(STAGES)


def test_stages_without_time_are_left_out_and_named(tmp_path):
    done, started = run(tmp_path, str(tmp_path / "out"), minutes="0.1")
    assert done.returncode == 1 and not started
    assert "left out: no time" in done.stdout and 'STAGES="' in done.stdout
