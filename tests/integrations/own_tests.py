"""Runs the tests of a library with each of its layers accelerated at construction, and compares with those without.

    python -m tests.integrations.own_tests zuko
    python -m tests.integrations.own_tests nflows

pip fetches the library's source distribution, which has its tests, and the packages that only the tests import. The tests
run twice in processes of their own, each test after the same seed. The exit code is 1 if a test passes without
acceleration only, and no reason is known.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

# packages that only the tests of a library import
LIBRARIES = {"nflows": ("torchtestcase==2018.2",), "zuko": ()}
# tests that do not pass accelerated, with the reason; docs/drop_in.md lists them
KNOWN = {
    "tests/transforms/autoregressive_test.py::MaskedAffineAutoregressiveTransformTest"
    "::test_forward_inverse_are_consistent": "log-dets of both directions cancel to 1.4e-6, and it allows 1e-6"
}


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
    """The unpacked source distribution of the installed release, with what its tests import."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, *source, f"{library}=={version(library)}"], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    if packages := LIBRARIES[library]:
        subprocess.run(
            [*pip, "install", "--no-deps", "--upgrade", "--target", str(unpacked), *packages], check=True
        )
    return unpacked


def outcomes(
    library: str, source: Path, accelerated: bool, options: list[str]
) -> tuple[dict[str, bool], int]:
    """Whether each test passes, and the number of layers that were accelerated; in this process."""
    importlib.import_module(library)  # the installed one, whose path comes after that of its tests
    sys.path.insert(0, str(source))
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


def run(library: str, source: Path, how: str, options: Sequence[str]) -> tuple[dict[str, bool], int]:
    """What :func:`outcomes` finds, in a process of its own."""
    command = [sys.executable, __file__, library, "--source", str(source), "--run", how, *options]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # fewer imports
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    answer = done.stdout.splitlines()
    passed = {
        line.split(" ", 1)[1]: line.startswith("passed")
        for line in answer
        if line.startswith(("passed ", "failed "))
    }
    return passed, int(answer[-1].split()[1])


def report(library: str, source: Path, options: list[str]) -> list[str]:
    """The tests that pass without acceleration only, for no known reason; prints what was found."""
    plain, _ = run(library, source, "plain", options)
    faster, made = run(library, source, "accelerated", options)
    lost = [name for name, good in plain.items() if good and not faster.get(name, False)]
    gained = [name for name, good in plain.items() if not good and faster.get(name, False)]
    print(
        f"{library}: {len(plain)} tests, {sum(plain.values())} pass, {sum(faster.values())} accelerated; {made} layers"
    )
    for name in lost:
        print(f"  does not pass accelerated: {name}, {KNOWN.get(name, 'no reason is known')}")
    for name in gained:
        print(f"  passes accelerated only: {name}")
    return [name for name in lost if name not in KNOWN]


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
