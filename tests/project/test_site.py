"""The site builds without a warning: every link and name resolves, no page is left out, and its notebooks run."""

import json
import re
import subprocess
import sys

import pytest
import torch

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


# a notebook's training is for its readers: one epoch runs the same lines
SHORTER = {
    "conditional_flow": ("max_epochs=30", "max_epochs=1"),
    "density_from_a_table": ("max_epochs=100", "max_epochs=1"),
    "faster_flow": ("repeats=20", "repeats=1"),
    "glow_on_images": ("--steps 20", "--steps 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, monkeypatch):
    """In this process, which has imported torch and matplotlib for other tests too."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(ROOT)
    code, (long, short) = "\n\n".join("".join(c["source"]) for c in cells(notebook)), SHORTER[notebook.stem]
    assert code.count(long) == 1
    threads = torch.get_num_threads()
    try:
        exec(code.replace(long, short), {"__name__": "__main__"})
    finally:
        pyplot.close("all")
        torch.set_num_threads(threads)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_light_and_whole(notebook):
    assert notebook.stat().st_size < 100_000
    outputs = [output for cell in cells(notebook) for output in cell["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
