"""Image files as uint8 arrays."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastflow.trainer.data.source import DataError

if TYPE_CHECKING:
    from PIL import Image

_GRAY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"}
_BITS_PER_SAMPLE = 258  # TIFF's tag
_ORIENTATION = 274  # EXIF's tag
# by EXIF's orientation, which says how the camera was held
_UPRIGHT = dict(
    enumerate(
        "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2
    )
)


class DamagedError(DataError):
    """A file that holds no image that can be read."""


def decode(file: Path, size: int, channels: int, gray_only: bool = False) -> np.ndarray:
    """Read an image, the shorter side resized to ``size`` and the center cropped.

    It is turned as its EXIF orientation says, composited on white if it has transparency, and converted to
    RGB or to gray (ITU-R 601-2 luma). Samples of 12 and 16 bits are scaled to 8 by the range of the format.
    Of several frames the first one is read. With ``gray_only``, a color image is an error.

    Shape: uint8 ``[channels, size, size]``.

    Raises DamagedError for a file that is no image, is damaged, or has more pixels than Pillow's limit,
    DataError for floating point and 32-bit samples, which have no range, OSError if the file cannot be
    opened.
    """
    from PIL import Image

    with opened(file) as image:
        if gray_only and image.mode not in _GRAY:
            raise DataError(
                f"{printable(file)}: got a color image, expected gray ones as before; give --channels"
            )
        orientation = image.getexif().get(_ORIENTATION)
        image = _on_white(_in_8_bits(image, file)).convert("L" if channels == 1 else "RGB")
        if orientation in _UPRIGHT:
            image = image.transpose(Image.Transpose[_UPRIGHT[orientation]])
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def opened(file: Path) -> Iterator["Image.Image"]:
    """An image whose pixels are not yet decoded; errors of Pillow within the block become DamagedError."""
    from PIL import Image, UnidentifiedImageError

    # only Pillow's error limits the size: a warning for half of its limit would be several lines
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        with Image.open(file) as image:
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise DamagedError(f"{printable(file)}: got more than {most:,} pixels, the limit of Pillow") from None
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        if isinstance(error, OSError) and error.errno and not isinstance(error, UnidentifiedImageError):
            raise
        raise DamagedError(f"{printable(file)}: cannot be read as an image") from error


def is_gray(file: Path) -> bool:
    """Whether a file has one channel, and perhaps transparency; only its header is read."""
    with opened(file) as image:
        return image.mode in _GRAY


def printable(name: Path | str) -> str:
    """A file's name for a message of one line."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in str(name))


def _in_8_bits(image: "Image.Image", file: Path) -> "Image.Image":
    """The image with samples of 8 bits."""
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        got = "floating point" if image.mode == "F" else "signed or 32-bit"
        raise DataError(f"{printable(file)}: got {got} samples, which have no range, expected 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
    samples, most = np.asarray(image).astype(np.int64), 2**bits - 1
    hidden = samples == image.info.get("transparency", -1)
    scaled = (samples * 255 + most // 2) // most
    return Image.fromarray(np.where(hidden, 255, scaled).astype(np.uint8))


def _on_white(image: "Image.Image") -> "Image.Image":
    """The image without transparency."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
