"""Plants each fault in a copy of the working tree, runs the tests of its area, and writes which test failed.

    python -m tests.faults --only squeeze                        # the faults whose area, file or name holds a word
    python -m tests.faults --out OUT --table docs/testing.md     # all of them; rewrites the table of that page

Results are kept in ``OUT/results.csv``: a fault that was caught is not run again.  The copy is in ``OUT/tree``.
"""

import argparse
import csv
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.copy import Copy, is_compiled
from tests.faults.faults import AREAS, Fault
from tests.faults.forked import run_pytest
from tests.faults.table import CAUGHT, SURVIVED, same, table, write_table

COLUMNS = ["area", *Fault._fields, "verdict", "caught_by", "seconds"]


def verdict(copy: Copy, fault: Fault, seconds: float) -> tuple[str, str]:
    """Returns the verdict and the test that failed, or the reason."""
    with copy.planted(fault):
        if error := copy.build():
            return "does not build", error
        found = run_pytest(copy.folder, ["-x", *shlex.split(fault.tests)], seconds)
    if found.failed and "::" in found.failed[0]:
        return CAUGHT, found.failed[0]
    if found.code == 0:
        return SURVIVED, ""
    if found.code is None:
        return "ran out of time", f"{seconds:g} s"
    return "no test ran", " ".join(found.output.strip().split("\n")[-3:])


def run_all(chosen: list[tuple[str, Fault]], out: Path, seconds: float) -> list[dict]:
    copy, path = Copy(out / "tree"), out / "results.csv"
    copy.check()
    rows = read(path) if path.exists() else []
    done = [row for row in rows if row["verdict"] == CAUGHT]
    todo = [(area, fault) for area, fault in chosen if not any(same(row, fault) for row in done)]
    todo.sort(key=lambda pair: is_compiled(pair[1].file))  # last, since each costs a compilation
    for number, (area, fault) in enumerate(todo, 1):
        start = time.monotonic()
        found, by = verdict(copy, fault, seconds)
        taken = f"{time.monotonic() - start:.1f}"
        row = {"area": area, **fault._asdict(), "verdict": found, "caught_by": by, "seconds": taken}
        rows = [r for r in rows if r["name"] != fault.name] + [row]
        write(path, rows)
        print(f"{number}/{len(todo)} {area}: {fault.name}: {found} {by} ({taken} s)", flush=True)
    refuse_tests_that_always_fail(copy, rows, chosen)
    write(path, rows)
    return rows


def refuse_tests_that_always_fail(copy: Copy, rows: list[dict], chosen: list[tuple[str, Fault]]) -> None:
    """Takes back the verdict of a fault that a test caught which fails without it."""
    caught = [r for r in rows if r["verdict"] == CAUGHT and any(same(r, fault) for _, fault in chosen)]
    if not caught:
        return
    if error := copy.build():
        raise SystemExit(f"the tree does not build: {error}")
    print("running the tests that failed, without a fault", flush=True)
    found = run_pytest(copy.folder, sorted({row["caught_by"] for row in caught}), 3600)
    if found.code not in (0, 1):
        raise SystemExit(found.output)
    for row in caught:
        if row["caught_by"] in found.failed:
            row["verdict"] = "fails without the fault"


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="run the faults whose area, file or name holds this word")
    parser.add_argument("--out", type=Path, help="folder of the copy and the results (default: a new one)")
    parser.add_argument("--seconds", type=float, default=120, help="CPU time that a fault's tests may take")
    parser.add_argument("--table", type=Path, help="page whose table is rewritten from the results")
    parser.add_argument(
        "--before", type=Path, help="results.csv of an earlier version: a column of the table"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    chosen = [
        (area, fault)
        for area, faults in AREAS.items()
        for fault in faults
        if any(options.only.lower() in text.lower() for text in (area, fault.file, fault.name))
    ]
    if not chosen:
        raise SystemExit(f"--only: no fault's area, file or name holds {options.only!r}")
    out = (options.out or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    rows = [r for r in run_all(chosen, out, options.seconds) if any(same(r, fault) for _, fault in chosen)]
    missed = [row for row in rows if row["verdict"] != CAUGHT]
    print(f"{len(rows) - len(missed)} of {len(rows)} faults were caught ({out / 'results.csv'})")
    for row in missed:
        print(f"  {row['area']}: {row['file']}: {row['name']}: {row['verdict']} {row['caught_by']}")
    if options.table:
        before = read(options.before) if options.before else []
        write_table(options.table, table(read(out / "results.csv"), before))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
