"""``fastflow train`` that cannot start: one line with the name of the file or option, and what a start says."""

import os
import shutil
import signal

import numpy as np
import pytest

from tests.support.training import LOST, SETTINGS, Train, images

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images(tmp_path_factory.mktemp("starts") / "images")


def large(data, place):
    Image.new("L", (14000, 14000)).save(data / "large.png")
    return {"said": f"{data}/large.png: got more than 178,956,970 pixels, the limit of Pillow"}


def header(data, place):
    (data / "a.ppm").write_bytes(b"P6\n8 eight\n255\n" + bytes(192))
    return {"said": f"{data}/a.ppm: cannot be read as an image"}


def value_of_header(data, place):
    (data / "a.pgm").write_bytes(b"P5\n8 8\n99999999999999999999\n" + bytes(64))
    return {"said": f"{data}/a.pgm: cannot be read as an image"}


def no_utf_8(data, place):
    with open(os.fsencode(data) + b"/\xff\xfe.png", "wb") as file:
        file.write(b"no image")
    return {"said": f"{data}/\\udcff\\udcfe.png: cannot be read as an image"}


def line_break(data, place):
    os.mkdir(place / "a\nb")
    return {"data": place / "a\nb", "said": f"{place}/a\\nb: got no image, expected files"}


def classes_of_one_image(data, place):
    for name in "ab":
        images(place / "classes" / name, 1)
    return {"data": place / "classes", "said": f"{place}/classes: got no test image of a trained class"}


def flat_test_set(data, place):
    for name in ("train/a", "train/b", "test"):
        images(place / "flat" / name, 3)
    return {"data": place / "flat", "said": f"{place}/flat/test: got no image of a, b, the trained classes"}


def empty_mnist(data, place):
    raw = place / "sets/MNIST/raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"")
    more = ["--data-dir", str(place / "sets"), "--image-size", "28", "--steps", "3"]
    return {
        "data": "mnist",
        "more": more,
        "said": f"{raw}/train-images-idx3-ubyte: cannot be read as a file of MNIST",
    }


def no_data(data, place):
    return {
        "data": place / "none",
        "said": f"data: got '{place}/none', expected photos, cifar10, mnist, a folder",
    }


def run_that_exists(data, place):
    (place / "there").mkdir()
    (place / "there/last.pt").write_bytes(b"")
    return {
        "out": place / "there",
        "said": f"out: {place}/there exists; --resume {place}/there continues that run",
    }


def folder_that_exists(data, place):
    return {
        "out": data,
        "said": f"out: got {data}, which exists and is no run, expected a new or an empty folder",
    }


def file_as_folder(data, place):
    return {"out": data / "0.png/run", "said": f"{data}/0.png/run: Not a directory"}


def full_disk(data, place):
    return {"file_size": 700, "said": "/run/last.pt: not written, last.pt is unchanged: File too large"}


def full_output(data, place):
    return {"stdout": "/dev/full", "said": "standard output: No space left on device"}


def closed_output(data, place):
    os.mkfifo(place / "pipe")
    return {"stdout": place / "pipe", "said": "standard output: Broken pipe"}


FAILURES = [
    large,
    header,
    no_utf_8,
    classes_of_one_image,
    flat_test_set,
    empty_mnist,
    run_that_exists,
    full_disk,
    full_output,
    closed_output,
]
OTHERS = [value_of_header, line_break, no_data, folder_that_exists, file_as_folder]
CASES = [(each, ranks) for ranks in (1, 2) for each in FAILURES] + [(each, 1) for each in OTHERS]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{f.__name__}-{ranks}" for f, ranks in CASES])
def test_one_line(number, commands, folder, tmp_path):
    failure, ranks = CASES[number]
    shutil.copytree(folder, tmp_path / "data")
    options = {"data": tmp_path / "data"} | failure(tmp_path / "data", tmp_path)
    expected, reader = options.pop("said"), None
    if failure is closed_output:
        reader = os.open(options["stdout"], os.O_RDONLY | os.O_NONBLOCK)
    workers = (0, 1, 4)[number % 3]  # most ends come before they start
    run = Train(commands, tmp_path / "place", workers=workers, ranks=ranks, **options)
    if reader is not None:
        run.first.wait_for(lambda: all(rank.log.exists() for rank in run.ranks))  # they have opened the pipe
        os.close(reader)
    run.first.wait_for(lambda: any("error" in text for text in run.said()))
    run.ends(1)
    last = [text.splitlines()[-1] for text in run.said()]
    ours = [i for i, line in enumerate(last) if expected in line]
    assert len(ours) == 1, last  # the rank that meets a damaged file, or the first one
    for i, line in enumerate(last):
        assert line.startswith("error: " if ranks == 1 else f"error: rank {i}: "), line
        assert i in ours or line.startswith(LOST.format(i)), line


def test_a_rank_without_a_port(commands, folder, tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    run = Train(commands, tmp_path, folder, **alone)
    run.ends(1, "error: rank 0: MASTER_PORT: got none with RANK, expected a port, as torchrun sets it")


def test_a_first_rank_that_is_not_there(commands, folder, tmp_path):
    missing = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run = Train(commands, tmp_path, folder, more=["--timeout", "0.2"], **missing)
    run.ends(
        1,
        "error: rank 1: the first rank died or does not respond (Connection refused at 127.0.0.1:1 for 0.2 s)",
    )


def test_what_was_found_is_said(commands, folder, tmp_path):
    pytest.importorskip("sklearn")
    run = Train(commands, tmp_path / "found", folder).steps(1)
    os.kill(run.first.pid, signal.SIGKILL)
    assert "images: 37 to train on, 3 to test on; no classes\n" in run.first.said()
    (tmp_path / "photos").mkdir()
    argv = ["train", "--data", "photos", *SETTINGS, "--image-size", "32"]
    command = commands.start(tmp_path / "log", *argv, cwd=tmp_path)
    command.wait_for(
        lambda: "data: photos is built in; the folder of this name is ./photos\n" in command.said()
    )
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL


def test_names_that_are_no_utf_8(commands, folder, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    shutil.copytree(folder, f"{name}-data/a")
    shutil.copytree(folder, os.fsdecode(os.fsencode(f"{name}-data") + b"/\xfe"))
    run = Train(commands, tmp_path, f"{name}-data", 1, more=["--steps", "2"], out=tmp_path / f"{name}-run")
    assert run.first.wait() == 0, run.said()
    assert "; 2 classes (a, \\udcfe)\n" in run.first.said()
    resumed = commands.start(tmp_path / "log", "train", "--resume", f"{name}-run", "--steps", "3")
    assert resumed.wait() == 0, resumed.said()
    assert run.metrics().count(b"\n") == 4
    assert np.array(Image.open(f"{name}-run/samples.png")).size
