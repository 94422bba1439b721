"""Reading files of ``torch.save`` without running code in them."""

import os
import pickle
import zipfile
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line with the path and the reason."""


def read(path: str | os.PathLike, device: torch.device | str = "cpu") -> object:
    """Read a file of ``torch.save``, tensors to ``device``.

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
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(f"{path}: not a checkpoint: not a file that torch.save wrote")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch ignores wrong checksums
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
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


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
