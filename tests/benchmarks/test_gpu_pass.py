"""The script that a GPU machine runs."""

import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.tools import harness
from tests.support.rows import rows_of


def test_the_gpu_pass_runs_without_a_gpu_at_tiny_sizes(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the pass is run by itself, in minutes")
    script = ["bash", str(harness.ROOT / "benchmarks" / "gpu_pass.sh")]
    about = {
        "env": os.environ | {"PYTHON": sys.executable, "MINUTES": "6"},
        "capture_output": True,
        "text": True,
    }
    refused = subprocess.run(script, **about)
    assert refused.returncode == 2 and "give a folder" in refused.stderr
    done = subprocess.run([*script, str(tmp_path)], **about)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "gpu_pass" / "summary.txt").read_text()
    stages = [
        "small_cases",
        "training_speed",
        "glow",
        "memory",
        "profile",
        *harness.with_cases(),
        "inverse_precision",
    ]
    for stage in stages:
        assert re.search(rf"^{stage} +\d+ s  passed$", summary, re.M), summary
    for stage in stages[1:]:
        assert rows_of(tmp_path / f"{stage}.csv")
    cut = subprocess.run(
        [*script, str(tmp_path / "cut")], **about | {"env": about["env"] | {"MINUTES": "0.2"}}
    )
    assert cut.returncode == 1 and "left out: no time" in cut.stdout
