"""The Python in README and docs runs as it stands, and what is shown of the tools is there."""

import linecache
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]


# of these, blocks show the use; what make setup does not install need not be there
OTHER_LIBRARIES = {"FrEIA", "glasflow", "nessai", "nflows", "normflows", "sbi", "triton", "zuko"}


def imported(block: str) -> set[str]:
    """Names of the packages that a block imports."""
    return set(re.findall(r"^(?:from|import) (\w+)", block, flags=re.MULTILINE))


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(block: str, names: dict, file: str) -> None:
    """Runs a block whose source can be read as that of ``file``: Triton reads the source of kernels."""
    linecache.cache[file] = len(block), None, block.splitlines(keepends=True), file
    exec(compile(block, file, "exec"), names)


def test_the_readme_opens_with_two_commands():
    before_python = README.split("```python")[0]
    assert re.findall(r"^make \w+", before_python, flags=re.MULTILINE) == ["make train", "make test"]
    assert len(blocks(README)[0].strip().splitlines()) == 15


def test_the_first_block_trains_and_samples(capsys):
    names = {}
    exec(blocks(README)[0], names)
    model, samples, loss = (names[k] for k in ("model", "samples", "loss"))
    assert samples.dtype == torch.uint8 and samples.ndim == 4 and samples.shape[1:] == model.shape
    assert 7 < loss.item() < 10 and all(p.grad is not None for p in model.parameters())
    assert "bits/dim" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page):
    names = {}  # a page's blocks follow on each other
    for i, block in enumerate(blocks((ROOT / page).read_text())):
        if missing := [name for name in imported(block) & OTHER_LIBRARIES if find_spec(name) is None]:
            pytest.skip(f"a block needs {missing[0]}")
        run(block, names, f"<{page}, block {i}>")
