"""Image files as uint8 arrays."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastflow.trainer.data.source import DataError
from fastflow.validation import printable

if TYPE_CHECKING:
    from PIL import Image, ImageFile

BACKGROUND = "white"
_GRAY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "F"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of the last two
_ORIENTATION = 274  # EXIF's tag
_STRIP = 2**23  # pixels that are converted together
_LONGEST = 64  # times the shorter side; more is cropped before the image is resized
# by EXIF's orientation, which says how the camera was held; 1 is upright
_UPRIGHT = dict(
    enumerate(
        "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2
    )
)


class DamagedError(DataError):
    """A file that holds no image that can be read."""


def decode(
    file: Path, size: int, channels: int, gray_only: bool = False, background: str = BACKGROUND
) -> np.ndarray:
    """Read an image, the shorter side resized to ``size`` and the center cropped.

    It is turned as its EXIF orientation says, composited on ``background`` if it has transparency, and converted
    to RGB or to gray (ITU-R 601-2 luma). Samples of 12 and 16 bits are scaled to 8 by the range of the format.
    Of several frames the first one is read. With ``gray_only``, a color image is an error.

    Shape: uint8 ``[channels, size, size]``.

    Raises DamagedError for a file that is no image, is damaged, or has more pixels than Pillow's limit,
    DataError for floating point, signed and 32-bit samples, which have no range, OSError if the file cannot be
    opened.
    """
    from PIL import Image

    with opened(file) as image:
        if gray_only and not _is_gray(image):
            raise DataError(
                f"{printable(file)}: got a color image, expected gray ones as before; give --channels"
            )
        _scale_key(image)
        image.load()
        orientation = _orientation(image)  # after load, which turns a TIFF itself
        _check_samples(image, file)
        image = _converted(image, "L" if channels == 1 else "RGB", background)
        if orientation is not None:
            image = image.transpose(Image.Transpose[orientation])
    image = _without_ends(image)
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def opened(file: Path) -> Iterator["ImageFile.ImageFile"]:
    """An image whose pixels are not yet decoded; errors of Pillow within the block become DamagedError."""
    from PIL import Image, UnidentifiedImageError

    # Pillow's warnings are several lines, without the file's name: of half of the limit of the size, for which its
    # error suffices, and of metadata such as damaged EXIF data
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    try:
        # not by its name, as Pillow then maps a TIFF into memory, for orientations 5 to 8 with the sides exchanged
        with open(file, "rb") as read, Image.open(read) as image:
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DamagedError(f"{printable(file)}: got more than {most:,} pixels, the limit of Pillow") from None
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        if isinstance(error, OSError) and error.errno and not isinstance(error, UnidentifiedImageError):
            raise
        raise DamagedError(f"{printable(file)}: cannot be read as an image") from error


class Header(NamedTuple):
    """Whether an image is ``gray``, of one channel or with a palette of grays, and may be ``transparent``."""

    gray: bool
    transparent: bool


def header(file: Path) -> Header:
    """What the header of an image tells; its pixels are not read. Raises as :func:`decode`."""
    with opened(file) as image:
        return Header(_is_gray(image), image.has_transparency_data)


def check_background(color: str) -> None:
    """Raise DataError for a color that Pillow does not know."""
    from PIL import ImageColor

    try:
        if len(ImageColor.getrgb(color)) == 3:
            return
    except ValueError:
        pass
    raise DataError(f"background: got {color!r}, expected an opaque color such as white, black or #808080")


def _is_gray(image: "ImageFile.ImageFile") -> bool:
    if image.mode == "P" and image.palette is not None:
        order, values = image.palette.getdata()
        planes = np.frombuffer(bytes(values), np.uint8)
        planes = planes.reshape(3, -1) if order == "RGB;L" else planes.reshape(-1, len(order)).T[:3]
        return bool((planes == planes[0]).all())
    return image.mode in _GRAY or _raw_mode(image) == "LA;16B"  # which Pillow opens as RGBA


def _orientation(image: "Image.Image") -> str | None:
    """The transpose that makes an image upright; None if it is, or if the EXIF data are damaged."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises errors of many kinds
        return None


def _raw_mode(image: "ImageFile.ImageFile") -> object:
    """The samples of a PNG, before they are read."""
    return image.tile[0][3] if image.tile else None


def _scale_key(image: "ImageFile.ImageFile") -> None:
    """Scale the transparent value of a PNG with 2 or 4 bits as Pillow scales its samples."""
    factors: dict[object, int] = {"L;2": 85, "L;4": 17}
    factor = factors.get(_raw_mode(image)) if image.format == "PNG" else None
    if factor is not None and "transparency" in image.info:
        image.info["transparency"] *= factor


def _tags(image: "Image.Image") -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _check_samples(image: "Image.Image", file: Path) -> None:
    """Raise DataError for samples without a range, and for colors that Pillow does not convert."""
    tags = _tags(image)
    signed = _SIGNED in tags.get(_SAMPLE_FORMAT, ())
    if image.mode == "F" or signed or (image.mode == "I" and tags):
        got = "floating point" if image.mode == "F" else "signed or 32-bit"
        raise DataError(f"{printable(file)}: got {got} samples, which have no range, expected 8 or 16 bits")
    if image.mode == "LAB":
        raise DataError(f"{printable(file)}: got LAB colors, expected gray, RGB or CMYK")


def _converted(image: "Image.Image", mode: str, background: str) -> "Image.Image":
    """The image in 8 bits, without transparency, in ``mode``.

    It is converted in strips: the copies of a whole image of Pillow's largest size would take 3 GB.
    """
    from PIL import Image

    if image.mode == mode and not image.has_transparency_data:
        return image
    tags, size = _tags(image), image.size
    if size[0] * size[1] <= _STRIP:
        return _composited(_in_8_bits(image, tags), background).convert(mode)
    found, rows = Image.new(mode, size), max(1, _STRIP // size[0])
    for top in range(0, size[1], rows):
        strip = image.crop((0, top, size[0], min(size[1], top + rows)))
        found.paste(_composited(_in_8_bits(strip, tags), background).convert(mode), (0, top))
    return found


def _in_8_bits(image: "Image.Image", tags: Mapping[int, Any]) -> "Image.Image":
    """The image with samples of 8 bits; ``tags`` are those of TIFF."""
    from PIL import Image

    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    samples, most = np.asarray(image).astype(np.int64), 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    key = image.info.get("transparency")
    alpha = None if key is None else np.where(samples == key, 0, 255)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts samples of 8 bits only
        samples = most - samples
    scaled = (samples * 255 + most // 2) // most
    scaled = scaled if alpha is None else np.stack([scaled, alpha], -1)
    return Image.fromarray(scaled.astype(np.uint8))


def _composited(image: "Image.Image", background: str) -> "Image.Image":
    """The image without transparency."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _without_ends(image: "Image.Image") -> "Image.Image":
    """The center of a very long image, which would need much memory when it is resized."""
    most = _LONGEST * min(image.size)
    left, top = (max(0, (side - most) // 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image
