"""The profile of a training step: its time and its bytes by operator."""

import pytest

from benchmarks.tools import step_profile
from tests.support.rows import DEVICES, rows_of


@pytest.mark.parametrize("device", DEVICES)
def test_profile_tells_where_a_step_s_time_goes_and_its_bytes(device, tmp_path, capsys):
    timed, moved = step_profile.main(
        ["--quick", "--device", device, "--results", str(tmp_path), "--trace", str(tmp_path / "trace.json")]
    )
    assert (tmp_path / "trace.json").stat().st_size > 1000
    kept = rows_of(tmp_path / "step_profile.csv")
    assert {row["by"] for row in kept} == {"time", "bytes"} and all(
        bool(row["us"]) == (row["by"] == "time") for row in kept
    )
    for rows in (timed, moved):
        shares = [row["share"] for row in rows]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    names = " ".join(row["name"] for row in timed)
    assert "conv" in names if device == "cpu" else "coupling" in names
    found = {row["name"]: row for row in moved}
    assert found.keys() >= {
        "aten::convolution_backward",
        "fastflow::affine_coupling_inverse_backward",
        "aten::_fused_adam",
    }
    assert all(row["calls"] > 0 and row["mib"] > 0 for row in moved)
    # the profiler has seen the same calls
    assert found["aten::convolution"]["gb_s"] > 0 and found["fastflow::affine_coupling"]["gb_s"] > 0
    said = capsys.readouterr().out
    assert "MiB per step in total" in said and "| us | share |" in said and "| MiB | share | GB/s |" in said
