"""Runs the tests of a library with each of its layers accelerated at construction, and compares with those without.

    python -m tests.integrations.own_tests zuko

pip fetches the library's source distribution, which has its tests. They run twice in processes of their own, each test
after the same seed. The exit code is 1 if a test passes without acceleration only.
"""

import argparse
import importlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

LIBRARIES = ("nflows", "zuko")


class Outcomes:
    """pytest's plugin: a seed before each test, and the outcome of each test."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and report.outcome != "failed"


def accelerate_at_construction(library: str) -> list[nn.Module]:
    """From now on each new layer that is covered is accelerated; the list grows by those that are."""
    integration, made = importlib.import_module(f"fastflow.integrations.{library}"), []

    def accelerated(init: Callable, c: type) -> Callable:
        def init_and_accelerate(self: nn.Module, *args: object, **options: object) -> None:
            init(self, *args, **options)
            if type(self) is c and integration.accelerate(self).replaced.get(""):
                made.append(self)

        return init_and_accelerate

    for c in integration._CLASSES:
        c.__init__ = accelerated(c.__init__, c)
    return made


def fetch(library: str, folder: Path) -> Path:
    """The unpacked source distribution of the installed release."""
    source = ["pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    command = [sys.executable, "-m", *source, "-d", str(folder), f"{library}=={version(library)}"]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def outcomes(
    library: str, source: Path, accelerated: bool, options: list[str]
) -> tuple[dict[str, bool], int]:
    """Whether each test passes, and the number of layers that were accelerated; in this process."""
    made = accelerate_at_construction(library) if accelerated else []
    found = Outcomes()
    tests = [
        str(p)
        for p in sorted(source.rglob("*test*.py"))
        if p.name.startswith("test_") or p.stem.endswith("_test")
    ]
    config = [
        "--rootdir",
        str(source),
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
    ]
    pytest.main(
        ["-q", "--no-header", "--tb=line", "-W", "ignore", *config, *options, *tests], plugins=[found]
    )
    return found.passed, len(made)


def report(library: str, source: Path, options: list[str]) -> list[str]:
    """The tests that pass without acceleration only; prints what was found."""
    results = []
    for how in ("plain", "accelerated"):
        command = [sys.executable, __file__, library, "--source", str(source), "--run", how, *options]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        made = int(answer[-1].split()[1])
        passed = {
            line.split(" ", 1)[1]: line.startswith("passed")
            for line in answer
            if line.startswith(("passed ", "failed "))
        }
        results.append((passed, made))
    (plain, _), (faster, made) = results
    lost = [name for name, good in plain.items() if good and not faster.get(name, False)]
    gained = [name for name, good in plain.items() if not good and faster.get(name, False)]
    print(
        f"{library}: {len(plain)} tests, {sum(plain.values())} pass, {sum(faster.values())} accelerated; {made} layers"
    )
    for name in lost:
        print(f"  does not pass accelerated: {name}")
    for name in gained:
        print(f"  passes accelerated only: {name}")
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--source", type=Path, help="an unpacked source distribution, instead of fetching it")
    parser.add_argument("--run", choices=("plain", "accelerated"), help="run the tests once, in this process")
    given, options = parser.parse_known_args()
    if given.run:
        passed, made = outcomes(given.library, given.source, given.run == "accelerated", options)
        for name, good in passed.items():
            print("passed" if good else "failed", name)
        print("layers", made)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source = given.source or fetch(given.library, Path(folder))
        return int(bool(report(given.library, source, options)))


if __name__ == "__main__":
    sys.exit(main())
