"""Images in a .npz file."""

from pathlib import Path

import numpy as np

from fastflow.trainer.data.images import Images
from fastflow.trainer.data.source import DataError, check_size


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; a single one is ``x``. Raises DataError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.lib.npyio.NpzFile) and file.zip:
                needed = sum(member.file_size for member in file.zip.infolist())
                check_size(path, needed, path.stat().st_size)
            arrays = {key: file[key] for key in file.files}
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # of zipfile, zlib or numpy
        raise DataError(f"{path}: cannot be read as .npz ({_reason(error)})") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of other members
            raise DataError(f"{path}: {key}: got no array, expected a file of numpy.savez")
    return {"x": next(iter(arrays.values()))} if len(arrays) == 1 else arrays


def images_of(path: Path, arrays: dict[str, np.ndarray], image_size: int | None) -> Images:
    """Images from ``x`` and optionally ``y``, ``x_test``, ``y_test``, ``x_val``, ``y_val``.

    Raises DataError for other contents.
    """
    x, y = (arrays.get(key, arrays.get(f"{key}_train")) for key in "xy")
    if x is None:
        got = f"got arrays {', '.join(arrays)}" if arrays else "got no arrays"
        expected = "x (images) and optionally y, x_test, y_test, x_val, y_val"
        raise DataError(f"{path}: {got}, expected {expected}")
    x, y = _as_images(path, "x", x), _as_labels(path, "y", y, len(x))
    x_val, y_val = _part(path, arrays, "val", x)
    x_test, y_test = _part(path, arrays, "test", x)
    if x_test is None:
        if len(x) < 2:
            raise DataError(f"{path}: x: got {len(x)} image, expected at least 2, one of them to test on")
        held_out = np.arange(len(x)) % 10 == min(9, len(x) - 1)
        x, x_test = x[~held_out], x[held_out]
        y, y_test = (None, None) if y is None else (y[~held_out], y[held_out])
    if image_size is not None and x.shape[2:] != (image_size, image_size):
        raise DataError(
            f"image_size: got {image_size}, expected {x.shape[2]}x{x.shape[3]}, the size of {path}"
        )
    for name, labels in (("y_test", y_test), ("y_val", y_val)):
        if y is not None and labels is not None and labels.max() > y.max():
            got = f"got class {labels.max()}"
            raise DataError(f"{path}: {name}: {got}, expected at most {y.max()}, the largest class in y")
    if y_test is None or (x_val is not None and y_val is None):
        y = y_test = y_val = None
    return Images(path.stem, x, x_test, y, y_test, validation=x_val, validation_labels=y_val)


def _part(
    path: Path, arrays: dict[str, np.ndarray], name: str, x: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Images and labels that are held out, ``x_NAME`` and ``y_NAME``, like the training images ``x``."""
    images = arrays.get(f"x_{name}")
    if images is None:
        return None, None
    images = _as_images(path, f"x_{name}", images)
    if images.shape[1:] != x.shape[1:]:
        got = f"got images {images.shape[1:]}"
        raise DataError(f"{path}: x_{name}: {got}, expected {x.shape[1:]} (C, H, W) as in x")
    return images, _as_labels(path, f"y_{name}", arrays.get(f"y_{name}"), len(images))


def _as_images(path: Path, key: str, x: np.ndarray) -> np.ndarray:
    if x.dtype != np.uint8:
        raise DataError(f"{path}: {key}: got {x.dtype}, expected uint8{_conversion(x)}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, 3):
        expected = "[N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3"
        last = x.ndim == 4 and x.shape[2] in (1, 3)
        hint = "; np.moveaxis(x, -1, 0) moves the images to the first axis" if last else ""
        raise DataError(f"{path}: {key}: got shape {x.shape}, expected {expected}{hint}")
    if len(x) == 0:
        raise DataError(f"{path}: {key}: got 0 images, expected at least 1")
    return x


def _as_labels(path: Path, key: str, y: np.ndarray | None, n: int) -> np.ndarray | None:
    if y is None:
        return None
    if y.shape != (n,) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise DataError(
            f"{path}: {key}: got {y.dtype} {y.shape}, expected integers from 0 of shape {(n,)}, one per image"
        )
    return y


def _conversion(x: np.ndarray) -> str:
    """The range of values that are not uint8, and the expression that converts them."""
    if x.dtype.kind not in "biuf" or not x.size:
        return ""
    low, high = x.min(), x.max()
    expressions = {
        (0, 1): "(255 * x).round().astype('uint8')",
        (-1, 1): "(127.5 * (x + 1)).round().astype('uint8')",
        (0, 255): "x.round().astype('uint8')",
    }
    fitting = [text for (least, most), text in expressions.items() if least <= low and high <= most]
    return f"; the values are from {low:g} to {high:g}" + (f": {fitting[0]} converts them" if fitting else "")


def _reason(error: Exception) -> str:
    if "Object arrays" in str(error):
        return "it holds arrays of objects, expected numbers; np.stack makes one array of images of one size"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
