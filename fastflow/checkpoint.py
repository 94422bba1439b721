"""Checkpoints: one file, written beside its place and renamed, read without running anything in it.

A checkpoint is the zip of ``torch.save`` holding a plain dict::

    {"format": 1, "fastflow": version, "model": class name, "config": constructor arguments,
     "state_dict": ..., "training": None or what the trainer needs to go on}
"""

import os
from contextlib import contextmanager
from pathlib import Path

import torch

from fastflow import archive
from fastflow.archive import CheckpointError

FORMAT = 1
_KEYS = ("format", "fastflow", "model", "config", "state_dict", "training")


@contextmanager
def replacing(path):
    """A binary file that takes the place of ``path`` whole when the block ends, or not at all.

    It is written beside (``path.tmp``), flushed to the disk and renamed, and the rename is flushed too: whenever the
    process or the machine stops, ``path`` holds the old bytes or the new ones.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path, model, training=None):
    """Write ``model``, one of ``fastflow.models``, to ``path``; an interrupted write leaves the former file as it was.

    ``training`` is a plain dict of tensors, numbers, strings, lists and dicts that :func:`read` gives back.
    Raises CheckpointError for a model that :func:`load` could not rebuild, OSError where the disk refuses.
    """
    import fastflow
    import fastflow.models

    path, name = Path(path), type(model).__name__
    if name not in fastflow.models.__all__:
        raise CheckpointError(
            f"{path}: model is a {name}, expected one of {', '.join(fastflow.models.__all__)}"
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
    except (
        OSError,
        RuntimeError,
    ) as error:  # where a write fails torch's own error may come last, and hide the disk's
        disk = error
        while disk is not None and not isinstance(disk, OSError):
            disk = disk.__context__
        if disk is None:
            raise
        raise OSError(
            disk.errno, f"not written, {path.name} is what it was before: {disk.strerror}", str(path)
        ) from error


def read(path, device="cpu"):
    """The dict that :func:`save` wrote, tensors on ``device``.

    Raises CheckpointError when the file is missing, damaged, something else, or written by a newer version.
    """
    path = Path(path)
    return _checked(archive.read(path, device), path)


def _checked(contents, path):
    if not isinstance(contents, dict) or "format" not in contents or "fastflow" not in contents:
        raise CheckpointError(f"{path}: not a FastFlow checkpoint, though a file that torch.save wrote")
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


def build(contents, path):
    """The model of a dict that :func:`read` gave, in eval mode; ``path`` is for the messages."""
    import fastflow.models

    name, config, state = contents["model"], contents["config"], contents["state_dict"]
    if name not in fastflow.models.__all__:
        known = ", ".join(fastflow.models.__all__)
        raise CheckpointError(
            f"{path}: holds the model {name!r}; fastflow {fastflow.__version__} knows {known}"
        )
    try:
        with torch.random.fork_rng([]):  # the first weights are not kept, and draw from nobody's generator
            model = getattr(fastflow.models, name)(**config)
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
            raise CheckpointError(
                f"{path}: weights do not fit {name}: {key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            )
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(*dtypes)  # buffers outside the state too
    model.load_state_dict(
        state, assign=True
    )  # assign keeps the file's dtypes, so that a float64 model stays one
    return model.eval()


def load(path, device="cpu"):
    """The trained model that ``path`` holds, on ``device``, in eval mode: a checkpoint, or a run folder, of which its last.pt.

    Weights that others published, as PyTorch Lightning saved them, are those that :func:`fastflow.models.load_published` knows.

    Raises CheckpointError, a ValueError of one line, when it cannot be had: see :func:`read`; also for an unknown
    model and for weights that do not fit it.
    """
    return opened(path, device)[0]


def opened(path, device="cpu"):
    """The model that :func:`load` gives, and what was saved beside it for training, or None."""
    path = Path(path)
    path = path / "last.pt" if (path / "last.pt").is_file() else path
    contents = archive.read(path, device)
    if isinstance(contents, dict) and "pytorch-lightning_version" in contents:
        from fastflow.models import load_published

        return load_published(path, device), None
    contents = _checked(contents, path)
    return build(contents, path).to(device), contents["training"]
