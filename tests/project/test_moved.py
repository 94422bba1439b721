"""Import paths of 0.1.0 work for one more release, with a warning."""

import importlib
import subprocess
import sys

import pytest

from fastflow import _moved


@pytest.fixture
def forgotten():
    """The old paths as if none had been imported."""
    for name in _moved.MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("old, new", _moved.MODULES.items())
def test_an_old_path_is_the_new_module(old, new, forgotten):
    with pytest.warns(
        DeprecationWarning, match=f"^{old} has moved to {new}; the old path will be removed$"
    ) as caught:
        module = importlib.import_module(old)
    assert len(caught) == 1
    moved = importlib.import_module(new)
    public = [name for name in vars(moved) if not name.startswith("_")]
    assert public and all(getattr(module, name) is getattr(moved, name) for name in public)
    assert not hasattr(module, "nothing")


@pytest.mark.parametrize("old, new", _moved.NAMES.items())
def test_names_that_have_moved(old, new, forgotten):
    (module, _, name), (new_module, _, new_name) = old.rpartition("."), new.rpartition(".")
    with pytest.warns(DeprecationWarning):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(new_module), new_name)


def test_the_warning_names_the_line_of_the_import(tmp_path):
    """And importing fastflow imports neither the trainer nor an old path."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import fastflow\n"
        "assert not [name for name in sys.modules if name.startswith('fastflow.trainer')]\n"
        "from fastflow.nn.glow_network import GlowNetwork\n"
        "assert GlowNetwork is fastflow.nn.GlowNetwork\n"
        "import fastflow.ranks\n"
        "assert fastflow.ranks.share(4, 0, 2) == (0, 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", str(script)], capture_output=True, text=True, check=True
    )
    said = [line for line in done.stderr.splitlines() if "DeprecationWarning: fastflow" in line]
    assert [line.split(": ")[0] for line in said] == [f"{script}:4", f"{script}:6"]
