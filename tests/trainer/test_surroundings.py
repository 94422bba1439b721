"""What the command line makes of its surroundings: terminals, files, locales, read-only folders, Ctrl-C while it starts."""

import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

SETTINGS = "--levels 1 --steps-per-level 1 --hidden 4 --batch-size 4 --image-size 8 --final-samples 1 --samples 1 --workers 0"
SETTINGS = f"{SETTINGS} --reversible no".split()
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images, and a run of two steps on them."""
    folder = tmp_path_factory.mktemp("surroundings")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
    return folder


def training(folder, steps=2):
    return ["train", "--data", str(folder / "images"), *SETTINGS, "--steps", str(steps), "--out"]


def on_a_terminal(commands, columns, *argv, log=None, out=None, **environment):
    """The exit code of a command, and what it wrote to a terminal; ``log`` and ``out`` are other outputs, as in Commands."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    os.set_blocking(ours, False)
    terminal, written, code = os.ttyname(theirs), b"", None
    environment = {"COLUMNS": "", "TERM": "xterm", "NO_COLOR": ""} | environment
    command = commands.start(log or terminal, *argv, out=out or terminal, **environment)
    for _ in range(1000):
        code = commands.wait(command.pid, 0.02)
        try:
            while read := os.read(ours, 65536):
                written += read
        except BlockingIOError:
            if code is not None:
                break
    os.close(ours)
    os.close(theirs)
    return code, written.decode()


def lines_of(text):
    """What a terminal shows in one line, also if it is overwritten."""
    return re.split(r"[\r\n]+", text)


def test_no_color(commands):
    code, colored = on_a_terminal(commands, 80, "train", "--bogus")
    assert code == 2 and "--bogus" in colored and ESCAPE in colored
    code, plain = on_a_terminal(commands, 40, "--help", NO_COLOR="1")
    assert code == 0 and "interpolate" in plain and ESCAPE not in plain
    boxes = [line for line in lines_of(plain) if line[:1] in (" ", "╭", "│", "╰")]  # not the line of usage
    assert len(boxes) > 4 and max(map(len, boxes)) <= 40


def test_errors_in_a_file_have_no_colors(commands, tmp_path):
    code, _ = on_a_terminal(commands, 80, "train", "--bogus", log=tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert code == 2 and "--bogus" in text and ESCAPE not in text


def test_the_bar_on_terminals_wide_and_narrow_and_in_no_file(commands, folder, tmp_path):
    in_files = commands.start(tmp_path / "log", *training(folder, 60), str(tmp_path / "files"))
    wide = [*training(folder, 60), str(tmp_path / "wide")]
    code, text = on_a_terminal(commands, 100, *wide, out=tmp_path / "out")
    shown = [line for line in lines_of(text) if " left" in line]
    assert code == 0 and ESCAPE not in text and max(map(len, shown)) <= 100
    bar = r"step \d+/60 \|[^|]+\| \d+\.\d{3} bits/dim, \d+ images/s, \d\d:\d\d left"
    assert any(re.fullmatch(bar, line) for line in shown)
    code, text = on_a_terminal(commands, 40, *training(folder, 60), str(tmp_path / "narrow"))
    shown = [line for line in lines_of(text) if " left" in line]
    assert code == 0 and ESCAPE not in text and max(map(len, shown)) <= 40
    assert any(re.fullmatch(r"\d+/60: \d+\.\d{3} bits/dim, \d\d:\d\d left", line) for line in shown)
    assert in_files.wait() == 0
    for text in (in_files.said(), (tmp_path / "out").read_text()):
        assert "test images" in text and "|" not in text and "\r" not in text and ESCAPE not in text


def test_the_c_locale():
    """A process of its own: Python chooses the encoding of its outputs when it starts."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    argv = [sys.executable, "-m", "fastflow", "evaluate", "no snow ☃.pt"]
    done = subprocess.run(argv, env=environment, capture_output=True)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(rb"error: no snow [\\a-z0-9]+\.pt: no such file\n", done.stderr), done.stderr


def test_read_only_folders(commands, folder, tmp_path):
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    assert commands.start(tmp_path / "log", *training(folder), str(run)).wait() == 0
    shutil.copytree(run, tmp_path / "parent" / "run")
    for each in (empty, run, tmp_path / "parent"):
        each.chmod(0o555)
    refused = {
        f"{tmp_path}/parent/new": [*training(folder), str(tmp_path / "parent/new")],
        f"{empty}/metrics.csv.tmp": [*training(folder), str(empty)],
        f"{run}/metrics.csv.tmp": ["train", "--resume", str(run), "--steps", "4"],
        "runs": training(folder)[:-1],
        f"{run}/samples.png.tmp": ["sample", str(run), "--out", str(run)],
    }
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    started = [
        commands.start(tmp_path / f"{i}.log", *argv, cwd=tmp_path / "parent", overrides=False)
        for i, argv in enumerate(refused.values())
    ]
    for command, path in zip(started, refused, strict=True):
        assert command.wait() == 1, command.said()
        assert command.said().splitlines()[-1] == f"error: {path}: Permission denied"
        assert "Traceback" not in command.said()
    assert before == {path.name: path.read_bytes() for path in run.iterdir()} and not list(empty.iterdir())
    command = commands.start(tmp_path / "evaluated", "evaluate", str(run), "--samples", "1", overrides=False)
    assert command.wait() == 0, command.said()


TORCH = """
import time
try:
    print("importing", flush=True)
    time.sleep(20)
except BaseException:  # code of an extension that asks for no interrupt
    pass
raise ImportError("torch is imported without an end")
"""


@pytest.mark.parametrize(
    "argv, code, said",
    [
        (["-m", "fastflow", "train"], 130, "error: interrupted\n"),
        (["-u", "-mfastflow"], 130, "error: interrupted\n"),
        (["{}/fastflow", "train"], 130, "error: interrupted\n"),
        (["-c", "import fastflow"], 1, "ImportError: torch is imported without an end\n"),
    ],
)
def test_interrupted_while_torch_is_imported(argv, code, said, tmp_path):
    """Ctrl-C ends the command, however torch takes it; other programs get Python's KeyboardInterrupt."""
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "fastflow").write_text("from fastflow.trainer.cli import main\nmain()\n")
    argv = [sys.executable, *(part.format(tmp_path) for part in argv)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, env=environment, preexec_fn=heeds_ctrl_c, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=10)
    assert process.returncode == code and text.endswith(said), text
    assert code == 1 or text == said


def heeds_ctrl_c():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for a job in the background
