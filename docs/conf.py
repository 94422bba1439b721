"""The site: `make docs` builds it with Sphinx into build/site, without a network.

The pages are those of the repository as they are, the API reference is made of the docstrings of every public name.
The groups of the table of contents are the tables of docs/index.md, so that a page that no table names is an error.
"""

import importlib
import inspect
import pkgutil
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"
sys.path.insert(0, str(ROOT))

import fastflow  # noqa: E402
from tests.project.test_public_api import MODULES, defined  # noqa: E402

project, author = "FastFlow", "The FastFlow authors"
copyright = "the FastFlow authors"
release = version = fastflow.__version__

# ---- which files are pages
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/start/*.ipynb",
    "docs/api/*.rst",
]
exclude_patterns = [".venv", "build", "dist", "runs", "data", "csrc", "tests", "benchmarks", "fastflow"]

# ---- how they are read
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # GitHub's anchors, which the pages link to
nb_execution_mode = "off"  # a test runs the notebooks
napoleon_use_rtype = False
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # torch.nn.Module has a docstring of forward
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
nitpicky = True

# ---- how they look
html_theme = "furo"
html_title = f"FastFlow {release}"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"


def groups() -> dict[str, list[str]]:
    """Caption: pages, of the tables of the index."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "docs/index.md").read_text().splitlines():
        if caption := re.fullmatch(r"## (.+)", line):
            pages = found.setdefault(caption[1], [])
        elif row := re.match(r"\| \[[^\]]*\]\((\S+)\.(?:md|ipynb)\) \|", line):
            pages.append(row[1])
    return {caption: pages for caption, pages in found.items() if pages}


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        contents = [*groups().items(), ("API reference", ["api/" + module for module in MODULES])]
        for caption, pages in contents:
            entries = "\n".join(pages)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def write_api(app: Sphinx) -> None:
    """A page for each public module: its docstring, then each public name."""
    API.mkdir(exist_ok=True)
    described = set()
    for name in MODULES:
        module = importlib.import_module(name)
        lines = [name, "=" * len(name), "", f".. automodule:: {name}", ""]
        for public in sorted(getattr(module, "__all__", defined(module))):
            value = getattr(module, public)
            if inspect.isclass(value):
                lines += [f".. autoclass:: {name}.{public}", "   :members:", "   :show-inheritance:"]
            elif inspect.isroutine(value):
                lines += [f".. autofunction:: {name}.{public}"]
            elif inspect.ismodule(value):
                continue
            else:
                lines += [f".. py:data:: {name}.{public}", "", f"   ``{value}``"]
            if inspect.isclass(value) or inspect.isroutine(
                value
            ):  # what two modules export is linked to the first
                lines += ["   :no-index:"] if value in described else []
                described.add(value)
            lines += [""]
        page, text = API / f"{name}.rst", "\n".join(lines)
        if not page.exists() or page.read_text() != text:  # or Sphinx reads it again
            page.write_text(text)


@cache
def public_names() -> dict[str, str]:
    """The public name of an object, by the name under which its module defines it."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", defined(module)):
            value = getattr(module, public)
            if hasattr(value, "__qualname__"):
                found[f"{value.__module__}.{value.__qualname__}"] = f"{name}.{public}"
    return found


def public_bases(app: Sphinx, name: str, cls: type, options: dict, bases: list) -> None:
    """Bases that are not public are shown as the first of their own bases that is."""
    names = public_names()
    for i, base in enumerate(bases):
        if getattr(base, "__module__", "").startswith("fastflow"):
            public = (b for b in base.__mro__ if f"{b.__module__}.{b.__qualname__}" in names)
            bases[i] = next(public, next(b for b in base.__mro__ if not b.__module__.startswith("fastflow")))


def readable_signature(app, what, name, value, options, signature, result) -> tuple[str | None, str | None]:
    """A default that a dataclass makes by a function is printed as no Python expression."""
    return signature and signature.replace("<factory>", "..."), result


def paragraphs(app, what, name, value, options, lines: list[str]) -> None:
    """Raises is a paragraph of its own; an attribute's text before a colon is no type, as napoleon would read it."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment, which it reads instead
    for i in reversed(range(1, len(lines))):
        if lines[i].startswith("Raises "):
            lines.insert(i, "")


def exists(name: str) -> bool:
    """Whether a dotted name is that of an object which can be imported."""
    with suppress(ImportError, AttributeError, ValueError):
        return pkgutil.resolve_name(name) is not None
    return False


def find(app: Sphinx, env, node: nodes.Element, text: nodes.Element) -> nodes.Element | None:
    """A name of ours by its public name; one of another package is no link, but it has to exist there."""
    name = node["reftarget"]
    inside, _, member = name.rpartition(".")
    names = public_names()
    public = names.get(name) or (f"{names[inside]}.{member}" if inside in names else None)
    if public:
        domain, page = env.get_domain("py"), node["refdoc"]
        return domain.resolve_xref(env, page, app.builder, node["reftype"], public, node, text)
    return text if exists(name) else None  # what is not public is named in signatures only


def mathml(display: str):
    def visit(self, node: nodes.Element) -> None:
        self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit, None


def one_contents_per_depth(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """The table of contents of pages of source, which it does not name, differs by the depth of its links only.

    There are more of these pages than of all others, and each took a fifth of a second for it.
    """
    if page.startswith("_modules/"):
        made, toctree, depth = (
            app.env.temp_data.setdefault("contents", {}),
            context["toctree"],
            page.count("/"),
        )

        def contents(**options: object) -> str:
            key = depth, *sorted(options.items())
            if key not in made:
                made[key] = toctree(**options)
            return made[key]

        context["toctree"] = contents


def redirect(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>FastFlow</title>'
        Path(app.outdir, "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=mathml("inline"), block_renderers=mathml("block"))
    app.connect("builder-inited", write_api)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("autodoc-process-docstring", paragraphs, priority=400)  # before napoleon
    app.connect("missing-reference", find)
    app.connect("source-read", add_contents)
    app.connect("html-page-context", one_contents_per_depth, priority=400)  # before the theme
    app.connect("build-finished", redirect)
