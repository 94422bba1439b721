"""The planted faults: each can still be planted, and its tests are there."""

import shlex
from pathlib import Path

import pytest

from tests.faults.faults import AREAS, FAULTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    assert "\n" not in fault.old + fault.new
    files = [word for word in shlex.split(fault.tests) if word.startswith("tests/")]
    assert files and all((ROOT / file).is_file() for file in files)


def test_every_area_has_faults():
    assert len(FAULTS) >= 60
    assert all(AREAS.values())
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
