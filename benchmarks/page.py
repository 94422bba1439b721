"""Tables in Markdown, and the pages that hold them between markers."""

import re
from pathlib import Path


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def write(page: Path, script: str, found: dict[str, str]) -> None:
    """Puts each text between its pair of markers: ``<!-- NAME: written by benchmarks/SCRIPT.py -->`` and ``<!-- end of NAME -->``."""
    text = page.read_text()
    for name, new in found.items():
        begin, end = f"<!-- {name}: written by benchmarks/{script}.py -->", f"<!-- end of {name} -->"
        text, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, t=f"{begin}\n{new}\n{end}": t, text, flags=re.S)
        if count != 1:
            raise ValueError(f"{page.name}: got {count} of {begin}, expected one")
    page.write_text(text)
