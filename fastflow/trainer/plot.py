"""The command ``plot``: the losses of several runs in one picture."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastflow.trainer import picture
from fastflow.trainer.config import ConfigError, config_error
from fastflow.trainer.output import output
from fastflow.trainer.progress import read_metrics


@dataclass(frozen=True)
class Plot:
    """Draw the losses of run folders against the step, as a PNG."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    out: str | None = None
    """File to write. Default: runs.png."""


def plot(options: Plot) -> None:
    """Write the picture. Raises ConfigError for folders without losses, and for losses of several units."""
    out = output(options.out, "runs.png", picture.FORMATS)
    if not options.runs:
        raise config_error("runs", "none", "one or more run folders")
    columns = {Path(run): _losses(Path(run)) for run in options.runs}
    units = {run: column.removeprefix("train_") for run, (column, _) in columns.items()}
    if len(set(units.values())) > 1:
        found = ", ".join(f"{run} in {unit}" for run, unit in units.items())
        raise config_error("runs", found, "losses of one unit")
    names = _names(list(columns))
    unit = next(iter(units.values()))
    curves = {names[run]: rows for run, (_, rows) in columns.items()}
    picture.save_curves(out, curves, {"bits_per_dim": "bits/dim"}.get(unit, unit))
    print(f"{out}: {len(curves)} runs")


def _losses(run: Path) -> tuple[str, list[tuple[int, float, float | None]]]:
    """The column of the training loss, and (step, training loss, evaluation or None) of each step."""
    path = run / "metrics.csv"
    try:
        rows = [row for row in read_metrics(path) if row.get("back_to_step") is None]
    except FileNotFoundError:
        raise ConfigError(f"{run}: got no metrics.csv, expected a run folder") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConfigError(f"{path}: damaged, no table of numbers") from error
    if not rows:
        raise ConfigError(f"{path}: got no step, expected one or more")
    trained = next((name for name in rows[0] if name.startswith("train_")), None)
    if trained is None:
        raise ConfigError(f"{path}: got no column of training losses")
    evaluated = {f"{name}_{trained.removeprefix('train_')}" for name in ("test", "validation")} & rows[
        0
    ].keys()
    return trained, [
        (row["step"], row[trained], next((row[name] for name in evaluated), None)) for row in rows
    ]


def _names(runs: list[Path]) -> dict[Path, str]:
    """The last part of each path, or the paths where those are equal."""
    last = {run: run.resolve().name for run in runs}
    return last if len(set(last.values())) == len(runs) else {run: os.fspath(run) for run in runs}
