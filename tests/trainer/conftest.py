"""The process from which tests of the command line fork their commands."""

import pytest

from tests.support.commands import Commands


@pytest.fixture(scope="session")
def commands():
    commands = Commands()
    yield commands
    commands.close()
