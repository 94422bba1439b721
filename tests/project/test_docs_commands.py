"""The command line takes each command and each option that the documentation shows."""

import re
import shlex
from dataclasses import fields

import pytest

from tests.support.pages import FENCE, PAGES, ROOT

pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from fastflow.trainer import commands  # noqa: E402
from fastflow.trainer.config import RENAMED, Config  # noqa: E402

COMMAND = re.compile(r"(?:^|-m )fastflow ((?:train|evaluate|sample|interpolate)\b.*)")
OPTION = re.compile(r"`(--[a-z][\w-]*)[^`]*`")
PAGES = [page for page in PAGES if page != "CHANGELOG.md"]  # it has old names


def shown(text: str) -> list[list[str]]:
    """The arguments of the commands in blocks and in backticks."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    lines = blocks.split("\n") + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    placeholders = {"mnist-...": "mnist-simple", "$run": "--resume runs/glow"}
    for placeholder, value in placeholders.items():
        lines = [line.replace(placeholder, value) for line in lines]
    found = (COMMAND.search(line.strip()) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


COMMANDS = {" ".join(argv): argv for page in PAGES for argv in shown((ROOT / page).read_text())}


def test_commands_are_found():
    assert {argv[0] for argv in COMMANDS.values()} == {"train", "evaluate", "sample", "interpolate"}
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands_are_taken(argv, monkeypatch):
    ran = []
    for command in ("train", "_evaluate", "_sample", "_interpolate"):
        monkeypatch.setattr(commands, command, ran.append)
    monkeypatch.setattr(commands, "resumed_config", lambda folder: Config())
    if "--help" in argv:
        with pytest.raises(SystemExit, match="^0$"):
            commands.run_command(argv)
        return
    commands.run_command(argv)
    assert type(ran[0]).__name__ == {"train": "Config"}.get(argv[0], argv[0].title())


def test_options_exist():
    classes = (Config, commands.Evaluate, commands.Sample, commands.Interpolate)
    names = {f.name for c in classes for f in fields(c)} | RENAMED.keys()
    known = {f"--{no}{name.replace('_', '-')}" for name in names for no in ("", "no-")}
    found = set(OPTION.findall(FENCE.sub("", (ROOT / "docs/training.md").read_text())))
    of_launchers = {
        "--kill-on-bad-exit",
        "--rdzv-endpoint",
        "--standalone",
        "--max-restarts",
        "--shm-size",
    }  # and docker's
    assert found - known - of_launchers == set()
    assert len(found) > 10, "the page names more: the pattern is wrong"
