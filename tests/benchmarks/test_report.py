"""The report in docs/benchmarks.md, docs/dingo.md and README.md: every measured number comes from a row."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.models import photos
from benchmarks.tools import harness, report
from tests.support.rows import rows_of


@pytest.fixture
def reported(tmp_path):
    """Makes the report of the rows in ``tmp_path``, or those given, and hands out its page and README."""
    (tmp_path / "docs").mkdir()
    page, readme, _ = (
        Path(shutil.copy(harness.ROOT / name, tmp_path / name))
        for name in ("docs/benchmarks.md", "README.md", "docs/dingo.md")
    )

    def run(results: Path = tmp_path) -> tuple[str, str]:
        report.main(["--results", str(results), "--docs", str(page.parent), "--readme", str(readme)])
        return page.read_text(), readme.read_text()

    return run


def test_the_report_shows_the_newest_row_of_each_case_wins_and_losses_alike(tmp_path, reported):
    row = {
        "name": "doubling",
        "case": "a",
        "shape": "5x3",
        "dtype": "float32",
        "layout": "contiguous",
        "mode": "forward",
        "gb_s": "",
    }
    about = {
        "device": "A GPU",
        "torch": "2.11",
        "triton": "",
        "fastflow": "0",
        "commit": "abc",
        "date": "2026-01-01",
        "copy_gb_s": "3000",
    }
    times = [("eager", 10.0, 1.0), ("compile", 8.0, 0.8), ("fastflow", 99.0, 9.9), ("fastflow", 5.0, 0.5)]
    rows = [row | {"provider": p, "p50_us": f"{us:.2f}", "ratio": f"{r:.3f}"} | about for p, us, r in times]
    rows[-1] |= {"gb_s": "1500", "launches": "1"}
    rows[0]["launches"] = "7"
    rows += [
        other | {"case": "b", "ratio": "1.250" if other["provider"] == "fastflow" else "1.000"}
        for other in rows[::2]
    ]
    harness.append(tmp_path / "doubling.csv", rows)
    text, readme = reported()
    assert "A GPU" not in readme  # which has whole models and memory alone
    assert "## A GPU" in text and "AMD" not in text.split("<!-- sections")[1].split("<!-- end")[0]
    assert (
        "| doubling | forward | 2 | 0.88 (0.50 to 1.25) | 1 of 2 | 0.80 (0.80 to 0.80) | 1 / 7 | 50% |"
        in text
    )
    assert "9.9" not in text and re.search(
        r"\| doubling \| forward \| b 5x3 float32 contiguous \| 99.00 \| 10.00 \| 1.250 \|", text
    )
    assert (tmp_path / "docs" / "pictures" / "benchmarks_a_gpu.png").stat().st_size > 5000


def ops_table_of(text: str) -> list[str]:
    head, _, *lines = re.search(r"^\| op \|.*\n(?:\|.*\n)*", text, re.M)[0].splitlines()
    return [head, *lines]


def test_shares_of_a_copy_of_the_same_size_and_captured_ratios(tmp_path, reported):
    about = {"device": "A GPU", "torch": "2.11", "commit": "abc", "date": "2026-01-01", "copy_gb_s": "3000"}
    case = {"shape": "5x3", "dtype": "float32", "layout": "contiguous", "mode": "forward", "gb_s": "300"}
    case |= {"case": "a", "p50_us": "8.00", "ratio": "1.000"}
    older = [case | about | {"provider": provider} for provider in ("eager", "fastflow")]
    harness.append(tmp_path / "doubling.csv", older)
    head, *_ = ops_table_of(reported()[0])
    assert "share of a copy of the same size" not in head and "captured" not in head
    copies = {"same_size_copy_us": "4.00", "same_size_copy_captured_us": "1.50"}
    captured = {("b", "eager"): "6.00", ("b", "fastflow"): "3.00"}
    captured |= {("c", "eager"): "", ("c", "fastflow"): "2.00"}
    newer = [
        row | copies | {"case": case, "captured_us": captured[case, row["provider"]]}
        for case in "bc"
        for row in older
    ]
    harness.append(tmp_path / "doubling.csv", newer)
    head, line = ops_table_of(reported()[0])
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["FastFlow, captured"] == "0.50 (0.50 to 0.50)"
    assert cells["best share of the copy"] == "10%"
    assert cells["share of a copy of the same size"] == "50% (50% to 50%)"
    assert cells["that share, captured"] == "62% (50% to 75%)"


def test_the_report_has_the_largest_batch_for_each_limit_and_the_times_of_the_ways():
    row = {
        "side": "32",
        "hidden": "64",
        "k": "32",
        "way": "reversible",
        "limit_mib": "256",
        "largest_batch": "99",
        "peak_mib": "250.25",
    }
    time = {
        "side": "32",
        "batch": "8",
        "hidden": "64",
        "k": "32",
        "way": "stored",
        "p50_s": "0.1000",
        "ratio": "1.000",
    }
    about = {"torch": "2.11", "commit": "abc", "date": "2026-01-01"}
    files = {
        "memory_batch": [row | about, row | about | {"limit_mib": "512", "largest_batch": "199"}],
        "memory_time": [time | about],
    }
    text = report.section("A CPU", files, {})
    assert (
        "### The largest batch that fits" in text
        and "| 32x32 | 64 | 32 | reversible | 512 | 199 | 250.25 |" in text
    )
    assert "| 32x32 | 8 | 64 | 32 | stored | 0.1000 | 1.000 |" in text and report.KEYS.keys() >= files.keys()


def test_the_report_in_the_docs_and_in_the_readme_is_that_of_the_rows(tmp_path, reported):
    committed = tuple((harness.ROOT / name).read_text() for name in ("docs/benchmarks.md", "README.md"))
    assert reported(harness.RESULTS) == committed, "python -m benchmarks.tools.report"
    found, committed = ((folder / "docs/dingo.md").read_text() for folder in (tmp_path, harness.ROOT))
    assert found == committed and found.count("| dingo-size NSF | glasflow |") == 2


def test_no_number_in_the_readme_but_from_rows():
    """Beside its code and what benchmarks wrote from rows."""
    text = (harness.ROOT / "README.md").read_text()
    (row,) = rows_of(harness.RESULTS / "photos.csv")[-1:]
    assert photos.text(row) in text
    by_hand = re.sub(r"```.*?```|<!-- (\w+): written by .*?<!-- end of \1 -->", "", text, flags=re.S)
    measured = (
        r"(?<!\w)\d[\d.,]* ?(?:%|x\b|times|[kKMG]i?B|[mun]?s\b|seconds|minutes|hours|images|bits|nats|FLOP)"
    )
    assert re.findall(measured, "0.29 MiB, 1.2 times, 3 minutes") and re.findall(measured, by_hand) == []


def test_the_report_shows_throughput_against_batch(tmp_path, reported):
    about = {
        "device": "A GPU",
        "torch": "2.11",
        "commit": "abc",
        "date": "2026-01-01",
        "over_plain": "1.000",
        "peak_mib": "nan",
    }
    older = {"size": "L=1 K=2 hidden 4 batch 16", "way": "plain", "images_s_p50": "300.0"} | about

    def reported_with(rows):
        harness.append(tmp_path / "training_speed.csv", rows)
        return reported()[0]

    picture = tmp_path / "docs" / "pictures" / "training_speed_a_gpu.png"
    text = reported_with([older])
    assert "| L=1 K=2 hidden 4 batch 16 | plain | 300 | 1.00 |\n" in text and not picture.exists()
    text = reported_with(
        [older | {"size": f"L=1 K=2 hidden 4 batch {n}", "share_of_matmul": "0.1234"} for n in (64, 4)]
    )
    shares = [("4", "12%"), ("16", ""), ("64", "12%")]
    assert re.findall(r"batch (\d+) \| plain \| 300 \| 1.00 \| (\S*) \|", text) == shares
    assert picture.stat().st_size > 5000 and f"(pictures/{picture.name})" in text
