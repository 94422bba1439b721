"""The masks of couplings and the squeeze, shown on an image and as the numbers of its pixels.

From a clean clone, after `make setup` (seconds):

    .venv/bin/python docs/examples/masks.py --out masks.png
"""

import argparse

import torch
from matplotlib.figure import Figure

import fastflow.nn as fnn
from fastflow.trainer import data


def transformed(coupling, x):
    """True for the elements that the coupling changes."""
    y, _ = coupling(x)
    return y != x


def shift(outputs):
    """A coupling network that shifts every transformed element by 1."""
    return lambda x: torch.ones(len(x), outputs, *x.shape[2:])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/masks.png")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--image", type=int, default=102)
    options = parser.parse_args(argv)

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, middle, below = figure.subfigures(3, 1)
    above.suptitle("elements that a coupling transforms (white), 2 channels of 8x8")
    x = torch.zeros(1, 2, 8, 8)
    panels = iter(above.subplots(1, 8))
    for mask in ("checkerboard", "halves"):
        for swap in (False, True):
            net = shift(1 if mask == "halves" else 2)
            changed = transformed(fnn.AdditiveCoupling(net, mask=mask, swap_halves=swap), x)
            for channel in range(2):
                axes = next(panels)
                axes.imshow(changed[0, channel], cmap="gray", vmin=0, vmax=1)
                axes.set_title(f"{mask}\n{'swapped, ' if swap else ''}channel {channel}", fontsize=7)
                axes.set(xticks=[], yticks=[])

    squeeze = fnn.Squeeze()
    numbers = torch.arange(1.0, 17).view(1, 1, 4, 4)
    middle.suptitle("squeeze of one channel of 4x4: four channels of 2x2")
    for axes, values in zip(middle.subplots(1, 5), [numbers[0, 0], *squeeze(numbers)[0][0]], strict=True):
        place = (values - 1) % 2 + 2 * ((values - 1) // 4 % 2)  # in its block of 2x2
        axes.imshow(place, cmap="Pastel1", vmin=0, vmax=8)
        for i, row in enumerate(values.tolist()):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8)
        axes.set(xticks=[], yticks=[])

    image = torch.as_tensor(data.load(options.data, options.data_dir).test[options.image])[:1]
    below.suptitle(
        f"the same for one color channel of a photograph of {image.shape[1]}x{image.shape[2]} pixels"
    )
    channels = squeeze(image[None].float())[0][0]
    for axes, values in zip(below.subplots(1, 5), [image[0], *channels], strict=True):
        axes.imshow(values, cmap="gray", vmin=0, vmax=255)
        axes.set_title("{} x {}".format(*values.shape), fontsize=8)
        axes.set(xticks=[], yticks=[])
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
