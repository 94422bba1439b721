"""The table of docs/testing.md."""

from pathlib import Path

from tests.faults.faults import AREAS, Fault

FIRST, LAST = "<!-- faults: begin -->", "<!-- faults: end -->"
CAUGHT, SURVIVED = "caught", "survived"


def same(row: dict, fault: Fault) -> bool:
    return all(row[name] == value for name, value in fault._asdict().items())


def table(rows: list[dict], before: list[dict]) -> str:
    """Returns a row per fault; with ``before``, results of an earlier version, also the test that caught it then."""
    head = ["area", "file", "fault", "caught by", *(["before"] if before else [])]
    cells = [head, ["---"] * len(head)]
    for area, faults in AREAS.items():
        for fault in faults:
            found = [_named(results, fault.name) for results in ([rows, before] if before else [rows])]
            cells.append([area, f"`{fault.file}`", fault.name, *map(_cell, found)])
    lines = [_counts(rows), *([f"Before: {_counts(before)}"] if before else []), ""]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def _named(rows: list[dict], name: str) -> dict | None:
    """A fault keeps its name when code that it changes is renamed."""
    return next((row for row in rows if row["name"] == name), None)


def _counts(rows: list[dict]) -> str:
    return f"{sum(row['verdict'] == CAUGHT for row in rows)} of {len(rows)} faults were caught."


def _cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    if row["verdict"] != CAUGHT:
        return f"**{row['verdict']}**"
    file, test = row["caught_by"].split("::", 1)
    return f"`{Path(file).name}` {test.split('[')[0]}"


def write_table(page: Path, text: str) -> None:
    start, rest = page.read_text().split(FIRST)
    page.write_text(f"{start}{FIRST}\n{text}\n{LAST}{rest.split(LAST)[1]}")
