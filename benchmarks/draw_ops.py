"""Draws the pictures of ltkernels/README.md with the ops themselves, in seconds on a CPU: `python -m benchmarks.draw_ops`"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle

import ltkernels

FOLDER = Path(__file__).resolve().parents[1] / "ltkernels"
COUNTS = (400, 160, 60, 25, 10)  # rows of five classes on a ring, from head to tail
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")  # Okabe and Ito's
FORMS = ("exponential", "reciprocal", "hinge", "negative_l2")
MARGIN = 2.0


def long_tail() -> tuple[torch.Tensor, torch.Tensor]:
    """points (N, 2), labels (N,)"""
    labels = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    angle = 2 * torch.pi * labels / len(COUNTS) + 1.4
    centres = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    return centres + 0.55 * torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(0)), labels


def grid(half: float, side: int) -> torch.Tensor:
    """(side^2, 2), row by row from the lower left"""
    line = torch.linspace(-half, half, side)
    return torch.cartesian_prod(line, line).flip(1)


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_density(path: Path) -> None:
    """Left: neighbours of one row of the head and one of the tail. Right: log-density and score, a field of queries."""
    points, labels = long_tail()
    half, side, k = 5.0, 160, 16
    bank = ltkernels.Bank(points)
    h = ltkernels.knn_bandwidth(bank, k)
    near = ltkernels.knn(points, bank, k, self_index=True)
    field = ltkernels.knn_kde_grad(grid(half, side), bank, k, bandwidth=h).log_density.reshape(side, side)
    start = grid(half - 0.5, 17)
    score = ltkernels.knn_kde_grad(start, bank, k, bandwidth=h).score
    score = score / score.norm(dim=1, keepdim=True) * 0.42 * score.norm(dim=1, keepdim=True).div(6).clamp(0.35, 1)

    figure, (left, right) = panels(2, 10.5, 5.2)
    for label, (colour, count) in enumerate(zip(COLOURS, COUNTS, strict=True)):
        left.scatter(*points[labels == label].T, s=7, color=colour, linewidths=0, label=f"{count} rows")
    for row in (int((labels == label).nonzero()[0]) for label in (0, 4)):
        left.add_patch(_circle(points[row], near.sqdist[row, -1].sqrt()))
        left.scatter(*points[near.index[row]].T, s=26, facecolors="none", edgecolors="black", linewidths=0.7)
        left.scatter(*points[row], marker="x", color="black", s=45)
    left.legend(loc="upper right", fontsize=8, frameon=False, markerscale=2)
    left.set_title(f"knn, k = {k}: two rows (x), their neighbours (o)\nand the distance to the last of them", fontsize=10)
    line = torch.linspace(-half, half, side)
    image = right.contourf(line, line, field.clamp(min=-12), 24, cmap="viridis")
    figure.colorbar(image, ax=right, label="log p; all below -12 in one colour", shrink=0.85)
    right.quiver(*start.T, *score.T, color="white", angles="xy", scale_units="xy", scale=1, width=0.004)
    right.set_title(f"knn_kde_grad, k = {k}, h = {h:.2f}: log-density and score\narrows: direction, and length up to a limit", fontsize=10)
    for one in (left, right):
        one.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
    figure.savefig(path)


def draw_selection(path: Path) -> None:
    """p_sel of one noisy row of the tail at three noise levels of x_t = scale x_0 + std noise, scale^2 + std^2 = 1."""
    points, labels = long_tail()
    own = int((labels == 4).nonzero()[3])
    noise = torch.tensor([[-0.5, 0.9]])
    figure, axes = panels(3, 11.5, 4.5)
    for one, std in zip(axes, (0.15, 0.5, 0.9), strict=True):
        scale = (1 - std**2) ** 0.5
        x_t = scale * points[own][None] + std * noise
        p = ltkernels.p_sel(x_t, points, scale, std)[0]
        order = p.argsort()
        dots = one.scatter(*points[order].T, c=p[order].clamp(min=1e-6), s=10, cmap="viridis_r", norm=LogNorm(1e-6, 1), linewidths=0)
        one.add_patch(_circle(x_t[0] / scale, std / scale))
        one.scatter(*points[own], marker="+", color="#D55E00", s=90, label="x_0")
        one.scatter(*x_t[0] / scale, marker="x", color="black", s=50, label="x_t / scale")
        shares = torch.zeros(len(COUNTS)).index_add(0, labels, p)
        one.set_title(
            f"std = {std}, scale = {scale:.2f}\np of its own row {p[own]:.3f}, of its class {shares[4]:.3f},\nof the head {shares[0]:.3f}; "
            f"{1 / p.square().sum():.1f} rows in effect (1 / sum p²)",
            fontsize=9,
        )
        one.set(xlim=(-6.5, 6.5), ylim=(-6.5, 6.5), aspect="equal")
    axes[0].legend(loc="lower left", fontsize=8, frameon=False)
    figure.colorbar(dots, ax=axes, label="p_sel, below 1e-6 in one colour", shrink=0.8)
    figure.savefig(path)


def draw_forms(path: Path) -> None:
    """phi(d) as the gradient in the weight of a pair's row, -phi'(d) from the gradient in the row itself."""
    gap = torch.linspace(0.02, 2, 200)  # pairs of rows of one element: d = gap^2
    mu = torch.stack([torch.zeros_like(gap), gap], 1).flatten()[:, None]
    labels, group = torch.tensor([0, 1]).repeat(len(gap)), torch.arange(len(gap)).repeat_interleave(2)
    figure, (left, right) = panels(2, 10, 4)
    for form, colour, style in zip(FORMS, COLOURS, ("-", "--", "-.", ":"), strict=False):
        rows, weight = mu.clone().requires_grad_(), torch.ones(len(mu), requires_grad=True)
        margin = MARGIN if form == "hinge" else None
        loss = ltkernels.pcl_loss(rows, labels, form=form, sample_weight=weight, margin=margin, group=group, reduction="sum")
        rows_grad, weight_grad = torch.autograd.grad(loss, (rows, weight))
        name = f"hinge, margin {MARGIN:g}" if form == "hinge" else form
        left.plot(gap**2, weight_grad[::2], style, color=colour, label=name, linewidth=2)
        right.plot(gap**2, rows_grad[::2, 0] / (4 * gap), style, color=colour, label=name, linewidth=2)
    left.set(title="phi(d)", xlabel="d", ylim=(-2.1, 2.1))
    right.set(title="-phi'(d): how strongly a pair is pushed apart", xlabel="d", ylim=(-0.05, 1.1))
    right.legend(frameon=False, fontsize=9, loc=(0.55, 0.52))
    figure.savefig(path)


def _circle(centre: torch.Tensor, radius: torch.Tensor | float) -> Circle:
    return Circle(centre.tolist(), float(radius), fill=False, color="black", linewidth=0.8, linestyle=":")


def main(folder: Path = FOLDER) -> None:
    draw_density(folder / "density.png")
    draw_selection(folder / "selection.png")
    draw_forms(folder / "pcl_forms.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
