"""What a run leaves to look at: sample grids, the loss curve, and what image codecs need for the same images."""

import io
import math

import numpy as np

from fastflow.checkpoint import replacing


def grid(images, n_bits=8, columns=None, gap=2):
    """Images laid out in rows: uint8 ``[N, C, H, W]`` with values in ``[0, 2^n_bits)`` to uint8 ``[H', W', 3]``.

    Values are shifted back to 8 bits.  One channel becomes gray; of more than three the first three are shown.
    """
    images = np.asarray(images) << (8 - n_bits)
    n, c, h, w = images.shape
    images = np.repeat(images, 3, axis=1) if c < 3 else images[:, :3]
    columns = columns or max(1, math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    return canvas


def save_grid(path, images, n_bits=8, columns=None):
    """Write :func:`grid` as a PNG; images smaller than 64 pixels are enlarged by a whole factor."""
    from PIL import Image

    picture = grid(images, n_bits, columns)
    factor = max(1, 64 // max(images.shape[2:]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    with replacing(path) as file:
        Image.fromarray(picture).save(file, "PNG")


def save_curve(path, rows, baselines=None):
    """Write the loss curve as a PNG.

    ``rows``: (step, train bits/dim, test bits/dim or None) in order.  ``baselines``: {name: bits/dim}, drawn as lines.
    """
    from matplotlib.figure import Figure

    steps = np.array([row[0] for row in rows])
    train = np.array([row[1] for row in rows])
    test = [(row[0], row[2]) for row in rows if row[2] is not None]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(steps, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    width = max(1, len(train) // 50)
    if len(train) >= 2 * width:
        smooth = np.convolve(train, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"train, mean of {width}")
    if test:
        axes.plot(*zip(*test, strict=True), "o-", color="tab:orange", markersize=3, label="test")
    for (name, bits), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(bits, color="gray", linestyle=style, linewidth=1, label=f"{name} {bits:.2f}")
    shown = np.concatenate([train[len(train) // 20 :], [bits for _, bits in test], list((baselines or {}).values())])
    if len(shown):
        low, high = shown.min(), np.quantile(shown, 0.98)
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    axes.set_xlabel("step")
    axes.set_ylabel("bits/dim")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def codec_bits_per_dim(images):
    """Bits/dim that PNG (``optimize=True``) and lossless WebP (quality 100, method 6) need, each image encoded alone.

    ``images``: uint8 ``[N, C, H, W]``.  Gives {name: bits/dim}, headers included; empty unless C is 1 or 3 and N > 0,
    and without WebP where Pillow was built without it.
    """
    from PIL import Image, features

    images = np.asarray(images)
    if len(images) == 0 or images.shape[1] not in (1, 3):
        return {}
    settings = {"PNG": {"format": "PNG", "optimize": True}}
    if features.check("webp"):
        settings["WebP"] = {"format": "WEBP", "lossless": True, "quality": 100, "method": 6}
    sizes = dict.fromkeys(settings, 0)
    for image in images:
        picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        for name, setting in settings.items():
            file = io.BytesIO()
            picture.save(file, **setting)
            sizes[name] += file.tell()
    return {name: 8 * size / images.size for name, size in sizes.items()}
