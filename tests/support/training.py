"""``fastflow train`` in one process or in several ranks, as a user, torchrun or a scheduler starts and ends it."""

import os
import shutil
import signal
import socket
import time

import numpy as np

SETTINGS = (
    "--levels 1 --steps-per-level 1 --hidden 4 --batch-size 4 --image-size 8 --final-samples 1 --samples 1 "
    "--reversible no"
).split()
ENDLESS = "--steps 100000 --save-every 100000 --eval-every 100000 --sample-every 100000".split()
SOON = 2.0  # seconds, on an idle machine


def images(folder, count=40):
    """A new folder of images."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def damaged(folder, copy):
    """The images of ``folder``, one of which ends early."""
    shutil.copytree(folder, copy)
    (copy / "7.png").write_bytes((copy / "7.png").read_bytes()[:100])
    return copy


def environments(ranks):
    """What torchrun tells each of its processes; nothing of a single one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    shared["WORLD_SIZE"] = str(ranks)
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


class Train:
    """A run in ``place`` with the options ``more``, which take steps without an end by default."""

    def __init__(
        self, commands, place, data, workers=0, ranks=1, more=ENDLESS, out=None, stdout=None, **options
    ):
        place.mkdir(exist_ok=True)
        self.run = place / "run" if out is None else out
        self.argv = ["train", "--data", str(data), "--out", str(self.run), "--workers", str(workers)]
        self.argv += [*SETTINGS, *more]
        self.ranks = [
            commands.start(place / f"{i}.log", *self.argv, out=stdout, **options, **environment)
            for i, environment in enumerate(environments(ranks))
        ]
        self.first = self.ranks[0]

    def steps(self, count=3):
        """Wait until it has taken ``count`` steps."""
        self.first.wait_for(lambda: self.metrics().count(b"\n") > count)
        return self

    def metrics(self):
        path = self.run / "metrics.csv"
        return path.read_bytes() if path.exists() else b""

    def said(self):
        return [rank.said() for rank in self.ranks]

    def workers(self, rank):
        return [pid for pid in rank.processes() if pid != rank.pid]

    def signal(self, signum):
        """Send a signal to every process of every rank."""
        for rank in self.ranks:
            for pid in rank.processes():
                try:
                    os.kill(pid, signum)
                except ProcessLookupError:
                    pass

    def ends(self, codes, *lines):
        """Assert the exit codes, words in the last line of each rank, and that it ends soon, without a process left.

        ``codes``: a code for each rank, or one or several possible ones for all. Ranks without words need say nothing.
        """
        codes = codes if isinstance(codes, list) else [codes] * len(self.ranks)
        began, soon = time.monotonic(), SOON * max(1, os.getloadavg()[0] / os.cpu_count())
        found = [rank.wait(20) for rank in self.ranks]
        took = time.monotonic() - began
        left = [not rank.gone(max(0.1, soon - took)) for rank in self.ranks]
        said = self.said()
        assert all(a == b or (isinstance(b, tuple) and a in b) for a, b in zip(found, codes, strict=True)), (
            found,
            said,
        )
        assert took < soon and not any(left), (took, left, said)
        for text in said:
            assert "Traceback" not in text and "leaked" not in text and "frame #" not in text, text
            assert sum("error" in line for line in text.splitlines()) <= 1, text
        for words, text in zip(lines, said, strict=False):
            assert words in text.splitlines()[-1], text


LOST = "error: rank {}: another rank died or does not respond"
KILLED = -signal.SIGKILL
