"""Why the inverse of a masked autoregressive flow takes one pass, and a density that such a flow learned.

From a clean clone, after `make setup` (about a minute of one core):

    .venv/bin/python docs/examples/autoregressive.py --out autoregressive.png

The upper row shows a masked network of four features: its units when the third feature is computed, and its weights
by the feature that they are read for. The lower row fits a MAF to a pinwheel.
"""

import argparse

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import fastflow
from fastflow import explore
from fastflow.models import MAF
from fastflow.nn import MaskedAutoregressive, MaskedNetwork

FEATURES, WIDTHS, NOW = 4, (7, 8), 2
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
LIMITS = (-3.2, 3.2), (-3.2, 3.2)


def pinwheel(n):
    """Five arms, standardized roughly."""
    arm = torch.randint(0, 5, (n,)) * (2 * torch.pi / 5)
    radius = (1.6 + 0.55 * torch.randn(n)).abs()
    across = 0.12 * torch.randn(n)
    angle = arm + 0.55 * radius
    return torch.stack(
        [radius * angle.cos() - across * angle.sin(), radius * angle.sin() + across * angle.cos()], 1
    )


def network():
    """A network of one output per feature, and the feature for which each of its units is computed."""
    net = MaskedNetwork(FEATURES, 1, WIDTHS)
    steps = [torch.arange(FEATURES), net.degrees_0, net.degrees_1, torch.arange(FEATURES)]
    masks = []
    for i, (below, above) in enumerate(zip(steps, steps[1:], strict=False)):
        masks.append(above[:, None] >= below + (1 if i == 0 else 0))
    return steps, masks


def units_panel(axes, steps, masks):
    heights = [torch.linspace(0.05, 0.95, len(s)).flip(0) for s in steps]
    now = NOW
    for column, mask in enumerate(masks):
        for above, below in mask.nonzero().tolist():
            if steps[column + 1][above] > now:
                continue
            used = steps[column + 1][above] == now
            axes.plot(
                [column, column + 1],
                [heights[column][below], heights[column + 1][above]],
                color=COLORS[now] if used else "0.85",
                linewidth=1.0 if used else 0.6,
                zorder=1 if used else 0,
            )
    for column, (step, height) in enumerate(zip(steps, heights, strict=True)):
        known = step < now if column == 0 else step <= now
        for s, y, is_known in zip(step.tolist(), height.tolist(), known.tolist(), strict=True):
            fill = "white" if not is_known else COLORS[now] if s == now else "0.75"
            axes.scatter(column, y, s=190, color=fill, edgecolors="black", linewidths=0.8, zorder=2)
            label = f"$x_{s + 1}$" if column == 0 else f"$h_{s + 1}$" if column == 3 else str(s)
            axes.text(column, y, label, ha="center", va="center", fontsize=7, zorder=3)
    axes.scatter(0, heights[0][now], s=190, color="white", edgecolors=COLORS[now], linewidths=2, zorder=2)
    axes.text(0, heights[0][now], f"$x_{now + 1}$", ha="center", va="center", fontsize=7, zorder=3)
    axes.set(xlim=(-0.3, 3.3), ylim=(-0.02, 1.02), yticks=[], xticks=range(4))
    axes.set_xticklabels(["features", "hidden units", "hidden units", "parameters"], fontsize=8)
    axes.set_title(f"units when $x_{now + 1}$ is computed", fontsize=10)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def matrices_panel(figure, steps, masks):
    panels = figure.subplots(1, 3, gridspec_kw={"width_ratios": [m.shape[1] for m in masks]})
    colors = torch.tensor([[0.12, 0.47, 0.71], [1.0, 0.5, 0.05], [0.17, 0.63, 0.17], [0.84, 0.15, 0.16]])
    names = "first", "second", "last"
    for axes, mask, above, name in zip(panels, masks, steps[1:], names, strict=True):
        picture = torch.ones(*mask.shape, 3)
        picture[mask] = colors[above][:, None].expand(*mask.shape, 3)[mask]
        axes.imshow(picture, aspect="equal")
        axes.set_xticks(torch.arange(mask.shape[1]) + 0.5, minor=True)
        axes.set_yticks(torch.arange(mask.shape[0]) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{name} matrix", fontsize=9)
    # the first feature has the bias of the last layer only
    handles = [Patch(color=COLORS[k], label=f"for $x_{k + 1}$") for k in range(1, FEATURES)]
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=8, frameon=False)


def print_counts(features, hidden):
    """Products of one sample in D passes and in one, and the difference of their results."""
    net = MaskedNetwork(features, 2, (hidden, hidden))
    flow = MaskedAutoregressive(net).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        z = torch.randn(100, features, dtype=torch.float64)
        x, _ = flow.inverse(z)
        passes = torch.zeros_like(z)
        for _ in range(features):
            scale_and_shift = net(passes).unflatten(1, (features, 2))
            passes, _ = flow.form.inverse(z, scale_and_shift)
        difference = (x - passes).abs().max().item()
        used = int((net.plan().weights != 0).sum())
    dense = sum(layer.weight.numel() for layer in net.layers)
    print(
        f"{features} features, {hidden} units: {used:,} products of a sample in one pass, "
        f"{features * dense:,} in {features} passes of dense matrices; largest difference of x {difference:.1e}"
    )


def flow_panels(figure, samples, epochs, size):
    x = pinwheel(samples)
    model = MAF(features=2, steps=8, hidden=64, activation="silu")
    print(fastflow.fit(model, x, lr=2e-3, max_epochs=epochs, patience=epochs, schedule="cosine"))
    density, integral = explore.density(model, LIMITS, size)
    print(f"density of the flow: integral {integral:.4f}")
    (left, right), (low, high) = LIMITS
    data, learned, drawn = figure.subplots(1, 3)
    data.scatter(*x[:5000].T, s=1, linewidths=0, color="tab:blue")
    data.set_title("data", fontsize=10)
    extent = (left, right, low, high)
    learned.imshow(density, extent=extent, origin="lower", cmap="magma", interpolation="bilinear")
    learned.set_title("density of MAF", fontsize=10)
    drawn.scatter(*model.sample(5000).T, s=1, linewidths=0, color="tab:blue")
    drawn.set_title("samples", fontsize=10)
    for axes in (data, learned, drawn):
        axes.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/autoregressive.png")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--size", type=int, default=400, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    torch.manual_seed(0)
    figure = Figure(figsize=(9.5, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    left, right = above.subfigures(1, 2, width_ratios=[1, 1.15])
    steps, masks = network()
    units_panel(left.subplots(), steps, masks)
    matrices_panel(right, steps, masks)
    print_counts(64, 512)
    flow_panels(below, options.samples, options.epochs, options.size)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
