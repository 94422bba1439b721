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
            now = next((row for row in rows if same(row, fault)), None)
            cells.append([area, f"`{fault.file}`", fault.name, _cell(now)])
            if before:
                cells[-1].append(_cell(next((row for row in before if row["name"] == fault.name), None)))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


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
