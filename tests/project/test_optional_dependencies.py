"""FastFlow is whole without Triton and without its extensions; one that is broken is said once."""

import ast
import json
import subprocess
import sys

import pytest

from fastflow.ops import extension

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
def found() -> dict[str, tuple[list[str], list[str], list[float]]]:
    """Of each script: the warnings, which extensions loaded, and a small Glow's loss with its squared gradient norm."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], input=json.dumps([*SCRIPTS.values()]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    read = []
    for printed in done.stdout.split("--- script ---\n")[1:]:
        warned, loaded, *numbers = printed.splitlines()
        read.append(
            (ast.literal_eval(warned), loaded.split(), [float(v) for line in numbers for v in line.split()])
        )
    return dict(zip(SCRIPTS, read, strict=True))


def test_without_triton_and_without_extension(found):
    warned, loaded, everything = found["everything"]
    assert warned == [] and loaded == [str(extension.cpu), str(extension.cuda)] and len(everything) == 2

    warned, _, numbers = found["no Triton"]
    assert warned == []
    assert numbers == everything

    warned, loaded, numbers = found["no extension"]
    assert warned == [] and loaded == ["False", "False"]
    assert numbers == pytest.approx(everything, rel=1e-5)


def test_broken_extension_warns_once(found):
    warned, loaded, _ = found["broken"]
    assert len(warned) == 1 and "fastflow._C" in warned[0] and "undefined symbol: f" in warned[0]
    assert loaded == ["False", "False"]


@pytest.mark.skipif(not extension.cuda, reason="the CUDA extension was not built here")
def test_broken_cuda_extension_warns_once(found):
    warned, loaded, _ = found["broken CUDA"]
    assert len(warned) == 1 and "_cuda" in warned[0] and "libcudart.so.99" in warned[0]
    assert loaded == ["True", "False"]
