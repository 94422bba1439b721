"""Runs that go on: what a second command finds in the folder, and data that changed in between."""

import fcntl
import os
import re
import shutil
import signal

import numpy as np
import pytest

from fastflow import checkpoint
from fastflow.trainer.cli import main
from fastflow.trainer.data.identity import _ends, _some
from fastflow.trainer.progress import read_metrics

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

SMALL = (
    "--levels 1 --steps-per-level 1 --hidden 4 --batch-size 4 --image-size 4 --workers 0 --samples 1".split()
)
SMALL += "--final-samples 1 --reversible no".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of images, and the run of two steps on them."""
    place = tmp_path_factory.mktemp("place")
    (place / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(place / "data" / f"{i}.png")
    assert (
        main(["train", "--data", str(place / "data"), "--out", str(place / "run"), *SMALL, "--steps", "2"])
        == 0
    )
    return place


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy in which ``run`` has ``data`` as its data, by their relative name."""
    shutil.copytree(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    contents = checkpoint.read("run/last.pt")
    contents["training"]["config"]["data"] = "data"
    contents["training"]["data_identity"]["path"] = str(tmp_path / "place/data")
    for original in (finished / "data").iterdir():
        times = original.stat().st_mtime_ns
        os.utime(tmp_path / "place/data" / original.name, ns=(times, times))
    checkpoint.save("run/last.pt", checkpoint.build(contents, "run/last.pt"), contents["training"])
    return tmp_path / "place"


def failed(capsys, *argv):
    assert main(["train", *argv]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_changed_files_are_noticed_and_can_be_taken(place, capsys):
    os.utime("data/3.png", (1, 1))
    expected = "error: data: got data, of which times of files changed, expected those of the run run, or --data-changed"
    assert failed(capsys, "--resume", "run", "--steps", "3") == expected
    shutil.copy("data/4.png", "data/a.png")
    os.remove("data/4.png")
    line = failed(capsys, "--resume", "run", "--steps", "3")
    assert "of which names or sizes of files changed" in line or "got data of sizes" in line  # by the hash
    assert main(["train", "--resume", "run", "--steps", "3", "--data-changed"]) == 0
    assert "data: as they are now, and not as when the run started" in capsys.readouterr().out
    assert main(["train", "--resume", "run", "--steps", "4"]) == 0  # written down
    os.remove("data/a.png")
    line = failed(capsys, "--resume", "run", "--steps", "5")
    assert "data: got data of sizes" in line and line.endswith("as in the run run, or --data-changed")
    assert main(["train", "--resume", "run", "--steps", "5", "--data-changed"]) == 0
    for file in os.listdir("data"):
        Image.open(f"data/{file}").convert("L").save(f"data/{file}")
    line = failed(capsys, "--resume", "run", "--steps", "6", "--data-changed")
    assert "data: got shape and classes [1, 4, 4, None], expected [3, 4, 4, None] as in the run run" in line


def test_the_data_may_be_at_another_place(place):
    shutil.copytree("data", "elsewhere", copy_function=shutil.copyfile)  # with other times
    shutil.rmtree("data")
    assert main(["train", "--resume", "run", "--steps", "3", "--data", "elsewhere"]) == 0
    assert main(["train", "--resume", "run", "--steps", "4"]) == 0
    assert checkpoint.read("run/last.pt")["training"]["config"]["data"] == "elsewhere"


def replace_one(folder):
    """Put another image in the place of one, with its size and times."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_size)
    (shorter, *_, longer), status = files, files[-1].stat()
    image = shorter.read_bytes().ljust(status.st_size, b"\0")  # PNG ends before the zeros
    assert image != longer.read_bytes()
    longer.write_bytes(image)
    os.utime(longer, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_of_the_same_name_size_and_time_is_noticed(place, capsys):
    line = "error: data: got {}, of which contents of files changed, expected those of the run run, or --data-changed"
    shutil.copytree("data", "elsewhere")
    replace_one(place / "elsewhere")
    argv = ["--resume", "run", "--steps", "3"]
    assert failed(capsys, *argv, "--data", "elsewhere") == line.format("elsewhere")
    replace_one(place / "data")
    assert failed(capsys, *argv) == line.format("data")
    saved = checkpoint.read("run/last.pt")
    del saved["training"]["data_identity"]["contents"]  # of an older run
    checkpoint.save("run/last.pt", checkpoint.build(saved, "run/last.pt"), saved["training"])
    assert main(["train", *argv]) == 0


def test_all_contents_are_compared_on_request(place, capsys):
    (place / "data/9.png").write_bytes(
        (place / "data/9.png").read_bytes() + bytes(20_000)
    )  # PNG ends before them
    command = ["train", "--out", "new", "--data", "data", *SMALL, "--steps", "1", "--check-contents"]
    assert main(command) == 0
    argv = ["--resume", "new", "--steps", "2"]
    for file in os.listdir("data"):
        os.utime(f"data/{file}", (1, 1))
    assert main(["train", *argv]) == 0  # the contents are the same
    with open("data/9.png", "r+b") as file:
        file.seek(10_000)  # neither in the first nor in the last 4 KiB
        file.write(b"1")
    os.utime("data/9.png", (1, 1))
    argv[-1] = "3"
    expected = (
        "got data, of which contents of files changed, expected those of the run new, or --data-changed"
    )
    assert failed(capsys, *argv) == f"error: data: {expected}"
    assert main(["train", *argv, "--no-check-contents"]) == 0  # what is compared by default did not change


def test_the_contents_of_many_and_of_unreadable_files(tmp_path):
    for i in range(130):
        (tmp_path / f"{i:03}").write_bytes(bytes(9000))
    files = sorted(tmp_path.iterdir())
    some = _some(files)
    assert len(set(some)) == 64 and some[0] == files[0] and files[-3] <= some[-1] and len(some) < len(files)
    assert _some(files[:3]) == files[:3]
    first = _ends(files[0])
    files[0].write_bytes(bytes(8999) + b"1")
    assert _ends(files[0]) == (first[0], first[1][1:] + b"1")
    assert _ends(tmp_path / "absent") == (b"", b"")


def test_one_process_at_a_time(place, capsys):
    (place / "new").mkdir()
    for folder, argv in (
        ("run", ["--resume", "run", "--steps", "3"]),
        ("new", ["--out", "new", "--data", "data", *SMALL]),
    ):
        other = os.open(f"{folder}/.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert (
            failed(capsys, *argv) == f"error: {folder}: got a run that another process trains, expected none"
        )
        os.close(other)
    assert os.listdir("new") == [".lock"]
    assert main(["train", "--resume", "run", "--steps", "3"]) == 0
    assert main(["train", "--resume", "run", "--steps", "4"]) == 0  # the lock ends with the run


def test_two_commands_at_once(commands, place, tmp_path):
    """One of them trains, the other one ends with one line, and the run can go on."""
    argv = ["--data", "data", *SMALL, "--workers", "1", "--save-every", "1", "--sample-every", "100000"]
    for name, options in (("out", ["--out", "both", *argv]), ("resume", ["--resume", "both"])):
        options = ["train", *options, "--steps", "100000"]
        both = [commands.start(tmp_path / f"{name}{i}", *options) for i in range(2)]
        both[0].wait_for(lambda both=both: any("error" in command.said() for command in both))
        (late,) = (command for command in both if "error" in command.said())
        (first,) = (command for command in both if command is not late)
        assert late.wait() == 1
        assert re.fullmatch(
            "error: (both: got a run that another process trains, expected none|out: both exists; --resume both .*)",
            late.said().splitlines()[-1],
        )
        steps = len(read_metrics("both/metrics.csv"))
        first.wait_for(lambda steps=steps: len(read_metrics("both/metrics.csv")) > steps + 2)
        os.kill(first.pid, signal.SIGTERM)
        assert first.wait() == 128 + signal.SIGTERM
        rows = read_metrics("both/metrics.csv")
        assert [row["step"] for row in rows] == [*range(1, len(rows) + 1)]


def test_killed_before_the_first_checkpoint(commands, place, tmp_path):
    argv = ["train", "--out", "early", "--data", "data", *SMALL, "--workers", "1", "--steps", "2"]
    command = commands.start(tmp_path / "log", *argv)
    command.wait_for(lambda: os.path.exists("early"))
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert main([*argv, "--resume-if-present"]) == 0  # the kill may have come late
    assert [row["step"] for row in read_metrics("early/metrics.csv")] == [1, 2]


def test_a_file_that_is_damaged_meanwhile_can_be_removed(place, capsys):
    intact = (place / "data/7.png").read_bytes()
    (place / "data/7.png").write_bytes(intact[:50])
    argv = ["train", "--resume", "run", "--steps", "12"]
    assert "of which names or sizes of files changed" in failed(capsys, *argv[1:])
    assert "data/7.png: cannot be read as an image" in failed(capsys, *argv[1:], "--data-changed")
    os.remove("data/7.png")
    assert main([*argv, "--data-changed"]) == 0


def test_a_run_without_a_checkpoint_starts_over(place, capsys):
    (place / "new").mkdir()
    for name in ("metrics.csv", "last.pt.tmp", "events.out.tfevents.1.host.2.3"):
        (place / "new" / name).write_text("of a run that was killed")
    start = ["--out", "new", "--data", "data", *SMALL, "--steps", "1"]
    (place / "new/notes.txt").write_text("mine")
    line = failed(capsys, *start)
    assert line == "error: out: got new, which exists and is no run, expected a new or an empty folder"
    line = failed(capsys, "--resume", "new")
    assert line == (
        "error: new: got no checkpoint, expected last.pt; the command with --out starts a run without one again"
    )
    assert len(os.listdir("new")) == 4
    os.remove("new/notes.txt")
    assert main(["train", *start]) == 0
    assert len(read_metrics("new/metrics.csv")) == 1


def test_resume_if_present(place, capsys):
    command = ["train", "--out", "new run", "--data", "data", *SMALL, "--resume-if-present", "--steps"]
    assert main([*command, "1"]) == 0
    assert main([*command, "3"]) == 0
    assert [row["step"] for row in read_metrics("new run/metrics.csv")] == [1, 2, 3]
    assert "hidden: got 8, expected 4 as in the run" in failed(capsys, *command[1:], "4", "--hidden", "8")
    assert "resume_if_present: got True, expected a folder as out" in failed(capsys, "--resume-if-present")
    assert "--resume 'new run' continues that run" in failed(capsys, *command[1:-2], "--steps", "4")


def test_last_pt_is_enough(place, capsys):
    for name in os.listdir("run"):
        if name != "last.pt":
            os.remove(f"run/{name}")
    for steps in (3, 4):
        assert main(["train", "--resume", "run", "--steps", str(steps)]) == 0
    assert [row["step"] for row in read_metrics("run/metrics.csv")] == [3, 4]
    assert main(["evaluate", "run/best.pt", "--samples", "1"]) == 0  # on the run's data
    (place / "best").mkdir()
    shutil.copy("run/best.pt", "best/last.pt")
    assert "holds no training state" in failed(capsys, "--resume", "best")
