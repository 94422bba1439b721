"""A rational-quadratic spline with its knots, its derivative and its density, and a density that a spline flow learned.

From a clean clone, after `make setup` (a minute or two of one core):

    .venv/bin/python docs/examples/splines.py --out splines.png

The upper row shows a spline of five bins on [-3, 3]. The lower row fits a NeuralSplineFlow to a spiral.
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch.distributions import Normal

import fastflow
from fastflow import explore
from fastflow.models import NeuralSplineFlow
from fastflow.ops import spline

BINS, BOUND = 5, 3.0
LIMITS = (-2.0, 2.0), (-2.0, 2.0)


def spiral(n):
    """Two arms around the origin, standardized roughly."""
    turn = 3 * torch.rand(n).sqrt() * torch.pi
    arm = torch.where(torch.rand(n) < 0.5, 1.0, -1.0)
    x = torch.stack([turn.cos(), turn.sin()], 1) * (turn * arm / 5.5).unsqueeze(1)
    return x + 0.06 * torch.randn(n, 2)


def knots(params):
    """x and y of the knots: the ends of the bins, from raw widths and heights."""
    found = []
    for raw in (params[:BINS], params[BINS : 2 * BINS]):
        sizes = 2 * BOUND * (1e-3 + (1 - 1e-3 * BINS) * raw.softmax(0))
        found.append(-BOUND + torch.cat([torch.zeros(1), sizes.cumsum(0)]))
    return found


def spline_panels(figure):
    raw = torch.tensor([0.1, 0.8, -0.6, -0.2, 0.4, 0.3, -0.9, 0.6, 0.9, -0.6, 0.2, -1.2, 1.6, -0.6])
    x = torch.linspace(-4, 4, 1001)
    y, log_slope = spline(x.unsqueeze(1), raw.expand(len(x), -1).contiguous(), bins=BINS, bound=BOUND)
    y, slope = y.squeeze(1), log_slope.exp()
    x_knots, y_knots = knots(raw)
    at_knots, log_slope = spline(
        x_knots[1:-1].unsqueeze(1), raw.expand(BINS - 1, -1).contiguous(), bins=BINS, bound=BOUND
    )
    error = (at_knots.squeeze(1) - y_knots[1:-1]).abs().max().item()
    print(f"knots: the spline passes through them within {error:.1e}")
    function, derivative, density = figure.subplots(1, 3)
    for axes in (function, derivative, density):
        axes.axvspan(-BOUND, BOUND, color="0.95", linewidth=0)
    function.plot(x, y, color="C0")
    function.plot(x, x, color="0.7", linewidth=0.7, linestyle="--")
    function.plot(x_knots, y_knots, "o", color="C3", markersize=4)
    function.set(title="spline y = g(x), its knots", xlabel="x", ylabel="y", aspect="equal")
    derivative.plot(x, slope, color="C2")
    derivative.plot(x_knots[1:-1], log_slope.exp(), "o", color="C3", markersize=4)
    derivative.set(title="derivative dy/dx", xlabel="x", ylim=(0, None))
    p = Normal(0, 1).log_prob(y).exp() * slope
    density.plot(x, Normal(0, 1).log_prob(x).exp(), color="0.6", linestyle="--", label="N(0, 1)")
    density.plot(x, p, color="C1", label="density of x if y ~ N(0, 1)")
    density.set(title="density", xlabel="x", ylim=(0, 1.25 * max(p.max().item(), 0.4)))
    density.legend(fontsize=7, loc="upper left")
    print(f"density of x: integral {torch.trapezoid(p, x).item():.4f} from -4 to 4")


def flow_panels(figure, samples, epochs, size):
    x = spiral(samples)
    model = NeuralSplineFlow(features=2, steps=5, hidden=64)
    print(fastflow.fit(model, x, lr=1e-3, max_epochs=epochs, patience=epochs, schedule="cosine"))
    density, integral = explore.density(model, LIMITS, size)
    print(f"density of the flow: integral {integral:.4f}")
    (left, right), (low, high) = LIMITS
    data, learned, drawn = figure.subplots(1, 3)
    data.scatter(*x[:5000].T, s=1, linewidths=0, color="tab:blue")
    data.set_title("data")
    extent = (left, right, low, high)
    learned.imshow(density, extent=extent, origin="lower", cmap="magma", interpolation="bilinear")
    learned.set_title("density of NeuralSplineFlow")
    drawn.scatter(*model.sample(5000).T, s=1, linewidths=0, color="tab:blue")
    drawn.set_title("samples")
    for axes in (data, learned, drawn):
        axes.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/splines.png")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--size", type=int, default=400, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    torch.manual_seed(0)
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1)
    spline_panels(above)
    flow_panels(below, options.samples, options.epochs, options.size)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
