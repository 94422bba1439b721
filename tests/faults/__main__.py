"""Plants each fault in a copy of the working tree, runs the tests of its area, and writes which test failed.

    python -m tests.faults --only squeeze                        # the faults whose area, file or name holds a word
    python -m tests.faults --out OUT --table docs/testing.md     # all of them; the table of that page is rewritten

Results are kept in ``OUT/results.csv``: a fault that has one is not run again.  The copy is in ``OUT/tree``, where the
C++ extension is built again after each fault of a C++ file.
"""

import argparse
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.faults.faults import AREAS, Fault

ROOT = Path(__file__).parents[2]
COLUMNS = ["area", *Fault._fields, "verdict", "caught_by", "seconds"]
FIRST, LAST = "<!-- faults: begin -->", "<!-- faults: end -->"
CAUGHT, SURVIVED = "caught", "survived"


class Copy:
    """The working tree in another folder, where faults are planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built = folder / ".built"  # there while the extension is that of the sources
        self._synchronize()
        self.environment = os.environ | {
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one second would share a .pyc
            "OMP_NUM_THREADS": "1",
            "FASTFLOW_CUDA": "0",
            "COLUMNS": "1000",
        }

    def _synchronize(self) -> None:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        files = {name for name in listed if (ROOT / name).is_file()}
        manifest = self.folder / ".files"
        for name in set(manifest.read_text().split("\n")) - files if manifest.exists() else ():
            (self.folder / name).unlink(missing_ok=True)
        for name in sorted(files):
            self._write(name, (ROOT / name).read_bytes())
        manifest.write_text("\n".join(sorted(files)))
        kernels = self.folder / "fastflow/triton_kernels"  # or the package would be that of the installation
        if not kernels.is_symlink():
            kernels.symlink_to("../triton_kernels")

    def _write(self, name: str, contents: bytes) -> None:
        path = self.folder / name
        if path.exists() and path.read_bytes() == contents:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        if name.startswith("csrc/") or name == "setup.py":
            self.built.unlink(missing_ok=True)

    def plant(self, fault: Fault) -> None:
        source = (ROOT / fault.file).read_text()
        assert source.count(fault.old) == 1, f"{fault.name}: {fault.old!r} is not once in {fault.file}"
        self._write(fault.file, source.replace(fault.old, fault.new).encode())

    def restore(self, fault: Fault) -> None:
        self._write(fault.file, (ROOT / fault.file).read_bytes())

    def build(self) -> str | None:
        """Builds the extension where its sources changed; gives the first error."""
        if self.built.exists():
            return None
        done = self.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 1800)
        if done.returncode:
            return next((line for line in done.stdout.split("\n") if "error" in line.lower()), "no message")
        self.built.touch()
        return None

    def run(self, command: list[str], seconds: float) -> subprocess.CompletedProcess:
        """Raises TimeoutExpired after ``seconds``; what the command started ends with it."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, start_new_session=True, **pipe
        ) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def test(self, arguments: list[str], seconds: float) -> subprocess.CompletedProcess:
        quiet = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        return self.run([sys.executable, "-m", "pytest", *quiet, *arguments], seconds)

    def check(self) -> None:
        """Tests have to import the copy, not the installation."""
        code = "import fastflow.triton_kernels as t, fastflow; print(fastflow.__file__, *t.__path__)"
        found = self.run([sys.executable, "-c", code], 300).stdout
        assert found.count(str(self.folder)) == 2, f"tests would import {found}"


def failed_tests(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.+?)?)(?: - .*)?$", output, re.MULTILINE)


def verdict(copy: Copy, fault: Fault, seconds: float) -> tuple[str, str]:
    """(verdict, the test that failed, or the reason)."""
    copy.plant(fault)
    try:
        if fault.file.startswith("csrc/") and (error := copy.build()):
            return "does not build", error
        done = copy.test(["-x", *shlex.split(fault.tests)], seconds)
    except subprocess.TimeoutExpired:
        return "ran out of time", f"{seconds:g} s"
    finally:
        copy.restore(fault)
    if done.returncode == 0:
        return SURVIVED, ""
    failed = failed_tests(done.stdout)
    if not failed or "::" not in failed[0]:
        return "does not import", " ".join(done.stdout.strip().split("\n")[-3:])
    return CAUGHT, failed[0]


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(row: dict, fault: Fault) -> bool:
    return all(row[name] == value for name, value in fault._asdict().items())


def run_all(chosen: list[tuple[str, Fault]], out: Path, seconds: float) -> list[dict]:
    (out / "tree").mkdir(parents=True, exist_ok=True)
    copy, path = Copy(out / "tree"), out / "results.csv"
    rows = rows_of(path) if path.exists() else []
    todo = [(area, fault) for area, fault in chosen if not any(same(row, fault) for row in rows)]
    if todo and (error := copy.build()):
        raise SystemExit(f"the tree does not build: {error}")
    copy.check()
    with tqdm(todo, unit="fault") as bar:
        for area, fault in bar:
            bar.set_postfix_str(fault.name)
            if not fault.file.startswith("csrc/") and copy.build():
                raise SystemExit("the tree does not build")
            start = time.monotonic()
            found, by = verdict(copy, fault, seconds)
            taken = f"{time.monotonic() - start:.1f}"
            row = {"area": area, **fault._asdict(), "verdict": found, "caught_by": by, "seconds": taken}
            rows = [r for r in rows if r["name"] != fault.name] + [row]
            write(path, rows)
            tqdm.write(f"{area}: {fault.name}: {found} {by}", file=sys.stdout)
    refuse_tests_that_always_fail(copy, path, rows, todo)
    return rows


def refuse_tests_that_always_fail(copy: Copy, path: Path, rows: list[dict], run: list[tuple]) -> None:
    """A fault is only caught by a test that passes without it."""
    new = [r for r in rows if r["verdict"] == CAUGHT and any(same(r, fault) for _, fault in run)]
    if not new:
        return
    if error := copy.build():
        raise SystemExit(f"the tree does not build: {error}")
    done = copy.test(sorted({row["caught_by"] for row in new}), 3600)
    failed = failed_tests(done.stdout)
    if done.returncode and not failed:
        raise SystemExit(done.stdout)
    for row in new:
        if row["caught_by"] in failed:
            row["verdict"] = "fails without the fault"
    write(path, rows)


def write(path: Path, rows: list[dict]) -> None:
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


def table(rows: list[dict], before: list[dict]) -> str:
    """A row per fault; with ``before``, results of an earlier version, also the test that caught it then."""
    head = ["area", "file", "fault", "caught by", *(["caught by, before"] if before else [])]
    cells = [head, ["---"] * len(head)]
    for area, faults in AREAS.items():
        for fault in faults:
            now = next((row for row in rows if same(row, fault)), None)
            cells.append([area, f"`{fault.file}`", fault.name, _cell(now)])
            if before:
                cells[-1].append(_cell(next((row for row in before if row["name"] == fault.name), None)))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    if row["verdict"] != CAUGHT:
        return row["verdict"]
    file, test = row["caught_by"].split("::", 1)
    return f"`{Path(file).name}` {test.split('[')[0]}"


def write_table(page: Path, text: str) -> None:
    start, rest = page.read_text().split(FIRST)
    page.write_text(f"{start}{FIRST}\n{text}\n{LAST}{rest.split(LAST)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="run the faults whose area, file or name holds this word")
    parser.add_argument(
        "--out", type=Path, help="folder of the copy and the results; the default is a new one"
    )
    parser.add_argument("--seconds", type=float, default=600, help="time limit of a fault's tests")
    parser.add_argument("--table", type=Path, help="page whose table is rewritten from the results")
    parser.add_argument("--before", type=Path, help="results.csv of an earlier version, for a column of the table")
    options = parser.parse_args()
    chosen = [
        (area, fault)
        for area, faults in AREAS.items()
        for fault in faults
        if any(options.only.lower() in text.lower() for text in (area, fault.file, fault.name))
    ]
    if not chosen:
        raise SystemExit(f"--only: no fault's area, file or name holds {options.only!r}")
    out = options.out or Path(tempfile.mkdtemp(prefix="faults-"))
    rows = run_all(chosen, out.resolve(), options.seconds)
    rows = [row for row in rows if any(same(row, fault) for _, fault in chosen)]
    missed = [row for row in rows if row["verdict"] != CAUGHT]
    print(f"{len(rows) - len(missed)} of {len(rows)} faults were caught ({out / 'results.csv'})")
    for row in missed:
        print(f"  {row['area']}: {row['file']}: {row['name']}: {row['verdict']} {row['caught_by']}")
    if options.table:
        before = rows_of(options.before) if options.before else []
        write_table(options.table, table(rows_of(out / "results.csv"), before))
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
