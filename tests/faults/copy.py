"""The working tree in another folder, where faults are planted."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.faults import Fault

ROOT = Path(__file__).parents[2]


def sources() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\n") if (ROOT / name).is_file())


def is_compiled(name: str) -> bool:
    return name.startswith("csrc/") or name == "setup.py"


class Copy:
    """The C++ extension in it is the one of the working tree until a fault of a C++ file is planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built = folder / ".built"  # there while the extension is the one of the sources
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / ".files"
        names = sources()
        for name in set(manifest.read_text().split("\n")) - {*names} if manifest.exists() else ():
            (folder / name).unlink(missing_ok=True)
        for name in names:
            self._write(name, (ROOT / name).read_bytes())
        manifest.write_text("\n".join(names))
        kernels = folder / "fastflow/triton_kernels"  # or the package would be the one of the installation
        if not kernels.is_symlink():
            kernels.symlink_to("../triton_kernels")
        if not self.built.exists():
            self._take_extension([name for name in names if is_compiled(name)])

    def _take_extension(self, names: list[str]) -> None:
        newest = max((ROOT / name).stat().st_mtime for name in names)
        for extension in ROOT.glob("fastflow/_C*.so"):
            if extension.stat().st_mtime >= newest:
                shutil.copy2(extension, self.folder / "fastflow")
                self.built.touch()
                print(f"the copy starts with {extension.name} of the working tree")

    def _write(self, name: str, contents: bytes) -> None:
        path = self.folder / name
        if path.exists() and path.read_bytes() == contents:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        if path.suffix == ".py":  # two faults of one second and one length would share their bytecode
            Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
        if is_compiled(name):
            self.built.unlink(missing_ok=True)

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """A block in which the copy has the fault."""
        source = (self.folder / fault.file).read_bytes()
        if source.count(fault.old.encode()) != 1:
            raise ValueError(f"{fault.name}: {fault.old!r} is not once in {fault.file}")
        self._write(fault.file, source.replace(fault.old.encode(), fault.new.encode()))
        try:
            yield
        finally:
            self._write(fault.file, source)

    def build(self) -> str | None:
        """Builds the extension if its sources changed; returns the first error.

        The first build compiles every file, a later one the files that changed.  With ccache, which torch uses where
        it is installed, a file that was compiled before costs nothing.
        """
        if self.built.exists():
            return None
        environment = os.environ | {
            "FASTFLOW_CUDA": "0",
            "FASTFLOW_EMULATOR": "1",
            "MAX_JOBS": "1",
            "CCACHE_BASEDIR": str(self.folder),
            "CCACHE_NOHASHDIR": "1",
        }
        start = time.monotonic()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        output = (done.stdout + done.stderr).split("\n")
        if done.returncode:
            return next((line for line in output if "error: " in line), "\n".join(output[-5:]))
        files = sum(line.startswith("[") for line in output)
        print(f"  built in {time.monotonic() - start:.0f} s, {files} files", flush=True)
        self.built.touch()
        return None

    def check(self) -> None:
        """Raises where tests would import the installation instead of the copy."""
        code = "import fastflow.triton_kernels as t, fastflow; print(fastflow.__file__, *t.__path__)"
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-c", code]
        found = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        ).stdout
        if found.count(str(self.folder)) != 2:
            raise RuntimeError(f"the tests would import {found}")
