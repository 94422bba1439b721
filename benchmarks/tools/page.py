"""Tables in Markdown, and pages that hold them between markers."""

import re
from pathlib import Path


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def write(page: Path, found: dict[str, str]) -> None:
    """Replaces the text between each pair of markers.

    They are ``<!-- NAME: written by benchmarks/... -->`` and ``<!-- end of NAME -->``. Raises ValueError if a
    page does not have exactly one pair.
    """
    text = page.read_text()
    for name, new in found.items():
        begin, end = rf"(<!-- {re.escape(name)}: written by \S+ -->)", f"<!-- end of {name} -->"
        text, count = re.subn(
            f"{begin}.*?{re.escape(end)}", lambda m, t=f"\n{new}\n{end}": m[1] + t, text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"{page.name}: got {count} pairs of markers for {name}, expected one")
    page.write_text(text)
