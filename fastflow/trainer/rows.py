"""The commands ``evaluate`` and ``sample`` for models of rows of a table."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.models.model import Model
from fastflow.trainer import data
from fastflow.trainer.config import ConfigError, config_error
from fastflow.trainer.evaluate import sample
from fastflow.trainer.kinds import sample_dtype
from fastflow.trainer.output import output

if TYPE_CHECKING:
    from fastflow.trainer.commands import Evaluate, Sample


def sample_rows(
    options: "Sample", temperatures: tuple[float, ...], model: Model, training: dict | None, path: Path
) -> None:
    """Write samples: the columns of x, then those of the context. Raises ConfigError for options of images."""
    out = output(options.out, "samples.csv", (".csv", ".npy"))
    temperature, *others = temperatures
    if others:
        raise config_error("temperature", temperatures, "one value for rows")
    if options.classes is not None:
        raise config_error("classes", options.classes, f"none: {path} holds a model without classes")
    columns = _columns(model, training)
    context = _context(options.context, columns, model, path)
    n = options.n if options.n is not None else 1000 if context is None else len(context)
    rows = sample(model, n, temperature, options.seed, context)
    if context is not None:
        rows = torch.cat([rows, context[torch.arange(n) % len(context)]], dim=1)
    data.write_table(out, (*columns.x, *columns.context), rows.numpy())
    print(f"{out}: {n} rows at temperature {temperature:g}")


def test_rows(
    options: "Evaluate", model: Model, training: dict | None, path: Path
) -> tuple[Tensor, Tensor | None]:
    """x and context of the test rows of the run's own table, or of all rows of another one."""
    trained = (training or {}).get("config", {})
    name = options.data or trained.get("data")
    if name is None:
        raise ConfigError(f"{path}: does not contain the name of its training data; give --data")
    columns, context = options.columns, options.context
    if training is not None and "columns" in training:
        columns = columns or training["columns"]["x"]
        context = context or training["columns"]["context"] or None
    dtype = sample_dtype(model)
    if trained.get("data") and Path(name).resolve() == Path(trained["data"]).resolve():
        source = data.load(name, columns=columns, context=context, dtype=dtype)
        if not isinstance(source, data.Table):
            raise config_error("data", name, f"a table: {path} holds a model of rows")
        names, x, of_x = source.columns, source.test, source.test_labels
    else:
        names, rows = data.read_rows(name, columns, context)
        x, of_x = data.rows_as_tensors(names, rows, dtype)
    takes = (model.shape[0], _context_features(model))
    if (len(names.x), len(names.context)) != takes:
        got = f"{len(names.x)} columns and {len(names.context)} of context of {name}"
        raise config_error("columns", got, f"{takes[0]} and {takes[1]}, the model's")
    return x, of_x


def _context_features(model: Model) -> int:
    return 0 if model.context_shape is None else model.context_shape[0]


def _columns(model: Model, training: dict | None) -> data.Columns:
    """Names of a model's columns: those of its training run, otherwise their indices."""
    kept = (training or {}).get("columns")
    if kept is not None:
        return data.Columns(tuple(kept["x"]), tuple(kept["context"]))
    size = model.shape[0]
    names = tuple(str(i) for i in range(size + _context_features(model)))
    return data.Columns(names[:size], names[size:])


def _context(name: str | None, columns: data.Columns, model: Model, path: Path) -> Tensor | None:
    """The context columns of a table, as the model takes them."""
    if model.context_shape is None:
        if name is not None:
            raise config_error("context", name, f"none: {path} holds a model without context")
        return None
    if name is None:
        raise config_error("context", "none", f"a table with the columns {', '.join(columns.context)}")
    _, rows = data.read_rows(name, columns.context, (), option="context")
    return torch.from_numpy(rows).to(sample_dtype(model))
