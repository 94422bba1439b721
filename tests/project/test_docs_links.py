"""Links, anchors, modules and file paths that the documentation names exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.pages import FENCE, PAGES, ROOT

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
MODULE = re.compile(r"(?:\bpython[\d.]*|\btorchrun [^`\n]*?) -m ([\w.]+)")
REPOSITORY_PATH = re.compile(r"(?:fastflow|tests|csrc|triton_kernels|benchmarks|docs)/[\w./*-]*")


def slugs(text: str) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", FENCE.sub("", text), flags=re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # the text of a link
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = 1
        unique = slug
        while unique in found:
            unique, count = f"{slug}-{count}", count + 1
        found.add(unique)
    return found


def broken_links(page: Path) -> list[str]:
    broken = []
    for path, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        target = page.parent / path if path else page
        if path.startswith("http"):
            continue
        if not target.exists() or (anchor and anchor not in slugs(target.read_text())):
            broken.append(f"{path}#{anchor}" if anchor else path)
    return broken


def missing_modules(text: str) -> list[str]:
    return [name for name in set(MODULE.findall(text)) if not importable(name.replace("NAME", "actnorm"))]


def importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def missing_paths(text: str) -> list[str]:
    """The paths in backticks and in blocks of commands that do not exist, with any name for NAME."""
    quoted = re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) + FENCE.findall(text)
    words = {word for code in quoted for word in code.split()}
    paths = {word for word in words if REPOSITORY_PATH.fullmatch(word)}
    return sorted(path for path in paths if not any(ROOT.glob(path.replace("NAME", "*"))))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(ROOT / page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # it has old names
def test_named_modules_are_importable(page):
    assert missing_modules((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_named_paths_exist(page):
    assert missing_paths((ROOT / page).read_text()) == []


def test_slugs_are_those_of_github():
    page = "# A `code` heading\n## 1x1 convolution: x, y\n## Twice\n## Twice\n```\n# not a heading\n```\n"
    assert slugs(page) == {"a-code-heading", "1x1-convolution-x-y", "twice", "twice-1"}


def test_broken_names_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Head\n[a](#head) [b](#tail) [c](absent.md) [d](page.md#head) [e](page.md#tail)\n")
    assert broken_links(page) == ["#tail", "absent.md", "page.md#tail"]
    assert missing_modules("`python -m benchmarks.ops.NAME` `python -m benchmarks.absent`") == [
        "benchmarks.absent"
    ]
    text = "`csrc/NAME/cpu.cpp` `csrc/absent/cpu.cpp` `fastflow/nn/absent.py`\n```\nbash benchmarks/absent.sh\n```\n"
    assert missing_paths(text) == ["benchmarks/absent.sh", "csrc/absent/cpu.cpp", "fastflow/nn/absent.py"]
