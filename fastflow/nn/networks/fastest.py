"""The fastest way to compute Glow's network, for ``network="auto"``: on GPUs from a table of measurements.

``benchmarks/gpu_pass.sh`` measures the ways and writes the rows. A row has the GPU's name, the dtype, the
channels of input, hidden activations and output, the number of pixels of the batch, N H W, the mode, and the
fastest way. A batch takes the row with the most pixels that it has at least.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from fastflow.ops import dispatch, extension

TABLE = Path(__file__).with_name("glow_network.json")
WAYS = ("plain", "plain, channels_last", "fused", "im2col")
MODES = ("evaluation", "training")


class Setting(NamedTuple):
    """What a row is looked up by, other than the number of pixels; the fields are columns of the table."""

    gpu: str
    dtype: str
    in_channels: int
    hidden: int
    out_channels: int
    mode: str


COLUMNS = (*Setting._fields, "pixels", "fastest")


def is_fused_on_cpu(dtype: torch.dtype) -> bool:
    """Whether a CPU computes the network faster as one op: in C++ with AVX2 or AVX-512."""
    return dtype in (torch.float32, torch.float64) and dispatch.runs_compiled_ops() and _has_wide_vectors()


@functools.cache
def _has_wide_vectors() -> bool:
    here = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return here and "avx2" in extension.build["cpu_targets"]


def fastest_way(setting: Setting, pixels: int) -> str | None:
    """The fastest way in a setting, one of ``WAYS``; None if it was not measured for so few pixels."""
    measured = read_table(TABLE).get(setting, {})
    reached = [p for p in measured if p <= pixels]
    return measured[max(reached)] if reached else None


@functools.cache
def gpu_name(device: torch.device) -> str | None:
    """Name of a CUDA device; None for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def read_table(path: Path) -> dict[Setting, dict[int, str]]:
    """The fastest way by setting and number of pixels.

    Raises ValueError, which names the file and the row, for a file that is no such table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got no JSON ({error}), expected a table of measured networks") from error
    if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
        raise ValueError(f'{path}: got {str(table)[:40]}, expected an object with a list "rows"')
    ways: dict[Setting, dict[int, str]] = {}
    for i, row in enumerate(table["rows"]):
        _check_row(row, f"{path}: rows[{i}]")
        of_setting = ways.setdefault(Setting(*(row[name] for name in Setting._fields)), {})
        if row["pixels"] in of_setting:
            raise ValueError(f"{path}: rows[{i}]: got a second row of the same setting, expected one")
        of_setting[row["pixels"]] = row["fastest"]
    return ways


def _check_row(row: object, where: str) -> None:
    if not isinstance(row, dict) or set(row) != set(COLUMNS):
        raise ValueError(f"{where}: got {row}, expected the columns {', '.join(COLUMNS)}")
    for name in ("in_channels", "hidden", "out_channels", "pixels"):
        if type(row[name]) is not int or row[name] < 1:
            raise ValueError(f"{where}: {name}: got {row[name]!r}, expected a positive integer")
    for name in ("gpu", "dtype"):
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name}: got {row[name]!r}, expected a name")
    for name, values in (("mode", MODES), ("fastest", WAYS)):
        if row[name] not in values:
            raise ValueError(f"{where}: {name}: got {row[name]!r}, expected one of {', '.join(values)}")
