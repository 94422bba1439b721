"""What a run reports while it trains: metrics.csv, TensorBoard events, and a progress bar or lines."""

import csv
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from fastflow import checkpoint
from fastflow.checkpoint import CheckpointError
from fastflow.trainer.data.table import bounded

_ROLLBACKS = ",back_to_step"
_WIDEST = 256  # bytes of a row, at most
_NARROW = 72  # columns, below which a line with a bar and the speed may be cut


class Metrics:
    """metrics.csv, one row per step. Rows after ``step`` are cut: the resumed run writes them again.

    Without the file, the rows of a resumed run start after ``step``.

    ``evaluated``: the set of the evaluations, test or validation; ``unit``: the unit of losses in their names.
    ``rollbacks``: a last column, back_to_step, for the steps to which rollbacks went back; a file that has it
    keeps it.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        evaluated: str = "test",
        unit: str = "bits_per_dim",
        rollbacks: bool = False,
    ) -> None:
        self.path = path
        kept = [f"step,epoch,lr,train_{unit},grad_norm,{evaluated}_{unit}"]
        read = [""]
        if step and path.exists():
            with open(path, "rb") as file:
                read = file.read(_WIDEST * (step + 2)).decode(errors="replace").split("\n")
        self.rollbacks = rollbacks or read[0].endswith(_ROLLBACKS)
        # the last element is empty, or a row whose end was not written; without rows they start after ``step``
        lines = read[1:-1]
        first = lines[0].split(",")[0] if lines else str(step + 1)
        reached = int(first) - 1 if first.isdecimal() else 0
        for line in lines:
            if line.split(",")[0] != str(reached + 1) or reached == step:
                break
            kept.append(line)
            reached += 1
        if reached != step:
            got = f"{len(kept) - 1} rows in order"
            raise CheckpointError(f"{path}: got {got}, expected {step}, the step of the checkpoint")
        kept[0] += _ROLLBACKS * self.rollbacks
        with checkpoint.replacing(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self._file = open(path, "ab", buffering=0)  # unbuffered: each row is one write

    def write(
        self,
        step: int,
        epoch: int,
        lr: float,
        loss: float,
        grad_norm: float,
        eval_loss: float | None,
        restored: int | None = None,
    ) -> None:
        """Append a row; ``restored``: the step to which a rollback went back.

        Raises OSError, naming the file, if the disk refuses it.
        """
        evaluated = "" if eval_loss is None else f"{eval_loss:.12g}"
        row = f"{step},{epoch},{lr:.6g},{loss:.12g},{grad_norm:.12g},{evaluated}"
        if self.rollbacks:
            row += "," if restored is None else f",{restored}"
        with checkpoint.naming(self.path):
            self._file.write(f"{row}\n".encode())

    def sync(self) -> None:
        """Flush the rows to the disk."""
        os.fsync(self._file.fileno())


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.csv as dicts of numbers; evaluations and rollbacks are None for steps without them."""
    integers = {"step", "epoch", "back_to_step"}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(bounded(file)))
    return [{k: (int if k in integers else float)(v) if v else None for k, v in row.items()} for row in rows]


class Progress:
    """A progress bar on a terminal, otherwise a line every ten seconds, with running means.

    On a narrow terminal, the line has no bar and no speed.
    """

    def __init__(
        self, target_steps: int, step: int, batch_size: int, unit: str = "bits/dim", noun: str = "images"
    ) -> None:
        self.loss: float | None = None
        self.samples_per_second: float | None = None
        self._unit, self._noun = unit, noun
        self._target_steps, self._step, self._batch_size = target_steps, step, batch_size
        self._printed = self._last = time.monotonic()
        self._bar, self._narrow = None, False
        if sys.stderr.isatty():
            from tqdm import tqdm

            size = shutil.get_terminal_size()  # 80 by 24 if unknown, for which tqdm would show nothing
            self._narrow = size.columns < _NARROW
            bar_format = "step {n_fmt}/{total_fmt} |{bar}| {desc}, {remaining} left"
            if self._narrow:
                bar_format = "{n_fmt}/{total_fmt}: {desc}, {remaining} left"
            shape = {"ncols": size.columns, "nrows": size.lines, "bar_format": bar_format}
            self._bar = tqdm(total=target_steps, initial=step, desc="starting", **shape)

    def update(self, loss: float | None, target_steps: int) -> None:
        """Count a step with its loss, None after a collapse; ``target_steps``: steps planned now."""
        now = time.monotonic()
        speed = self._batch_size / max(now - self._last, 1e-9)
        self._last = now
        self._step += 1
        if target_steps != self._target_steps:
            self._target_steps = target_steps
            if self._bar is not None:
                self._bar.total = target_steps
        if loss is not None:
            self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        kept = self.samples_per_second
        self.samples_per_second = speed if kept is None else 0.95 * kept + 0.05 * speed
        mean = math.nan if self.loss is None else self.loss
        text = f"{mean:.3f} {self._unit}"
        if not self._narrow:
            text += f", {self.samples_per_second:.0f} {self._noun}/s"
        if self._bar is not None:
            self._bar.desc = text
            self._bar.update()
        elif now - self._printed > 10:
            self._printed = now
            left = (self._target_steps - self._step) * self._batch_size / self.samples_per_second
            print(f"step {self._step}/{self._target_steps}: {text}, {left:.0f} s left", flush=True)

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)
        self._last = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
