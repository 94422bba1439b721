"""The workflow files are valid, and a release is refused while something is missing."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tests.support.pages import ROOT

SCHEMAS = {
    "vendor.github-workflows": sorted(ROOT.glob(".github/workflows/*.yml")),
    "vendor.github-issue-forms": sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_workflow_files_are_valid(schema):
    assert SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *SCHEMAS[schema]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_wheels_are_built_for_the_pythons_that_the_package_names():
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    built = re.search(r"python: (\[.*\])", (ROOT / ".github/workflows/wheels.yml").read_text())[1]
    assert named == json.loads(built)


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The script, on a repository that is ready for version 1.2.3."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".github/release.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "fastflow").mkdir()
    (tmp_path / "fastflow/__init__.py").write_text('"""F."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 - 2026-01-02\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    script.run.__kwdefaults__["cwd"] = tmp_path
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return script


def test_a_release_that_is_ready(release):
    assert release.version() == "1.2.3" and release.unready("1.2.3") == []


def test_a_release_that_is_not_ready(release, tmp_path):
    subprocess.run(["git", "tag", "v1.2.3"], cwd=tmp_path, check=True)
    subprocess.run(["git", "switch", "-q", "-c", "feature"], cwd=tmp_path, check=True)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")
    reasons = release.unready("1.2.3")
    assert [r.split(":")[0] for r in reasons] == [
        "uncommitted changes",
        "the branch is feature, expected main",
        "v1.2.3 is tagged already",
        "CHANGELOG.md has no heading '## 1.2.3 - YYYY-MM-DD'",
    ]
