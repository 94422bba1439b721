"""The public names with their parameters and defaults are those of public_api.txt: no name is lost unnoticed.

A deliberate change rewrites the page, and CHANGELOG.md names it:

    python -m tests.project.test_public_api
"""

import importlib
import inspect
import re
from pathlib import Path

from tests.support.public_names import MODULES, defined, functions

PAGE = Path(__file__).with_name("public_api.txt")


def parameters(function: object) -> str:
    """``(x, n_bits=8)``: names and defaults. Annotations are printed differently by other versions of Python."""
    found = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    text = str(inspect.Signature(found))
    return re.sub(r"<(?:function|class|object) '?([\w.]+)[^>]*>", r"\1", text)


def methods(cls: type) -> list[str]:
    return [
        name if isinstance(inspect.getattr_static(cls, name), property) else f"{name}{parameters(function)}"
        for name, function in functions(cls)
    ]


def public_api() -> str:
    lines = []
    for module in MODULES:
        names = importlib.import_module(module)
        for name in sorted(getattr(names, "__all__", defined(names))):
            value = getattr(names, name)
            if inspect.isclass(value):
                lines += [f"{module}.{name}", *(f"    {method}" for method in methods(value))]
            else:
                lines.append(f"{module}.{name}{parameters(value) if inspect.isfunction(value) else ''}")
    return "\n".join(lines) + "\n"


def test_public_names_are_those_of_the_page():
    assert public_api() == PAGE.read_text(), "python -m tests.project.test_public_api rewrites the page"


if __name__ == "__main__":
    PAGE.write_text(public_api())
