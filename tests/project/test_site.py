"""The site builds without a warning: every link and name resolves, no page is left out, and its notebooks run."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.pages import ROOT

NOTEBOOKS = sorted(ROOT.glob("docs/start/*.ipynb"))


def cells(notebook):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-E",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-c",
        "docs",
        ".",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "docs/api/fastflow.nn.html").read_text()
    assert "<math" in api and 'id="fastflow.nn.ActNorm"' in api
    assert not re.search(
        r'(?:src|href)="https?://', (tmp_path / "docs/maths.html").read_text().split("</head>")[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    code = "\n\n".join("".join(cell["source"]) for cell in cells(notebook))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_light_and_whole(notebook):
    assert notebook.stat().st_size < 100_000
    outputs = [output for cell in cells(notebook) for output in cell["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
