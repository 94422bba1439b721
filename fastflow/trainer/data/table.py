"""Rows of a table: .csv, .npy, .npz and .parquet files. Reading them executes nothing in them."""

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from fastflow.checkpoint import replacing
from fastflow.trainer.data.memory import InMemory
from fastflow.trainer.data.source import DataError, check_size

SUFFIXES = (".csv", ".npy", ".parquet")
_CHUNK = 2**19  # numbers of a CSV file that are converted together
_LONGEST = 2**22  # characters of a line of a CSV file
_FEWEST = 4  # rows that can be split: two to train on, one for validation, one to test on


Names = str | Sequence[str] | None  # names of columns, or one text with commas between them


class Columns(NamedTuple):
    """Names of the columns that are modeled, and of those that they are conditioned on."""

    x: tuple[str, ...]
    context: tuple[str, ...]


class Table(InMemory):
    """Rows of a table in memory: x ``[N, D]``, and optionally a context ``[N, C]``, floating point.

    Raises DataError for values that are not finite, and for columns that are constant in the training rows.
    """

    def __init__(
        self,
        name: str,
        columns: Columns,
        train: np.ndarray,
        test: np.ndarray,
        validation: np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.columns, self.context_features = columns, len(columns.context) or None
        self._dtype = dtype
        _refuse_constants(name, columns, train, dtype)
        parts = (train, test) if validation is None else (train, test, validation)
        super().__init__(name, *(self._tensors(part) for part in parts))
        self.notes = tuple(_notes(columns, parts))

    def _tensors(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """x and context of rows with all columns."""
        return rows_as_tensors(self.columns, rows, self._dtype)

    def training_rows(self) -> tuple[Tensor, Tensor | None]:
        """x and context of all training rows."""
        return self._train, self._labels


def rows_as_tensors(columns: Columns, rows: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x and context of rows that have all ``columns``, first those of x."""
    tensor = torch.from_numpy(rows).to(dtype)
    x, context = tensor.split([len(columns.x), len(columns.context)], dim=1)
    return x.contiguous(), context.contiguous() if columns.context else None


def load_table(
    path: Path,
    columns: Names = None,
    context: Names = None,
    dtype: torch.dtype = torch.float32,
    arrays: dict[str, np.ndarray] | None = None,
) -> Table:
    """Load a table and split it: without test rows of its own, every tenth row is a test row.

    ``columns``, ``context``: names of columns, or a text of them separated by commas; ``arrays``: those of a .npz file.
    """
    chosen, parts = read_table(path, columns, context, arrays)
    train, test = parts["x"], parts.get("x_test")
    if test is None:
        if len(train) < _FEWEST:
            raise DataError(f"{path}: got {_count(len(train), 'row')}, expected at least {_FEWEST}")
        held_out = np.arange(len(train)) % 10 == min(9, len(train) - 1)
        train, test = train[~held_out], train[held_out]
    return Table(path.stem, chosen, train, test, parts.get("x_val"), dtype)


def read_table(
    path: Path, columns: Names, context: Names, arrays: dict[str, np.ndarray] | None = None
) -> tuple[Columns, dict[str, np.ndarray]]:
    """The chosen columns, and float64 rows with these columns: ``x``, if there are any ``x_test``, ``x_val``."""
    if path.suffix.lower() == ".csv":
        names, read = _open_csv(path)
        parts, default = {"x": read}, ()
    elif path.suffix.lower() == ".parquet":
        names, read = _open_parquet(path)
        parts, default = {"x": read}, ()
    else:
        arrays = {"x": _load_npy(path)} if arrays is None else arrays
        names, default, parts = _of_arrays(path, arrays)
    chosen = _choose(path, names, columns, context, default)
    places = {name: i for i, name in enumerate(names)}
    indices = [places[name] for name in (*chosen.x, *chosen.context)]
    found = {}
    for part, read in parts.items():
        where = path if part == "x" else f"{path}: {part}"
        rows = read(indices)
        if not len(rows):
            raise DataError(f"{where}: got no rows")
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            row, column = bad[0]
            raise _not_a_number(where, (*chosen.x, *chosen.context)[column], row, rows[row, column])
        found[part] = rows
    return chosen, found


def is_table(arrays: dict[str, np.ndarray]) -> bool:
    """Whether the arrays of a .npz file are a table and not images."""
    x = arrays.get("x", arrays.get("x_train"))
    return x is not None and x.ndim == 2 and x.dtype != np.uint8


Read = Callable[[Sequence[int]], np.ndarray]


def _choose(
    path: Path, names: Sequence[str], columns: Names, context: Names, default: Sequence[str]
) -> Columns:
    """``default``: names of the context if none are given."""
    chosen = {}
    for option, given in (("columns", columns), ("context", context)):
        wanted = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        for name in wanted or ():
            if names.count(name) != 1:
                once = "" if name not in names else " that occur once"
                raise DataError(f"{option}: got {name!r}, expected columns of {path}{once}: {_listed(names)}")
            if list(wanted or ()).count(name) > 1:
                raise DataError(f"{option}: got {name!r} twice")
        chosen[option] = wanted
    of_context = tuple(default if chosen["context"] is None else chosen["context"])
    if chosen["columns"] is None:
        x = tuple(name for name in names if name not in of_context)
        if len(set(names)) < len(names):
            raise DataError(
                f"{path}: got two columns of one name in {_listed(names)}; choose some with --columns"
            )
    else:
        x = tuple(chosen["columns"])
        if chosen["context"] is None:
            of_context = tuple(name for name in of_context if name not in x)
    both = [name for name in x if name in of_context]
    if both or not x:
        got = f"{both[0]!r}, which is in columns too" if both else "all columns"
        raise DataError(f"context: got {got}; expected columns other than those of x")
    return Columns(x, of_context)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"{shown}, ... ({len(names)} columns)" if len(names) > 20 else shown


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _not_a_number(where: Path | str, column: str, row: int, value: object) -> DataError:
    """The error of a value; rows count from 1, without the header."""
    got = f"got {value}, expected a finite number"
    if isinstance(value, str):
        got = f"got {value[:40]!r}, expected a finite number; --columns chooses other columns"
    return DataError(f"{where}: column {column}, row {row + 1}: {got}")


def _open_csv(path: Path) -> tuple[list[str], Read]:
    """Names of the columns, and a function that reads columns. A first line of numbers is no header."""
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path}: got an empty file, expected a header and rows of numbers")
    header = not all(_is_number(field) for field in first)
    names = [field.strip() for field in first] if header else [str(i) for i in range(len(first))]

    def read(indices: Sequence[int]) -> np.ndarray:
        rows = _as_wide(itertools.islice(_lines(path), int(header), None), len(names), path)
        chunks, done, size = [], 0, max(1, _CHUNK // len(names))
        while chunk := list(itertools.islice(rows, size)):
            chunks.append(_numbers(path, chunk, done, names, indices))
            done += len(chunk)
        return np.concatenate(chunks) if chunks else np.empty((0, len(indices)))

    return names, read


def _lines(path: Path) -> Iterator[list[str]]:
    """Fields of the lines that are not empty; the delimiter is the first of ``, ; tab`` in the first line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = bounded(file)
            first = next(lines, "")
            delimiter = next((d for d in ",;\t" if d in first), ",")
            rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
            yield from (fields for fields in rows if fields)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error


def bounded(file: TextIO) -> Iterator[str]:
    """Lines of a CSV file. One without end would fill the memory before csv counts its characters."""
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise csv.Error(f"a line has {_LONGEST:,} characters or more")
        yield line


def _as_wide(rows: Iterable[list[str]], width: int, path: Path) -> Iterator[list[str]]:
    for i, fields in enumerate(rows):
        if len(fields) != width:
            got = f"got {_count(len(fields), 'field')}"
            raise DataError(f"{path}: row {i + 1}: {got}, expected {width} as in the first line")
        yield fields


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _numbers(
    path: Path, chunk: list[list[str]], done: int, names: list[str], indices: Sequence[int]
) -> np.ndarray:
    try:
        return np.array([[float(fields[i]) for i in indices] for fields in chunk])
    except ValueError:
        row, column = next(
            (row, i) for row, fields in enumerate(chunk) for i in indices if not _is_number(fields[i])
        )
        raise _not_a_number(path, names[column], done + row, chunk[row][column]) from None


def _open_parquet(path: Path) -> tuple[list[str], Read]:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]  # an extra, which tests do without
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: .parquet files need pyarrow: pip install fastflow-torch[parquet]"
        ) from error
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # of pyarrow
        raise _no_parquet(path, error) from error

    def read(indices: Sequence[int]) -> np.ndarray:
        check_size(path, 8 * metadata.num_rows * len(indices), path.stat().st_size)
        try:
            table = pyarrow.parquet.read_table(path, columns=[names[i] for i in indices])
            columns = [table.column(names[i]).to_numpy() for i in indices]
        except Exception as error:  # of pyarrow
            raise _no_parquet(path, error) from error
        found = []
        for i, values in zip(indices, columns, strict=True):
            if values.dtype.kind not in "biuf":
                row = next((r for r, v in enumerate(values) if not isinstance(v, (int, float))), 0)
                raise _not_a_number(path, names[i], row, values[row] if len(values) else values.dtype)
            found.append(values.astype(np.float64))
        return np.stack(found, axis=1)

    return names, read


def _no_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as .parquet ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _load_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # of numpy
        raise DataError(f"{path}: cannot be read as .npy ({_first_line(error)})") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: got several arrays, expected one; a file of numpy.savez ends with .npz")
    return array


def _of_arrays(path: Path, arrays: dict[str, np.ndarray]) -> tuple[list[str], list[str], dict[str, Read]]:
    """Names of the columns of x and of the context, those of the context, and a reader of each part.

    Columns of x are named by their index; those of an array ``context`` are context0, context1, ...
    """
    widths, parts = {}, {}
    for part in ("", "_test", "_val"):
        x = arrays.get(f"x{part}", arrays.get("x_train") if not part else None)
        if x is None:
            continue
        rows = [_two_dimensional(path, f"x{part}", x)]
        if "context" in arrays:
            if f"context{part}" not in arrays:
                raise DataError(
                    f"{path}: got no array context{part}, expected one with the context of x{part}"
                )
            rows.append(_two_dimensional(path, f"context{part}", arrays[f"context{part}"]))
            if len(rows[1]) != len(x):
                got = f"got {_count(len(rows[1]), 'row')}"
                raise DataError(f"{path}: context{part}: {got}, expected {len(x)} as in x{part}")
        for name, array in zip(("x", "context"), rows, strict=False):
            if widths.setdefault(name, array.shape[1]) != array.shape[1]:
                got = f"got {_count(array.shape[1], 'column')}"
                raise DataError(f"{path}: {name}{part}: {got}, expected {widths[name]} as in {name}")
        values = np.concatenate(rows, axis=1)
        parts[f"x{part}"] = lambda indices, values=values: values[:, list(indices)]
    of_context = [f"context{i}" for i in range(widths.get("context", 0))]
    return [*(str(i) for i in range(widths["x"])), *of_context], of_context, parts


def _two_dimensional(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind not in "iuf":
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise DataError(f"{path}: {name}: got {got}, expected numbers of shape [rows, columns]")
    return array.astype(np.float64)


def _refuse_constants(name: str, columns: Columns, train: np.ndarray, dtype: torch.dtype) -> None:
    mean, deviation = train.mean(0), train.std(0)
    rounding = torch.finfo(dtype)
    # as fastflow.nn.Standardize, here with the names of the columns
    constant = np.flatnonzero(deviation <= rounding.eps * np.abs(mean) + rounding.tiny)
    if len(constant):
        i = constant[0]
        column = (*columns.x, *columns.context)[i]
        if np.ptp(train[:, i]) == 0:
            got = f"got {train[0, i]:g} in all {len(train)} training rows, expected values that differ"
            raise DataError(f"{name}: column {column}: {got}")
        got = f"got values {mean[i]:g} +- {deviation[i]:g}, which are equal up to rounding in {dtype}"
        raise DataError(f"{name}: column {column}: {got}; subtract a constant, or compute with --float64")


def _notes(columns: Columns, parts: Sequence[np.ndarray]) -> Iterable[str]:
    """What may mislead a reader of the log-densities."""
    train = parts[0]
    counts = {name: len(np.unique(train[:, i])) for i, name in enumerate(columns.x)}
    repeated = [f"{name} ({n:,} distinct)" for name, n in counts.items() if n <= len(train) // 2]
    if repeated:
        yield (
            f"columns whose values repeat: {', '.join(repeated)}; a density of such a column has no bound: "
            "add noise to it, or make it a part of --context"
        )
    seen = {row.tobytes() for row in train}
    again = sum(row.tobytes() in seen for part in parts[1:] for row in part)
    if again:
        yield f"{_count(again, 'row')} outside the training set equal a training row: their densities flatter the model"


def write_table(path: Path, names: Sequence[str], rows: np.ndarray) -> None:
    """Write rows as a .npy file, or as CSV with a header and as many digits as their dtype has."""
    with replacing(path) as file:
        if path.suffix.lower() == ".npy":
            np.save(file, rows)
            return
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text)
        writer.writerow(names)
        writer.writerows(
            [repr(value.item()) if value.dtype == np.float64 else str(value) for value in row] for row in rows
        )
        text.detach()
