"""Pictures of runs and models: sample grids, curves, histograms, densities; and bits/dim of image codecs."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastflow.checkpoint import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}


def grid(images: ArrayLike, n_bits: int = 8, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images in rows: uint8 ``[N, C, H, W]`` with values in ``[0, 2^n_bits)`` to uint8 ``[H', W', 3]``.

    Values are scaled back to 8 bits. One channel becomes gray; more than three channels are cut to the first
    three.
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


def save_grid(path: Path | str, images: ArrayLike, n_bits: int = 8, columns: int | None = None) -> None:
    """Write :func:`grid` in the format of the suffix; images below 64 pixels are enlarged by an integer factor."""
    from PIL import Image

    images = np.asarray(images)
    picture = grid(images, n_bits, columns)
    factor = max(1, 64 // max(images.shape[2:]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    with replacing(path) as file:
        Image.fromarray(picture).save(file, FORMATS[Path(path).suffix.lower()])


def save_curve(
    path: Path | str,
    rows: Sequence[tuple[int, float, float | None]],
    baselines: Mapping[str, float] | None = None,
    evaluated: str = "test",
    unit: str = "bits/dim",
) -> None:
    """Write the loss curve as a PNG.

    ``rows``: (step, training loss, loss of an evaluation or None) in order. ``baselines``: {name: loss}, drawn
    as lines. ``evaluated``: the name of the evaluated set. ``unit``: the unit of the losses.
    """
    from matplotlib.figure import Figure

    steps = np.array([row[0] for row in rows])
    train = np.array([row[1] for row in rows])
    found = [(row[0], row[2]) for row in rows if row[2] is not None]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(steps, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    width = max(1, len(train) // 50)
    if len(train) >= 2 * width:
        smooth = np.convolve(train, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"train, mean of {width}")
    if found:
        axes.plot(*zip(*found, strict=True), "o-", color="tab:orange", markersize=3, label=evaluated)
    for (name, bits), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(bits, color="gray", linestyle=style, linewidth=1, label=f"{name} {bits:.2f}")
    shown = np.concatenate(
        [train[len(train) // 20 :], [bits for _, bits in found], list((baselines or {}).values())]
    )
    _show(axes, shown)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    _write(path, figure)


def save_curves(
    path: Path | str, runs: Mapping[str, Sequence[tuple[int, float, float | None]]], unit: str = "bits/dim"
) -> None:
    """Write the loss curves of several runs as a PNG: training thin, evaluations with dots.

    ``runs``: {name: rows as in :func:`save_curve`}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    shown = []
    for i, (name, rows) in enumerate(runs.items()):
        color = f"C{i % 10}"
        steps, train = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        found = [(row[0], row[2]) for row in rows if row[2] is not None]
        axes.plot(steps, train, color=color, alpha=0.25, linewidth=0.8, label=None if found else name)
        if found:
            axes.plot(
                *zip(*found, strict=True),
                "o-",
                color=color,
                markersize=3,
                label=f"{name}, {found[-1][1]:.3f}",
            )
        shown += [train[len(train) // 20 :], [loss for _, loss in found]]
    _show(axes, np.concatenate(shown))
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    _write(path, figure)


def _show(axes: "Axes", losses: np.ndarray) -> None:
    """Limit the axis to the finite ones of ``losses``, without the highest of them."""
    losses = losses[np.isfinite(losses)]
    if len(losses):
        low, high = losses.min(), np.quantile(losses, 0.98)
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))


def save_rows(path: Path | str, rows: Mapping[str, ArrayLike], n_bits: int = 8) -> None:
    """Write labeled rows of images as a PNG. ``rows``: {name: images as in :func:`grid`}."""
    from matplotlib.figure import Figure

    arrays = {name: np.asarray(images) for name, images in rows.items()}
    pictures = {name: grid(images, n_bits, columns=len(images)) for name, images in arrays.items()}
    height, width = next(iter(pictures.values())).shape[:2]
    columns = max(map(len, arrays.values()))
    figure = Figure(figsize=(0.6 * columns, 0.6 * columns * height / width * len(rows)))
    figure.subplots_adjust(0, 0, 1, 1, hspace=0)
    for axes, (name, picture) in zip(
        figure.subplots(len(rows), squeeze=False).flat, pictures.items(), strict=True
    ):
        axes.imshow(picture, interpolation="nearest")
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    _write(path, figure, bbox_inches="tight", pad_inches=0.05)


def save_histograms(
    path: Path | str,
    panels: Mapping[str, Mapping[str, ArrayLike]],
    xlabel: str,
    bins: int = 100,
    log: bool = False,
) -> None:
    """Write histograms (densities) as a PNG, one panel per row. ``panels``: {title: {name: values}}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.4 * len(panels)), layout="constrained")
    for axes, (title, groups) in zip(
        figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        values = [np.asarray(v).ravel() for v in groups.values()]
        edges = np.histogram_bin_edges(np.concatenate(values), bins)
        for i, (name, v) in enumerate(zip(groups, values, strict=True)):
            axes.hist(
                v,
                edges,
                density=True,
                histtype="stepfilled",
                color=f"C{i}",
                alpha=0.5,
                edgecolor=f"C{i}",
                label=name,
            )
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=xlabel, ylabel="density", yscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        if len(groups) > 1:
            axes.legend(fontsize=8, ncols=1 + len(groups) // 5)
    _write(path, figure)


def save_scores(path: Path | str, panels: Mapping[str, Mapping[str, ArrayLike]]) -> None:
    """Write panels of scores side by side as a PNG: a row of points for each group, on a logarithmic axis.

    ``panels``: {title: {name: positive scores}} with equal names. A line shows the 0.95 quantile of the first
    group.
    """
    from matplotlib.figure import Figure

    names = list(next(iter(panels.values())))
    figure = Figure(figsize=(9, 0.7 + 0.36 * len(names)), layout="constrained")
    for axes, (title, groups) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels.items(), strict=True
    ):
        for i, scores in enumerate(map(np.asarray, groups.values())):
            height = i + np.random.default_rng(i).uniform(-0.3, 0.3, len(scores))
            axes.scatter(scores, height, s=4, linewidths=0, alpha=0.6, color=f"C{i}")
        threshold = np.quantile(np.asarray(groups[names[0]]), 0.95)
        axes.axvline(
            threshold, color="gray", linestyle="--", linewidth=1, label=f"0.95 quantile of {names[0]}"
        )
        axes.set(xscale="log", yticks=range(len(names)), yticklabels=names, title=title)
        axes.title.set_fontsize(10)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    _write(path, figure)


def save_corner(path: Path | str, groups: Mapping[str, ArrayLike], names: Sequence[str]) -> None:
    """Write rows of tables as a PNG: histograms on the diagonal, scatter plots of pairs of columns below it.

    ``groups``: {name: rows ``[N, D]``} with equal columns; ``names`` of the columns. More than six columns are cut
    to the first six.
    """
    from matplotlib.figure import Figure

    names, values = names[:6], {name: np.asarray(rows)[:, :6] for name, rows in groups.items()}
    d, reference = len(names), next(iter(values.values()))
    limits = np.stack([reference.min(0), reference.max(0)])  # of the first group: samples may have outliers
    margin = 0.05 * (limits[1] - limits[0])
    limits += np.where(margin > 0, margin, 1) * [[-1], [1]]
    side = 1 + (2.2 * d if d > 1 else 4)
    figure = Figure(figsize=(side, side))
    figure.subplots_adjust(0.8 / side, 0.5 / side, 1 - 0.1 / side, 1 - 0.1 / side, wspace=0.32, hspace=0.2)
    panels = figure.subplots(d, d, squeeze=False)
    for i, row in enumerate(panels):
        for j, axes in enumerate(row):
            if j > i:
                axes.remove()
                continue
            for k, (name, rows) in enumerate(values.items()):
                style = {"color": f"C{k}", "label": name}
                if i == j:
                    edges = np.linspace(limits[0, i], limits[1, i], 41)
                    axes.hist(rows[:, i], edges, density=True, histtype="step", **style)
                else:
                    axes.scatter(rows[:, j], rows[:, i], s=3, linewidths=0, alpha=0.5, **style)
                    axes.set_ylim(limits[:, i])
            axes.set_xlim(limits[:, j])
            axes.tick_params(labelsize=7)
            if i == d - 1:
                axes.set_xlabel(names[j])
            if j == 0:
                axes.set_ylabel(names[i] if i else "density")
    panels[0, 0].legend(fontsize=7)
    _write(path, figure)


def save_densities(
    path: Path | str,
    data: ArrayLike,
    densities: Mapping[str, tuple[ArrayLike, ArrayLike]],
    limits: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    """Write a row for each two-dimensional model as a PNG: data, map of the density, samples.

    ``data``: ``[N, 2]``; ``densities``: {name: (density from :func:`fastflow.explore.density`,
    samples ``[M, 2]``)}; ``limits``: the limits of the density.
    """
    from matplotlib.figure import Figure

    (left, right), (low, high) = limits
    height = 0.4 + 3.1 * (high - low) / (right - left)
    figure = Figure(figsize=(9.6, height * len(densities)), layout="constrained")
    for row, (name, (density, samples)) in zip(
        figure.subplots(len(densities), 3, squeeze=False), densities.items(), strict=True
    ):
        for axes, title, points in ((row[0], "data", data), (row[2], f"samples, {name}", samples)):
            axes.scatter(*np.asarray(points).T, s=1, linewidths=0, color="tab:blue", rasterized=True)
            axes.set_title(title, fontsize=10)
        row[1].imshow(
            np.asarray(density),
            extent=(left, right, low, high),
            origin="lower",
            cmap="magma",
            interpolation="bilinear",
        )
        row[1].set_title(f"density, {name}", fontsize=10)
        for axes in row:
            axes.set(xlim=(left, right), ylim=(low, high), aspect="equal")
            axes.tick_params(labelsize=7)
    _write(path, figure)


def _write(path: Path | str, figure: "Figure", **options: Any) -> None:
    with replacing(path) as file:
        figure.savefig(file, format=FORMATS[Path(path).suffix.lower()].lower(), dpi=120, **options)


def codec_bits_per_dim(images: ArrayLike) -> dict[str, float]:
    """Bits/dim of PNG (``optimize=True``) and lossless WebP (quality 100, method 6), one file per image.

    ``images``: uint8 ``[N, C, H, W]``. Gives {name: bits/dim}, headers included. It is empty unless C is 1 or
    3 and N > 0, and lacks WebP if Pillow was built without it.
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
        picture = Image.fromarray(
            image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        )
        for name, setting in settings.items():
            file = io.BytesIO()
            picture.save(file, **setting)
            sizes[name] += file.tell()
    return {name: 8 * size / images.size for name, size in sizes.items()}
