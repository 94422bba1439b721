"""Checks which layer imports which: ops below nn, nn below models, models below the trainer."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("fastflow/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")])

# What a layer may import besides itself and the standard library.
MAY_IMPORT = {
    "triton_kernels": {"torch", "triton"},
    "validation": {"torch"},
    "deprecation": set(),
    "seeds": {"numpy"},
    "progress_bar": {"tqdm"},
    "distributed": {"torch"},
    "state_from_data": {"torch"},
    "transforms": {"torch"},
    "kept": {"torch", "transforms"},
    "archive": {"torch", "validation"},
    "ops": {"torch", "validation", "deprecation", "triton_kernels", "transforms"},
    "reference": {"ops"},
    "system": {"torch", "ops", "facade"},
    "reversible": {"torch", "deprecation", "state_from_data", "transforms"},
    "nn": {
        "torch",
        "ops",
        "validation",
        "deprecation",
        "distributed",
        "kept",
        "reversible",
        "state_from_data",
        "transforms",
        "torchdiffeq",  # of continuous flows, when one is made
    },
    "models": {"torch", "nn", "validation", "deprecation", "archive", "state_from_data", "transforms"},
    "checkpoint": {"torch", "validation", "models", "archive", "facade"},
    "fitting": {"torch", "numpy", "validation", "models", "progress_bar", "trainer"},
    "export": {"torch", "validation", "models", "nn"},
    "explore": {"torch", "validation", "models", "progress_bar", "seeds", "sklearn"},
    # a module of the name of a library imports that library
    "integrations": {
        "torch",
        "ops",
        "nn",
        "kept",
        "progress_bar",
        "reversible",
        "transforms",
        "validation",
        "FrEIA",
        "glasflow",
        "nflows",
        "normflows",
        "zuko",
    },
}
FORBIDDEN_ABOVE = {
    "trainer": {"triton", "triton_kernels", "ops", "reference", "reversible", "nn"},
    "facade": {"triton", "trainer"},
}
NOWHERE = {"tests", "benchmarks", "conftest"}


def layer_of(module: str) -> str:
    """The layer of ``fastflow.x.y``. The package itself, which only passes names on, is the facade; __main__ is part of the trainer."""
    parts = module.split(".")
    if len(parts) == 1:
        return "facade"
    return "trainer" if parts[1] in ("trainer", "__main__") else parts[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fastflow" else ("fastflow", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT / name.replace("fastflow.triton_kernels", "triton_kernels").replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that ``source`` imports, at the top or within a function."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if base.startswith("fastflow") and is_module(full) else base)
    return found


def wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    layer, wrong = layer_of(module), []
    for name in imports(source, module, is_package):
        top = name.split(".")[0]
        target = layer_of(name) if top == "fastflow" else top
        if target == layer or top in sys.stdlib_module_names or name == "fastflow._C":
            continue
        if layer in MAY_IMPORT:
            allowed = target in MAY_IMPORT[layer]
        else:
            allowed = target not in FORBIDDEN_ABOVE[layer]
        if not allowed or top in NOWHERE:
            wrong.append(f"{module} ({layer}) imports {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path):
    assert wrong_imports(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("fastflow.ops.actnorm.reference", "from fastflow.nn import Flow"),
        ("fastflow.ops.layout", "import triton"),
        ("fastflow.reversible.segments", "from fastflow.nn import Flow"),
        ("fastflow.ops.actnorm", "from fastflow.nn.actnorm import ActNorm"),
        ("fastflow.nn.actnorm", "def f():\n    from ..models import Glow"),
        ("fastflow.nn.actnorm", "from fastflow import reference"),
        ("fastflow.models.glow", "from fastflow import ops"),
        ("fastflow.models.glow", "from fastflow.trainer.train import train"),
        ("fastflow.explore", "from fastflow.trainer import data"),
        ("fastflow", "from fastflow import trainer"),
        ("fastflow.trainer.train", "from fastflow.triton_kernels import actnorm"),
        ("fastflow.triton_kernels.actnorm", "from fastflow import reference"),
        ("fastflow.trainer.train", "from benchmarks.tools.harness import time"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert len(wrong_imports(source, module)) == 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/**/test_*.py")), ids=lambda p: p.name)
def test_no_test_file_is_imported(path):
    """Test files share code through ``tests/support``."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found = imports(path.read_text(), module, is_package=False)
    assert not [name for name in found if ".test_" in name or name.startswith("test_")]
