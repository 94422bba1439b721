"""Reading files of ``torch.save`` and of safetensors without running code in them."""

import importlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastflow import validation


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line with the path and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(validation.printable(message))


def read(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> object:
    """Read a file of ``torch.save`` or of safetensors, tensors to ``device``.

    The dict of a file of safetensors has its tensors as ``state_dict`` if :func:`to_safetensors` wrote it, otherwise
    it is the dict of its tensors.

    Raises CheckpointError if the file is missing, damaged, of another kind, or holds more than tensors and
    plain values.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a checkpoint file")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # after the length of the header
            return _from_safetensors(path, device)
        if not start.startswith(b"PK\x03\x04"):
            raise CheckpointError(f"{path}: not a checkpoint: no file of torch.save or safetensors")
        with zipfile.ZipFile(path) as archive:
            _check_sizes(path, archive)
            damaged = archive.testzip()  # torch ignores wrong checksums
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except (CheckpointError, ModuleNotFoundError):
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: truncated or damaged") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: no permission to read it") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint: holds more than tensors and plain values"
        ) from error
    except Exception as error:  # torch raises half a dozen types, some with pages of advice
        raise CheckpointError(f"{path}: cannot be loaded to {device} ({first_line(error)})") from error


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """torch.save compresses nothing, so that the members are no larger than the file; a zip bomb's are."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: not a checkpoint: its contents are larger than the file")


def to_safetensors(contents: dict[str, Any]) -> bytes:
    """A file of safetensors: the tensors of ``state_dict``, and the other plain values as JSON in its metadata."""
    save = _library(".torch").save
    about = {key: value for key, value in contents.items() if key != "state_dict"}
    tensors = {name: value.detach().clone().contiguous() for name, value in contents["state_dict"].items()}
    return save(tensors, metadata={"fastflow": json.dumps(about)})


def _from_safetensors(path: Path, device: torch.device | str) -> dict[str, Any]:
    with _library().safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        about = json.loads((file.metadata() or {}).get("fastflow", "null"))
    if about is None:
        return tensors
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: not a checkpoint: its metadata are no dict")
    return _tuples(about) | {"state_dict": tensors}


def _tuples(value: Any) -> Any:
    """JSON has no tuples: the lists of options are tuples again."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _library(module: str = "") -> ModuleType:
    try:
        return importlib.import_module("safetensors" + module)
    except ModuleNotFoundError as error:
        message = "files of safetensors need safetensors: pip install fastflow-torch[safetensors]"
        raise ModuleNotFoundError(message, name="safetensors") from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
