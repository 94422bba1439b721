"""The script that runs on a machine with a GPU, with a stub in place of Python for its stages."""

import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.tools import harness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the pass runs by itself")

SCRIPT = harness.ROOT / "benchmarks" / "gpu_pass.sh"
# In place of Python. A stage's command line is written to $STARTED; $FAILING fails, and pytest ends when small_cases
# has started. The stub answers for the script's own lines of Python, of which each would import torch, and writes them
# to $LINES, each followed by a null byte: a test runs them in its process.
STUB = """#!/usr/bin/env bash
case "$1 $2" in
  "-m "*)
    [ "$2" != pytest ] || until grep -q small_cases "$STARTED"; do sleep 0.1; done
    printf '%q ' "$@" >>"$STARTED"
    echo >>"$STARTED"
    [ "$2" != "$FAILING" ]
    exit ;;
esac
{{ if [ "$1" = - ]; then cat; else printf %s "$2"; fi; printf '\\0'; }} >>"$LINES"
case "$1 $2" in
  *is_available*) echo "${{GPU:-0}}" ;;
  *with_cases*) echo {others} ;;
  "- ") ;;
  *) exec {python} "$@" ;;
esac
"""
FIRST = ("affine_coupling", "conv1x1", "glow_network", "lu_weight")
OTHERS = [
    module.__name__.removeprefix("benchmarks.")
    for name, module in sorted(harness.with_cases().items())
    if name not in FIRST
]


def run(
    tmp_path, folder: str | None, minutes: str = "6", failing: str = "", script: Path = SCRIPT, **more: str
) -> tuple[subprocess.CompletedProcess, list]:
    """The finished pass, and the command line of each stage that it started."""
    stub, started = tmp_path / "python", tmp_path / "started"
    stub.write_text(STUB.format(python=shlex.quote(sys.executable), others=" ".join(OTHERS)))
    stub.chmod(0o755)
    started.write_text("")
    given = {
        "PYTHON": str(stub),
        "MINUTES": minutes,
        "STARTED": str(started),
        "FAILING": failing,
        "GPU": "",
        "LINES": str(tmp_path / "lines"),
    }
    command = ["bash", str(script), *([] if folder is None else [folder])]
    done = subprocess.run(command, env=os.environ | given | more, capture_output=True, text=True)
    return done, [shlex.split(line)[1:] for line in started.read_text().splitlines()]


STAGES = {
    "small_cases",
    "training_speed",
    "glow",
    "fastest_networks",
    "memory",
    "step_profile",
    "overhead",
    "inverse_precision",
    "mnist_flows",
    "neural_spline_flow",
    "autoregressive_flow",
    "residual_flow",
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


def test_the_lines_of_python_print_what_the_stub_prints(tmp_path, capsys):
    done, _ = run(tmp_path, str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    printed = []
    for line in (tmp_path / "lines").read_text().split("\0")[:-1]:
        exec(compile(line, "gpu_pass.sh", "exec"), {})
        printed.append(capsys.readouterr().out)
    about = f"no GPU, torch {torch.__version__}, Python {platform.python_version()}\n"
    assert printed == ["0\n", "360\n", " ".join(OTHERS) + "\n", about]


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    done, started = run(tmp_path, str(tmp_path / "out"), failing="benchmarks.models.glow")
    assert done.returncode == 1 and re.search(r"^glow +\d+ s  failed \(1\)", done.stdout, re.M), done.stdout
    assert len(started) == len(STAGES)


def test_stages_without_time_are_left_out_and_named(tmp_path):
    done, started = run(tmp_path, str(tmp_path / "out"), minutes="0.1")
    assert done.returncode == 1 and not started
    assert "left out: no time" in done.stdout and 'STAGES="' in done.stdout


def test_on_a_gpu_the_tests_run_next_to_the_checks_and_before_what_is_timed(tmp_path):
    about = {"GPU": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    done, started = run(tmp_path, str(tmp_path / "out"), **about)
    assert done.returncode == 0, done.stdout + done.stderr
    order = [module.rsplit(".")[-1] for module, *_ in started]
    assert order[:4] == ["pip", "small_cases", "pytest", "training_speed"]
    assert {*order[3:]} == STAGES - {"small_cases"}
    tests = started[2]
    assert " -m gpu " in " ".join(tests)
    for stage in ("install", "tests"):
        assert re.search(rf"^{stage} +\d+ s  passed$", done.stdout, re.M), done.stdout
    for stage in ("memcheck", "racecheck"):
        assert re.search(rf"^{stage} +\d+ s  skipped: ", done.stdout, re.M), done.stdout
    done, _ = run(tmp_path, str(tmp_path / "out"), failing="pytest", **about)
    assert done.returncode == 1 and re.search(r"^tests +\d+ s  failed \(1\)", done.stdout, re.M), done.stdout


def test_stages_that_are_cut_are_named(tmp_path):
    """The stub's pytest does not end without small_cases."""
    about = {"GPU": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "STAGES": "tests memory"}
    text = SCRIPT.read_text().replace("stage tests 300", "stage tests 1")
    shorter = tmp_path / "gpu_pass.sh"
    shorter.write_text(text.replace('cd "$(dirname "$0")/.."', f"cd {shlex.quote(str(harness.ROOT))}"))
    done, started = run(tmp_path, str(tmp_path / "out"), script=shorter, **about)
    assert done.returncode == 1
    assert re.search(r"^tests +\d+ s  cut after 1 s$", done.stdout, re.M), done.stdout
    assert 'STAGES="tests" INSTALL=0 bash benchmarks/gpu_pass.sh' in done.stdout and len(started) == 1
