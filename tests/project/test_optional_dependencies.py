"""FastFlow is whole without Triton and without its extensions; one that is broken is said once."""

import ast
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from fastflow.ops import extension
from fastflow.trainer import cli

# Runs first in a process of its own: `name` is not to be had there, as on a machine where it was never installed.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r} or name.startswith({name!r} + "."):
            raise {error}
sys.meta_path.insert(0, Absent())
"""

IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastflow
    from fastflow.ops import extension
print([str(w.message) for w in caught if "does not load" in str(w.message)])
print(extension.cpu, extension.cuda)
print(fastflow.info())
"""

LOSS = """
import torch
torch.manual_seed(0)
model = fastflow.models.Glow(image_shape=(3, 8, 8), levels=1, steps=1, hidden=8)
x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
loss = model(x, seed=0).mean()
loss.backward()
print(loss.item(), sum(p.grad.double().square().sum().item() for p in model.parameters()))
"""

# Imports torch once and forks a process for each script; neither FastFlow nor Triton is imported before.
FORK = """
import json, os, sys
import torch
assert not sys.modules.keys() & {"fastflow", "triton"}
for script in json.load(sys.stdin):
    print("--- script ---", flush=True)
    if not (child := os.fork()):
        exec(compile(script, "script", "exec"), {})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


BROKEN_CUDA = """
import torch
def load(path): raise OSError('libcudart.so.99: no such file')
torch.ops.load_library = load
"""

SCRIPTS = {
    "everything": IMPORT + LOSS,
    "no Triton": BLOCK.format(name="triton", error="ModuleNotFoundError(name)") + IMPORT + LOSS,
    "no extension": BLOCK.format(name="fastflow._C", error="ModuleNotFoundError(name)") + IMPORT + LOSS,
    "broken": BLOCK.format(name="fastflow._C", error='ImportError("undefined symbol: f")') + IMPORT,
    "broken CUDA": BROKEN_CUDA + IMPORT,
}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[list[str], list[str], list[float], str]]:
    """Of each script: warnings, which extensions loaded, a small Glow's loss with its squared gradient norm, and info()."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], input=json.dumps([*SCRIPTS.values()]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    read = []
    for printed in done.stdout.split("--- script ---\n")[1:]:
        head, _, numbers = printed.partition("environment")
        warned, loaded, *info = head.splitlines()
        numbers = [float(v) for line in numbers.splitlines()[1:] for v in line.split()]
        read.append((ast.literal_eval(warned), loaded.split(), numbers, "\n".join(info)))
    return dict(zip(SCRIPTS, read, strict=True))


def test_without_triton_and_without_extension(found):
    warned, loaded, everything, _ = found["everything"]
    assert warned == [] and loaded == [str(extension.cpu), str(extension.cuda)] and len(everything) == 2

    warned, _, numbers, info = found["no Triton"]
    assert warned == []
    assert numbers == everything
    assert "compiled C++" in info

    warned, loaded, numbers, info = found["no extension"]
    assert warned == [] and loaded == ["False", "False"]
    assert numbers == pytest.approx(everything, rel=1e-5)
    assert "C++ extension   not built" in info and "PyTorch, slower" in info


def test_broken_extension_warns_once(found):
    warned, loaded, _, info = found["broken"]
    assert len(warned) == 1 and "fastflow._C" in warned[0] and "undefined symbol: f" in warned[0]
    assert loaded == ["False", "False"]
    assert "does not load: undefined symbol: f" in info


@pytest.mark.skipif(not extension.cuda, reason="the CUDA extension was not built here")
def test_broken_cuda_extension_warns_once(found):
    warned, loaded, _, info = found["broken CUDA"]
    assert len(warned) == 1 and "_cuda" in warned[0] and "libcudart.so.99" in warned[0]
    assert loaded == ["True", "False"]
    assert "CUDA extension  is installed but does not load: libcudart.so.99" in info


def test_info_names_each_package_and_needs_none_of_the_trainer(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.setenv("FASTFLOW_BACKEND", "auto")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch           {torch.__version__}" in printed and "FASTFLOW_BACKEND=auto" in printed
    assert ("nflows -" in printed) == (importlib.util.find_spec("nflows") is None)
