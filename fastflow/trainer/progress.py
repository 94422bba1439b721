"""What a run tells while it goes on: metrics.csv, and a progress bar or lines."""

import os
import shutil
import sys
import time
from pathlib import Path

from fastflow import checkpoint
from fastflow.checkpoint import CheckpointError

_COLUMNS = "step,epoch,lr,train_bits_per_dim,grad_norm,test_bits_per_dim"


class Metrics:
    """metrics.csv, a row a step.  Opened at ``step``, rows after it are cut: the resumed run writes them again."""

    def __init__(self, path, step):
        self.path = path
        kept = [_COLUMNS]
        if step and path.exists():
            for line in (
                path.read_bytes().decode(errors="replace").split("\n")[1:-1]
            ):  # a row without its end is cut
                if line.split(",")[0] != str(len(kept)) or len(kept) > step:
                    break
                kept.append(line)
        if len(kept) <= step:
            raise CheckpointError(
                f"{path}: has {len(kept) - 1} rows in order, the checkpoint is at step {step}"
            )
        with checkpoint.replacing(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self._file = open(path, "ab", buffering=0)  # a row is one write, so that none is seen half

    def write(self, step, epoch, lr, bits, grad_norm, test_bits):
        test = "" if test_bits is None else f"{test_bits:.12g}"
        try:
            self._file.write(f"{step},{epoch},{lr:.6g},{bits:.12g},{grad_norm:.12g},{test}\n".encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def sync(self):
        os.fsync(self._file.fileno())


def read_metrics(path):
    """The rows of a metrics.csv as dicts; test_bits_per_dim is None where a step was not evaluated."""
    lines = Path(path).read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    whole = {"step", "epoch"}
    return [{k: (int if k in whole else float)(v) if v else None for k, v in row.items()} for row in rows]


class Progress:
    """A progress bar on a terminal, elsewhere a line every ten seconds; keeps running means of bits/dim and speed."""

    def __init__(self, total, step, batch_size):
        self.bits, self.images_per_second = None, None
        self._total, self._step, self._batch_size = total, step, batch_size
        self._printed = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            size = (
                shutil.get_terminal_size()
            )  # 80 by 24 where the terminal does not say: tqdm would show nothing
            bar_format = "step {n_fmt}/{total_fmt} |{bar}| {desc}, {remaining} left"
            shape = {"ncols": size.columns, "nrows": size.lines, "bar_format": bar_format}
            self._bar = tqdm(total=total, initial=step, desc="starting", **shape)

    def update(self, bits, total):
        now = time.monotonic()
        speed = self._batch_size / max(now - self._last, 1e-9)
        self._last = now
        self._step += 1
        if total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.total = total
        self.bits = bits if self.bits is None else 0.95 * self.bits + 0.05 * bits
        kept = self.images_per_second
        self.images_per_second = speed if kept is None else 0.95 * kept + 0.05 * speed
        text = f"{self.bits:.3f} bits/dim, {self.images_per_second:.0f} images/s"
        if self._bar is not None:
            self._bar.desc = text
            self._bar.update()
        elif now - self._printed > 10:
            self._printed = now
            left = (self._total - self._step) * self._batch_size / self.images_per_second
            print(f"step {self._step}/{self._total}: {text}, {left:.0f} s left", flush=True)

    def say(self, line):
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)
        self._last = time.monotonic()

    def close(self):
        if self._bar is not None:
            self._bar.close()
