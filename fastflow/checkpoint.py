"""Checkpoints: one file, replaced as a whole and read without running code in it.

A checkpoint is a file of ``torch.save`` that holds a plain dict::

    {"format": 1, "fastflow": version, "model": class name, "config": constructor arguments or None,
     "state_dict": ..., "training": None or the trainer's state}

Without constructor arguments, ``"layers"`` has the class and the options of each layer, for messages. A file of
safetensors holds the same, without ``"training"``: the tensors, and the rest as JSON in its metadata.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

from fastflow import archive, validation
from fastflow.archive import CheckpointError
from fastflow.models.model import Model
from fastflow.models.options import FORMER_NAMES

FORMAT = 1
_INTO = "expected into=model, built as the model that was saved: fastflow.load(path, into=model)"
# options of models that count layers, of which each has a weight
_DEPTHS = ("levels", "steps", "blocks", "layers", "couplings", "scales", "depth", "dense_blocks")
_KEYS = ("format", "fastflow", "model", "config", "state_dict", "training")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name ``path`` in an OSError of the block that names no file, as errors of ``write`` do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
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


def save(path: str | os.PathLike[str], model: Model, training: dict[str, Any] | None = None) -> None:
    """Write ``model`` to ``path``. An interrupted write keeps the previous file.

    The file has the options of a ready model, from which :func:`load` builds it again. For a model of your own
    layers (:class:`~fastflow.models.FlowModel`, a subclass of ``Model``, an option that is a function or an
    object) it has the weights only: build the model again, and :func:`load` fills it. A distribution of
    torch.distributions is no weight, and not in the file.

    A ``path`` that ends with ``.safetensors`` gets a file of safetensors: the same, without ``training``. It needs the
    package safetensors.

    ``training``: a plain dict of tensors, numbers, strings, lists and dicts, which ``read`` returns.

    Raises CheckpointError for anything but a model, and for ``training`` in a file of safetensors, OSError if the file cannot be written.
    """
    import fastflow

    path = Path(path)
    if not isinstance(model, Model):
        raise CheckpointError(
            f"{path}: model: got {type(model).__name__}, expected a model of fastflow.models"
        )
    as_safetensors = path.suffix == ".safetensors"
    if as_safetensors and training is not None:
        raise CheckpointError(
            f"{path}: training: got a {type(training).__name__}, expected None or a .pt file"
        )
    contents = {
        "format": FORMAT,
        "fastflow": fastflow.__version__,
        "model": type(model).__name__,
        "config": dict(model.config) if model.config is not None and _is_rebuilt(model) else None,
        "state_dict": model.state_dict(),
        "training": training,
    }
    if contents["config"] is None:
        contents["layers"] = _layers(model)
    try:
        with replacing(path) as file:
            if as_safetensors:
                file.write(archive.to_safetensors(contents))
            else:
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


def read(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read the dict that :func:`save` wrote, tensors to ``device``.

    Raises CheckpointError if the file is missing, damaged, of another kind, or written by a newer version.
    """
    path = Path(path)
    return _checked(archive.read(path, device), path)


def _checked(contents: object, path: Path) -> dict[str, Any]:
    if not isinstance(contents, dict) or "format" not in contents or "fastflow" not in contents:
        raise CheckpointError(f"{path}: not a checkpoint of FastFlow, although its contents can be read")
    if contents["format"] != FORMAT:
        import fastflow

        raise CheckpointError(
            f"{path}: format {contents['format']} of fastflow {contents['fastflow']}; "
            f"this is fastflow {fastflow.__version__}, which reads format {FORMAT}"
        )
    missing = [key for key in _KEYS if key not in contents]
    if missing:
        raise CheckpointError(f"{path}: incomplete, without {', '.join(missing)}")
    for key in ("training", "layers"):
        if not isinstance(contents.get(key), dict | None):
            raise CheckpointError(
                f"{path}: {key}: got {type(contents[key]).__name__}, expected a dict or None"
            )
    return contents


def build(contents: dict[str, Any], path: str | os.PathLike[str]) -> Model:
    """Build the model of a dict that ``read`` returned, in eval mode; ``path`` is for error messages."""
    import fastflow.models

    name, config, state = contents["model"], contents["config"], contents["state_dict"]
    if config is None:
        raise CheckpointError(f"{path}: holds the weights of {name!r} without its options; {_INTO}")
    exported = {key: getattr(fastflow.models, key) for key in fastflow.models.__all__}
    classes = [
        k for k, c in exported.items() if isinstance(c, type) and issubclass(c, Model) and c is not Model
    ]
    if name not in classes:
        known = ", ".join(classes)
        raise CheckpointError(
            f"{path}: holds the model {name!r}; fastflow {fastflow.__version__} knows {known}"
        )
    try:
        options = {FORMER_NAMES[k] if k in FORMER_NAMES else k: v for k, v in config.items()}
        _check_depth(options, state)
        with torch.device("meta"):  # options of a damaged file may be those of a model larger than the memory
            _check_state(exported[name](**options), state, path)
        _check_stored(state, path)
        with torch.random.fork_rng([]):  # the initial weights are replaced: the generator need not advance
            model = exported[name](**options)
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: {name} does not take its configuration ({archive.first_line(error)})"
        ) from error
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(*dtypes)  # also the buffers that are not in the state dict
    model.load_state_dict(state, assign=True)  # assign keeps the file's dtypes, such as float64
    return model.eval()


def fill(model: Model, contents: dict[str, Any], path: str | os.PathLike[str]) -> Model:
    """Copy the weights of a dict that ``read`` returned into ``model``, which then is in eval mode.

    Raises CheckpointError, before anything changes, for a model of another class or with other weights. Warns
    if the description of a layer differs, which shapes of weights do not show, such as a scale function.
    """
    name, state = type(model).__name__, contents["state_dict"]
    if name != contents["model"]:
        raise CheckpointError(f"{path}: holds the model {contents['model']!r}; into: got {name}")
    _check_state(model, state, path)
    expected, found = contents.get("layers") or {}, _layers(model)
    for layer in expected:
        if expected[layer] != found.get(layer):
            warnings.warn(
                f"{path}: {layer or 'the model'}: was {expected[layer]}, into: has {found.get(layer)}",
                stacklevel=3,
            )
            break
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(*dtypes)
    assign = any(value.is_meta for value in model.state_dict().values())
    model.load_state_dict(state, assign=assign)  # copied, so that an optimizer keeps the parameters it has
    return model.eval()


def _is_rebuilt(model: Model) -> bool:
    """Whether the options of a model rebuild it: a class of fastflow.models, with plain values."""
    import fastflow.models

    known = getattr(fastflow.models, type(model).__name__, None) is type(model)
    plain = (str, int, float, tuple, type(None))
    return known and model.config is not None and all(isinstance(v, plain) for v in model.config.values())


def _layers(model: Model) -> dict[str, str]:
    """Class and options of each module by its name."""
    return {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules()}


def _check_depth(options: dict[str, Any], state: object) -> None:
    """Raise ValueError for more layers than there are weights: building them would take for ever."""
    most = len(state) if isinstance(state, dict) else 0
    for name in _DEPTHS:
        if isinstance(options.get(name), int) and options[name] > most:
            raise validation.argument_error(name, options[name], f"at most the number of weights, {most}")


def _check_stored(state: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for weights that the file does not hold, as views of one number may have any size."""
    needed = sum(value.numel() * value.element_size() for value in state.values())
    stored = {s.data_ptr(): s.nbytes() for s in (value.untyped_storage() for value in state.values())}
    if needed > sum(stored.values()):
        got = f"got {sum(stored.values()):,} bytes"
        raise CheckpointError(f"{path}: weights: {got}, expected {needed:,} for their shapes")


def _check_state(model: Model, state: object, path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless ``state`` has the keys and the shapes of the model's weights."""
    name, expected = type(model).__name__, model.state_dict()
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: weights do not fit {name}: not a dict of tensors")
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, such as {(missing + unexpected)[0]}"
        raise CheckpointError(f"{path}: weights do not fit {name}: {counts}")
    for key, value in expected.items():
        if value.shape != state[key].shape:
            got = f"{key}: got {tuple(state[key].shape)}"
            raise CheckpointError(f"{path}: weights do not fit {name}: {got}, expected {tuple(value.shape)}")


def load(
    path: str | os.PathLike[str], device: torch.device | str | None = None, *, into: Model | None = None
) -> Model:
    """Load a trained model to ``device``, in eval mode.

    ``path``: a checkpoint, a run folder, or published weights that :func:`fastflow.models.load_published`
    supports, stored as ``state_dict``. The model of a run folder is its best.pt if the run has a validation set,
    otherwise its last.pt.

    ``device``: None: the CPU, or the device of ``into``.
    ``into``: a model, built as the one that was saved. It receives the weights and is returned. Files without
    the model's options need it, see :func:`save`.

    Raises CheckpointError, a ValueError of one line, if the file cannot be read (see ``read``), for an
    unknown model and for weights that do not fit it. Warns if a layer of ``into`` has other options.
    """
    if into is None:
        return opened(path, device or "cpu")[0]
    if not isinstance(into, Model):
        raise validation.argument_error("into", type(into).__name__, "a model of fastflow.models")
    contents, path, _ = _chosen(Path(path), "cpu")
    if _is_published(contents):
        raise CheckpointError(f"{path}: published weights, which are loaded without into=")
    fill(into, contents, path)
    return into if device is None else into.to(device)


def opened(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[Model, dict[str, Any] | None]:
    """The model that :func:`load` returns and the ``training`` dict that was saved with it, or None."""
    contents, path, training = _chosen(Path(path), device)
    if _is_published(contents):
        from fastflow.models import load_published

        return load_published(path, device), None
    return build(contents, path).to(device), training


def _is_published(contents: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(contents, dict) and "state_dict" in contents and "fastflow" not in contents


def _chosen(path: Path, device: torch.device | str) -> tuple[dict[str, Any], Path, dict[str, Any] | None]:
    """Contents and path of a file, or of the file that a run folder chooses; and the ``training`` dict of the run."""
    folder, path = path, path / "last.pt" if (path / "last.pt").is_file() else path
    contents = archive.read(path, device)
    if _is_published(contents):
        return contents, path, None
    contents = _checked(contents, path)
    training = contents["training"]
    best = folder / "best.pt"
    if path != folder and (training or {}).get("chosen") == best.name and best.is_file():
        contents, path = read(best, device), best
    return contents, path, training
