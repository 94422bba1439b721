"""Checkpoints: one file, replaced as a whole and read without running code in it.

A checkpoint is a file of ``torch.save`` that holds a plain dict::

    {"format": 1, "fastflow": version, "model": class name, "config": constructor arguments,
     "state_dict": ..., "training": None or the trainer's state}
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from fastflow import archive
from fastflow.archive import CheckpointError
from fastflow.models.model import Model
from fastflow.models.options import FORMER_NAMES

FORMAT = 1
_KEYS = ("format", "fastflow", "model", "config", "state_dict", "training")


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Name ``path`` in an OSError of the block that names no file, as errors of ``write`` do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path`` when the block ends; if the block fails, ``path`` stays as it was.

    It is written as ``path.tmp``, flushed to the disk and renamed, and the rename is flushed too. Whenever
    the process or the machine stops, ``path`` holds either the old bytes or the new ones. An OSError names
    the file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: str | os.PathLike, model: Model, training: dict | None = None) -> None:
    """Write ``model``, one of ``fastflow.models``, to ``path``. An interrupted write keeps the previous file.

    ``training``: a plain dict of tensors, numbers, strings, lists and dicts, which :func:`read` returns.

    Raises CheckpointError for a model that :func:`load` cannot rebuild, OSError if the file cannot be
    written.
    """
    import fastflow
    import fastflow.models

    path, name = Path(path), type(model).__name__
    if isinstance(model, Model) and model.config is None:
        raise CheckpointError(
            f"{path}: model: got {name}, expected a model that its options rebuild; build the flow again, and "
            "save and load model.state_dict() with torch"
        )
    if name not in fastflow.models.__all__:
        raise CheckpointError(
            f"{path}: model: got {name}, expected one of {', '.join(fastflow.models.__all__)}"
        )
    for option, value in model.config.items():
        if not isinstance(value, (str, int, float, tuple, type(None))):
            raise CheckpointError(
                f"{path}: {option}: got {value!r}, expected a value that a file can hold; build the model again, "
                "and save and load model.state_dict() with torch"
            )
    contents = {
        "format": FORMAT,
        "fastflow": fastflow.__version__,
        "model": name,
        "config": dict(model.config),
        "state_dict": model.state_dict(),
        "training": training,
    }
    try:
        with replacing(path) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch may raise an error of its own, which hides the disk's
        disk = error
        while disk is not None and not isinstance(disk, OSError):
            disk = disk.__context__
        if disk is None:
            raise
        raise OSError(
            disk.errno, f"not written, {path.name} is unchanged: {disk.strerror}", str(path)
        ) from error


def read(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict:
    """Read the dict that :func:`save` wrote, tensors to ``device``.

    Raises CheckpointError if the file is missing, damaged, of another kind, or written by a newer version.
    """
    path = Path(path)
    return _checked(archive.read(path, device), path)


def _checked(contents: object, path: Path) -> dict:
    if not isinstance(contents, dict) or "format" not in contents or "fastflow" not in contents:
        raise CheckpointError(f"{path}: not a checkpoint of FastFlow, although a file of torch.save")
    if contents["format"] != FORMAT:
        import fastflow

        raise CheckpointError(
            f"{path}: format {contents['format']} of fastflow {contents['fastflow']}; "
            f"this is fastflow {fastflow.__version__}, which reads format {FORMAT}"
        )
    missing = [key for key in _KEYS if key not in contents]
    if missing:
        raise CheckpointError(f"{path}: incomplete, without {', '.join(missing)}")
    return contents


def build(contents: dict, path: str | os.PathLike) -> Model:
    """Build the model of a dict that :func:`read` returned, in eval mode; ``path`` is for error messages."""
    import fastflow.models

    name, config, state = contents["model"], contents["config"], contents["state_dict"]
    if name not in fastflow.models.__all__:
        known = ", ".join(fastflow.models.__all__)
        raise CheckpointError(
            f"{path}: holds the model {name!r}; fastflow {fastflow.__version__} knows {known}"
        )
    try:
        with torch.random.fork_rng([]):  # the initial weights are replaced: the generator need not advance
            model = getattr(fastflow.models, name)(**{FORMER_NAMES.get(k, k): v for k, v in config.items()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {name} does not take its configuration ({archive.first_line(error)})"
        ) from error
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, such as {(missing + unexpected)[0]}"
        raise CheckpointError(f"{path}: weights do not fit {name}: {counts}")
    for key, value in expected.items():
        if value.shape != state[key].shape:
            got = f"{key}: got {tuple(state[key].shape)}"
            raise CheckpointError(f"{path}: weights do not fit {name}: {got}, expected {tuple(value.shape)}")
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(*dtypes)  # also the buffers that are not in the state dict
    model.load_state_dict(state, assign=True)  # assign keeps the file's dtypes, such as float64
    return model.eval()


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> Model:
    """Load a trained model to ``device``, in eval mode.

    ``path``: a checkpoint, a run folder, or published weights that :func:`fastflow.models.load_published`
    supports, stored as ``state_dict``. The model of a run folder is its best.pt if the run has a validation set,
    otherwise its last.pt.

    Raises CheckpointError, a ValueError of one line, if the file cannot be read (see :func:`read`), for an
    unknown model and for weights that do not fit it.
    """
    return opened(path, device)[0]


def opened(path: str | os.PathLike, device: torch.device | str = "cpu") -> tuple[Model, dict | None]:
    """The model that :func:`load` returns and the ``training`` dict that was saved with it, or None."""
    path = Path(path)
    folder, path = path, path / "last.pt" if (path / "last.pt").is_file() else path
    contents = archive.read(path, device)
    if isinstance(contents, dict) and "state_dict" in contents and "fastflow" not in contents:
        from fastflow.models import load_published

        return load_published(path, device), None
    contents = _checked(contents, path)
    training = contents["training"]
    best = folder / "best.pt"
    if path != folder and (training or {}).get("chosen") == best.name and best.is_file():
        contents, path = read(best, device), best
    return build(contents, path).to(device), training
