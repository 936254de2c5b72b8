"""Pictures of a run, one function each: every function writes one PNG and returns its path.

Figures are made without pyplot, so nothing global is left behind. Colours are Okabe and Ito's, which colour-blind
readers can tell apart; what matters is marked by shape or position as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .metrics import match_clusters, mean_sd, total_variation

GREY, BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#4d4d4d", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY)
MARKERS = "osD^vP"
Array = Tensor | np.ndarray | Sequence[float]


def latents(
    path: str | Path,
    points: Array,
    log_density: Array,
    score: Array,
    generated: Mapping[str, Array] | None = None,
    *,
    title: str = "Latents, their density and its score",
    max_arrows: int = 60,
) -> Path:
    """Real latents (N, d) coloured by log-density (N,), arrows along the score (N, d); a panel more per generated set.

    d > 2: everything is projected to the first two principal components of `points`, so a score along other directions
    shows as a short arrow.
    """
    points, density, generated = _numpy(points), _numpy(log_density), generated or {}
    density = np.maximum(density, np.min(density, where=np.isfinite(density), initial=np.inf))  # -inf has no colour
    score = np.nan_to_num(_numpy(score), nan=0, posinf=0, neginf=0)  # nor has such a row a score
    to_plane, axis_names = _plane(points)
    xy, arrows = to_plane(points), to_plane(points + score) - to_plane(points)
    size = np.ptp(xy, axis=0).max() or 1.0

    # The frame is that of the real latents: one diverged sample must not shrink everything to a dot.
    low, high = xy.min(0) - 0.15 * size, xy.max(0) + 0.15 * size
    count, tallness = 1 + len(generated), float(np.divide(*(high - low)[::-1]))
    figure, panels = _figure(count, 3.8 * count + 1.6, 3.8 * tallness + 1.5, sharex=True, sharey=True)
    colours = panels[0].scatter(*xy.T, c=density, cmap="viridis", s=14, linewidths=0)
    bar = figure.colorbar(colours, ax=list(panels), location="left", aspect=30)
    bar.set_label("log-density of real latents, leave-one-out (nats)")
    # Evenly spread rows carry the arrows. Their unit is a length of the picture: only direction and ratio can be read.
    rows = _spread(xy, max_arrows)
    length = np.linalg.norm(arrows[rows], axis=1)
    limit = np.quantile(length, 0.9) or 1.0
    shown = arrows[rows] * (0.09 * size / np.maximum(length, limit))[:, None]
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005, "headwidth": 4, "headlength": 4}
    panels[0].quiver(*xy[rows].T, *shown.T, color="black", zorder=3, **style)
    panels[0].set_title(f"real (n = {len(points)})\narrows: towards higher density", fontsize=10)

    for i, (axes, (name, values)) in enumerate(zip(panels[1:], generated.items(), strict=True)):
        drawn = to_plane(_numpy(values))
        outside = len(drawn) - int(((drawn >= low) & (drawn <= high)).all(1).sum())
        axes.scatter(*xy.T, color="0.82", s=14, linewidths=0)
        axes.scatter(*drawn.T, color=COLOURS[i % 5], marker="x", s=13, linewidths=0.8)
        note = f", {outside} outside the frame" if outside else ""
        axes.set_title(f"{name} (n = {len(drawn)}{note})\ngrey: real", fontsize=10)
    for axes in panels:
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=axis_names[0], aspect="equal")
    panels[0].set_ylabel(axis_names[1])
    figure.suptitle(title)
    caption = f"{len(rows)} evenly spread latents carry an arrow; the longest tenth of them is cut to one length"
    return _save(figure, path, caption)


def density_histogram(
    path: str | Path, real: Array, generated: Mapping[str, Array], *, title: str = "How dense the samples lie"
) -> Path:
    """Log-densities of real latents (leave-one-out) and of each named set of generated ones, with medians."""
    groups = {"real": _numpy(real), **{name: _numpy(values) for name, values in generated.items()}}
    finite = {name: values[np.isfinite(values)] for name, values in groups.items()}
    together = np.concatenate(list(finite.values()))
    if not together.size:
        raise ValueError("density_histogram: expected at least one finite log-density; got none")
    # The lowest half per cent would squeeze everything else into a few bars: it goes into the first bin.
    low, high = np.quantile(together, 0.005), together.max()
    bins = np.linspace(low, max(high, low + 1e-6), 41)

    figure, (axes,) = _figure(1, 7.5, 4.5)
    for i, (name, values) in enumerate(finite.items()):
        if not values.size:
            continue
        colour = GREY if i == 0 else COLOURS[(i - 1) % 5]
        weights = np.full(len(values), 100 / len(values))
        label = f"{name} (n = {len(values)}, median {np.median(values):.2f})"
        look = {"histtype": "stepfilled", "alpha": 0.3} if i == 0 else {"histtype": "step", "linewidth": 1.8}
        axes.hist(np.maximum(values, low), bins, weights=weights, color=colour, label=label, **look)
        axes.axvline(np.median(values), color=colour, linestyle="--" if i else ":", linewidth=1.5)
    dropped = sum(len(groups[name]) - len(values) for name, values in finite.items())
    axes.set(title=title, xlabel="log-density under the real latents (nats; right is denser)", ylabel="share of set, %")
    caption = "vertical lines: medians; first bin holds everything below it"
    return _save(figure, path, caption + (f"; {dropped} rows without a finite density left out" if dropped else ""))


def loss_curves(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str] | None = None,
    *,
    x: str = "step",
    title: str = "Training losses",
) -> Path:
    """A panel for every key of log.jsonl that contains "loss" (or for `keys`): rows as logged, and a running mean."""
    if keys is None:
        keys = [key for key in dict.fromkeys(key for row in rows for key in row) if "loss" in key]
    series = {key: [(row[x], row[key]) for row in rows if row.get(key) is not None and x in row] for key in keys}
    series = {key: np.array(values, dtype=float) for key, values in series.items() if values}
    if not series:
        raise ValueError(f"loss_curves: expected rows with {x!r} and a key that contains 'loss'; got {len(rows)} rows")

    columns = 2 if len(series) == 4 else min(len(series), 3)
    figure, panels = _figure(len(series), 4.2 * columns + 0.8, 3.2 * -(-len(series) // columns) + 0.5, columns)
    for axes, (key, values) in zip(panels, series.items(), strict=True):
        window = max(1, len(values) // 20)
        axes.plot(*values.T, color=BLUE, linewidth=0.8, alpha=0.35)
        # The kernel shrinks at both ends; zero padding would draw a dip that is not there.
        ones = np.ones(window)
        mean = np.convolve(values[:, 1], ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
        axes.plot(values[:, 0], mean, color=BLUE, linewidth=2)
        axes.set(title=key.replace("_", " "), xlabel=x)
        if len(values) == 1:
            axes.plot(*values.T, "o", color=BLUE)
    for axes in panels[::columns]:
        axes.set_ylabel("loss")
    figure.suptitle(title)
    counts = ", ".join(f"{len(values)} of {key.replace('_', ' ')}" for key, values in series.items())
    return _save(figure, path, f"thin: as logged; thick: running mean over a twentieth of the rows. Rows: {counts}")


def tiles(path: str | Path, images: Array, *, columns: int = 8) -> Path:
    """Images (N, C, H, W) uint8 side by side, without a frame or a word: many of them are written while a run trains."""
    from PIL import Image

    images = np.asarray(images, dtype=np.uint8).transpose(0, 2, 3, 1)  # (N, H, W, C)
    scale = max(1, 48 // images.shape[1])
    images = np.pad(images.repeat(scale, 1).repeat(scale, 2), ((0, -len(images) % columns), (0, 2), (0, 2), (0, 0)), constant_values=255)
    _, height, width, channels = images.shape
    sheet = images.reshape(-1, columns, height, width, channels).swapaxes(1, 2).reshape(-1, columns * width, channels)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(path)
    return Path(path)


def transfer(path: str | Path, counted: Mapping[str, Any], *, title: str = "Rows with another image's target") -> Path:
    """Share of rows that moved, over the time, as counted while training: `counted` is `transfer` of metrics.json (Fig. 7)."""
    middle = [(low + high) / 2 for low, high in zip(counted["edges"][:-1], counted["edges"][1:], strict=True)]
    points = np.array([(t, share) for t, share in zip(middle, counted["share"], strict=True) if share is not None])
    figure, (axes,) = _figure(1, 6.0, 3.6)
    axes.plot(*points.reshape(-1, 2).T, "o-", color=BLUE, linewidth=2, markersize=4)
    axes.set(title=title, xlabel="t", ylabel="share of rows", ylim=(-0.02, 1.02), xlim=(0, counted["edges"][-1]))
    return _save(figure, path, f"{sum(counted['rows']):.0f} rows in {len(middle)} bins of t, over all steps of training")


def shift_against_noise(path: str | Path, steps: Mapping[str, Sequence[float]], *, title: str = "Guidance in every reverse step") -> Path:
    """Mean norms `shift` and `noise` of the steps that start at times `t`, and their ratio, but for the last step, which has none."""
    noisy = np.array(steps["noise"]) > 0
    t, shift, noise = (np.array(steps[name])[noisy] for name in ("t", "shift", "noise"))
    figure, (norms, ratio) = _figure(2, 9.5, 3.8)
    norms.plot(t, noise, color=GREY, linewidth=2, label="noise")
    norms.plot(t, shift, color=BLUE, linewidth=2, linestyle="--", label="shift of the mean")
    norms.set(title="norm", xlabel="t", yscale="log")
    ratio.plot(t, shift / noise, color=BLUE, linewidth=2)
    ratio.set(title="shift / noise", xlabel="t")
    ratio.set_ylim(bottom=0)
    for axes in (norms, ratio):
        axes.invert_xaxis()  # as the sampling goes
        axes.grid(color="0.9")
    figure.suptitle(title)
    return _save(figure, path, f"mean over the images of each of {len(t)} steps, from noise to image")


def comparison(
    path: str | Path,
    table: Mapping[str, Mapping[str, Sequence[float | None]]],
    *,
    title: str = "Methods compared",
    unit: str = "",
) -> Path:
    """table[method][figure] = one value a seed: a panel per figure, a row per method (mean, sd, seeds)."""
    methods, figures = list(table), list(dict.fromkeys(key for row in table.values() for key in row))
    if not figures:
        raise ValueError("comparison: expected table[method][figure] = values; got no values")
    figure, panels = _figure(len(figures), 2.3 * len(figures) + 1.8, 0.42 * len(methods) + 1.7, sharey=True)
    seeds = set()
    for axes, key in zip(panels, figures, strict=True):
        for row, method in enumerate(methods):
            values = [value for value in table[method].get(key, ()) if value is not None]
            if not values:
                axes.text(0.5, row, "none", transform=axes.get_yaxis_transform(), ha="center", va="center", color=GREY)
                continue
            seeds.add(len(values))
            mean, sd = mean_sd(values)
            axes.plot(values, np.full(len(values), row), "|", color=GREY, markersize=9, alpha=0.7)
            axes.errorbar(mean, row, xerr=sd, fmt="o", color=BLUE, capsize=4, linewidth=2, markersize=6)
            axes.annotate(f"{mean:.3f}", (mean, row), (0, 7), textcoords="offset points", ha="center", size=8)
        axes.set(title=key.replace("_", " "), xlabel=unit)
        axes.grid(axis="x", color="0.9")
        axes.margins(x=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.4, -0.7)  # first method on top
    for axes in panels[1:]:
        axes.tick_params(axis="y", length=0)
    figure.suptitle(title)
    count = " or ".join(str(n) for n in sorted(seeds)) or "0"
    caption = (
        f"dot and bar: mean and standard deviation over {count} seeds; ticks: single seeds; panels differ in scale"
    )
    return _save(figure, path, caption)


def class_mass(
    path: str | Path,
    truth: Array,
    shares: Mapping[str, Array],
    *,
    title: str = "Which classes the samples fall into",
) -> Path:
    """Share of generated mass per class against the true share (C,), head first; shares are (C,) or (seeds, C).

    TV in the legend is the total variation of the mean shares to the truth: the mass that lies in the wrong class.
    """
    truth = _numpy(truth)
    order = np.argsort(-truth, kind="stable")
    position, width = np.arange(len(truth)), 0.8 / max(len(shares), 1)
    figure, (axes,) = _figure(1, min(max(6.0, 0.75 * len(truth) + 1), 16.0), 4.2)
    seeds = 0
    for i, (name, values) in enumerate(shares.items()):
        values = np.atleast_2d(_numpy(values))
        if values.shape[1] != len(truth):
            raise ValueError(f"class_mass: expected {len(truth)} shares for {name!r}; got {values.shape[1]}")
        seeds = max(seeds, len(values))
        mean = 100 * values.mean(0)[order]
        sd = 100 * values.std(0, ddof=1)[order] if len(values) > 1 else None
        label = f"{name} (TV {total_variation(values.mean(0), truth):.3f})"
        where = position - 0.4 + width * (i + 0.5)
        axes.bar(where, mean, 0.92 * width, yerr=sd, color=COLOURS[i % 5], label=label, error_kw={"linewidth": 1})
    axes.hlines(100 * truth[order], position - 0.44, position + 0.44, color="black", linewidth=2, label="truth")
    every = -(-len(truth) // 25)  # no room for more class ids
    axes.set_xticks(position[::every], [str(c) for c in order[::every]])
    axes.set(title=title, xlabel="class, by falling true share (head to tail)", ylabel="share of mass (%)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    spread = f"; bars and whiskers: mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    return _save(figure, path, f"{len(truth)} classes; TV: mass in the wrong class (total variation){spread}")


def assignments(path: str | Path, embedding: Array, label: Array, truth: Array, *, at_most: int = 1000, seed: int = 0) -> Path:
    """Assignment embeddings (N, d) in the plane by t-SNE, coloured by cluster and by class; evenly chosen rows where there are more."""
    from sklearn.manifold import TSNE

    z, label, truth = _numpy(embedding), _numpy(label).astype(int), _numpy(truth).astype(int)
    rows = np.unique(np.linspace(0, len(z) - 1, min(len(z), at_most)).astype(int))
    perplexity = min(30.0, (len(rows) - 1) / 3)
    if len(rows) > 3 and np.ptp(z[rows], axis=0).max() > 0:
        xy = TSNE(init="pca", perplexity=perplexity, random_state=seed, max_iter=500).fit_transform(z[rows])
    else:  # too few points, or one: nothing to embed
        xy = np.zeros((len(rows), 2))
    figure, panels = _figure(2, 10.5, 5.2, sharex=True, sharey=True)
    for axes, name, values in zip(panels, ("cluster", "class"), (label[rows], truth[rows]), strict=True):
        colours = axes.scatter(*xy.T, c=values, cmap="tab10" if values.max() < 10 else "nipy_spectral", s=12, linewidths=0)
        figure.colorbar(colours, ax=axes, aspect=30).set_label(name)
        axes.set(title=f"coloured by {name}", xticks=[], yticks=[])
    figure.suptitle("Assignment embeddings")
    return _save(figure, path, f"t-SNE of the mean embedding of {len(rows)} of {len(z)} rows; distances between groups say nothing")


def confusion(path: str | Path, label: Array, truth: Array) -> Path:
    """Rows of every class (down) by the class that their cluster was matched to (across), in per cent of the class."""
    label, truth = _numpy(label).astype(int), _numpy(truth).astype(int)
    matched = match_clusters(label, truth)[label]
    size = max(truth.max(), matched.max()) + 1
    together = np.zeros((size, size))
    np.add.at(together, (truth, matched), 1)
    share = 100 * together / np.maximum(together.sum(1, keepdims=True), 1)
    side = min(max(4.5, 0.5 * size + 1.5), 14.0)
    figure, (axes,) = _figure(1, side + 1, side)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, aspect=30).set_label("% of class")
    for row, column in zip(*np.nonzero(together), strict=True) if size <= 20 else ():
        colour = "white" if share[row, column] > 60 else "black"
        axes.text(column, row, f"{together[row, column]:.0f}", ha="center", va="center", size=7, color=colour)
    if size <= 20:
        axes.set(xticks=range(size), yticks=range(size))
    accuracy = np.trace(together) / together.sum()
    axes.set(title=f"Clusters matched to classes, ACC {accuracy:.3f}", xlabel="class of the matched cluster", ylabel="class")
    return _save(figure, path, f"n = {len(truth)}; numbers: rows; matching: Hungarian, one for all")


def averaging(path: str | Path, samples: Mapping[str, Any], *, over: str = "choices of samples") -> Path:
    """ACC against the number of averaged assignments: samples[name] = a list of ACCs, of several `over`, for every samples["count"]."""
    figure, (axes,) = _figure(1, 6.5, 4.2)
    for i, (name, values) in enumerate((name, values) for name, values in samples.items() if name != "count"):
        mean, sd = np.array([mean_sd(row) for row in values]).T
        axes.errorbar(samples["count"], mean, yerr=sd, color=COLOURS[i], marker=MARKERS[i], capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(samples["count"], [str(count) for count in samples["count"]])
    axes.set(title="ACC against averaged assignments", xlabel="assignments averaged", ylabel="ACC")
    axes.grid(color="0.9")
    return _save(figure, path, f"mean and standard deviation over {len(values[0])} {over}")


def sweep(path: str | Path, panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], *, title: str, unit: str = "ACC") -> Path:
    """panels[option][line][value of the option] = one figure a seed: a panel an option, mean and standard deviation."""
    figure, drawn = _figure(len(panels), 4.6 * len(panels) + 0.8, 4.0, sharey=True)
    for axes, (option, lines) in zip(drawn, panels.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            mean, sd = np.array([mean_sd(values) for values in points.values()]).T
            axes.errorbar(list(points), mean, yerr=sd, color=COLOURS[i], marker=MARKERS[i], capsize=3, label=name)
        ticks = sorted({value for points in lines.values() for value in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        axes.set(xlabel=option)
        axes.grid(color="0.9")
    drawn[0].set_ylabel(unit)
    figure.suptitle(title)
    seeds = {len(values) for lines in panels.values() for points in lines.values() for values in points.values()}
    return _save(figure, path, f"mean and standard deviation over {' or '.join(map(str, sorted(seeds)))} seeds")


def sample_grid(
    path: str | Path,
    rows: Sequence[tuple[int, Array, Array]],
    counts: Sequence[int],
    groups: Sequence[Sequence[int]],
    *,
    title: str = "Samples, and beside each its nearest training image",
) -> Path:
    """A row for each (class, samples (K, C, H, W) uint8, training images like them): a sample, its neighbour in a frame, and so on.

    Class -1 has no name. Class c has counts[c] training images; `groups` are the classes of head, med and tail, between which is a gap.
    """
    rows = [(label, _rgb(samples), _rgb(nearest)) for label, samples, nearest in rows]
    size, columns = rows[0][1].shape[1], max(len(samples) for _, samples, _ in rows)
    scale = max(1, 96 // size)
    edge, frame = size * scale, 5
    cell, gap = edge + 2 * frame, 24  # a cell has room for the frame; a pair is two cells
    group = {label: i for i, classes in enumerate(groups) for label in classes}
    of_row = [group.get(label, -1) for label, _, _ in rows]
    tops = np.cumsum([0] + [cell + (28 if a != b else 6) for a, b in zip(of_row[:-1], of_row[1:], strict=True)])
    sheet = np.full((tops[-1] + cell, columns * (2 * cell + gap) - gap, 3), 255, np.uint8)
    for top, (_, samples, nearest) in zip(tops, rows, strict=True):
        for i, (sample, near) in enumerate(zip(samples, nearest, strict=True)):
            left = i * (2 * cell + gap)
            sheet[top : top + cell, left + cell : left + 2 * cell] = (0xE6, 0x9F, 0x00)  # ORANGE
            for at, image in ((left, sample), (left + cell, near)):
                big = image.repeat(scale, 0).repeat(scale, 1)
                sheet[top + frame : top + frame + edge, at + frame : at + frame + edge] = big

    inches = 9.0 / max(sheet.shape[1], 500)
    figure, (axes,) = _figure(1, sheet.shape[1] * inches + 1.6, sheet.shape[0] * inches + 1.0)
    axes.imshow(sheet, interpolation="antialiased")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    middles = tops + cell / 2
    axes.set_yticks(middles, ["" if label < 0 else f"class {label}  ({counts[label]})" for label, _, _ in rows])
    for i, name in enumerate(("head", "medium", "tail")):
        own = [middle for middle, of in zip(middles, of_row, strict=True) if of == i]
        if own:
            place = (1.01, 1 - np.mean(own) / len(sheet))
            axes.text(*place, name, transform=axes.transAxes, rotation=270, ha="left", va="center", color=GREY)
    axes.set_title(title)
    caption = f"{sum(len(samples) for _, samples, _ in rows)} samples; framed: the training image nearest in pixels"
    return _save(figure, path, caption + ("; brackets: training images of the class" if max(of_row) >= 0 else ""))


def class_bars(
    path: str | Path,
    table: Mapping[str, Sequence[Sequence[float | None]]],
    counts: Sequence[int],
    groups: Sequence[Sequence[int]],
    *,
    title: str = "FID class by class",
    ylabel: str = "FID",
    caption: str = "",
) -> Path:
    """table[name] = for every seed one value a class, None for none: bars from head to tail, mean and standard deviation over the seeds."""
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    figure, (axes,) = _figure(1, min(max(6.5, 0.3 * len(order) * len(table) + 3), 16.0), 4.0)
    position, width = np.arange(len(order)), 0.82 / len(table)
    for i, (name, seeds) in enumerate(table.items()):
        values = [[seed[label] for seed in seeds if seed[label] is not None] for label in order]
        mean, sd = np.array([mean_sd(own) if own else (np.nan, np.nan) for own in values]).T
        where = position - 0.41 + width * (i + 0.5)
        error = sd if len(seeds) > 1 else None
        axes.bar(where, mean, 0.92 * width, yerr=error, color=COLOURS[i % 6], label=name or None, error_kw={"linewidth": 1})
        for place in where[np.isnan(mean)]:
            axes.annotate("none", (place, 0), (0, 3), textcoords="offset points", ha="center", size=7, rotation=90, color=GREY)
    start = 0
    for i, name in enumerate(("head", "medium", "tail")):
        size = sum(label in set(groups[i]) for label in order)
        if size:
            axes.text(start + (size - 1) / 2, 1.0, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=GREY)
        start += size
        if size and start < len(order):
            axes.axvline(start - 0.5, color="0.8", linewidth=1, zorder=0)
    every = -(-len(order) // 20)  # no room for more
    axes.set_xticks(position[::every], [f"{label}\n({counts[label]})" for label in order[::every]])
    axes.set(xlabel="class (training images), head to tail", ylabel=ylabel, xlim=(-0.6, len(order) - 0.4))
    axes.set_title(title, pad=18)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    seeds = max(len(own) for own in table.values())
    spread = f"bars and whiskers: mean and standard deviation over {seeds} seeds; " if seeds > 1 else ""
    return _save(figure, path, f"{spread}{caption}")


def mixing_weights(path: str | Path, summary: Mapping[str, Any]) -> Path:
    """Weights (noise levels, priors, targets) of a batch's images in the score of image number `own`, as `figures t2h` writes them."""
    weights, own = np.array(summary["weights"]), summary["own"]
    figure, panels = _figure(len(weights), 4.4 * len(weights) + 0.6, 3.9, sharey=True)
    position, width = np.arange(weights.shape[2]), 0.8 / weights.shape[1]
    for axes, t, levels in zip(panels, summary["t"], weights, strict=True):
        for i, (beta, values) in enumerate(zip(summary["betas"], levels, strict=True)):
            axes.bar(position - 0.4 + width * (i + 0.5), values, 0.92 * width, color=COLOURS[i], label=f"β = {beta:g}".replace("-", "−"))
        axes.axvspan(own - 0.5, own + 0.5, color="0.93", zorder=0)
        axes.set_xticks(position, [f"{c}\n{n}" for c, n in zip(summary["classes"], summary["counts"], strict=True)], size=8)
        axes.set(title=f"t = {t}", xlabel="target's class; training images of it", ylim=(0, 1))
    panels[0].set_ylabel("mean mixing weight")
    figure.suptitle(f"Whose score an image of class {summary['classes'][own]} learns, {summary['dataset']}")
    caption = f"one image of each class; grey: the image itself; prior q(y)^β; mean over {summary['draws']} noises"
    return _save(figure, path, caption)


def score_fields(path: str | Path, panels: Sequence[Mapping[str, Any]], *, columns: int) -> Path:
    """Score fields in the plane: direction at places `at`, head's probability behind, and the height of the line where it is half.

    Each panel: title, side (the frame is +-side), samples (N, 2) of which the first `head` are the head's, at (Q, 2), score (Q, 2),
    probability (P, P) by x and y, line.
    """
    rows = -(-len(panels) // columns)
    figure, drawn = _figure(len(panels), 3.6 * columns + 1.2, 3.6 * rows + 1.2, columns, sharex=True, sharey=True)
    for axes, panel in zip(drawn, panels, strict=True):
        side, (low, high) = panel["side"], (-panel["side"], panel["side"])
        image = axes.imshow(
            _numpy(panel["probability"]).T, cmap="RdBu_r", vmin=0, vmax=1, extent=(low, high, low, high), origin="lower", alpha=0.45,
            interpolation="bilinear",
        )  # fmt: skip
        samples, score = _numpy(panel["samples"]), _numpy(panel["score"])
        for colour, marker, own in ((VERMILION, "o", samples[: panel["head"]]), (BLUE, "^", samples[panel["head"] :])):
            axes.scatter(*own[:: max(len(own) // 150, 1)].T, s=7, color=colour, marker=marker, linewidths=0)  # more would be a blot
        unit = score / np.maximum(np.linalg.norm(score, axis=1, keepdims=True), 1e-12)
        axes.quiver(*_numpy(panel["at"]).T, *unit.T, color="black", pivot="middle", scale=26, width=0.004, headwidth=4)
        if abs(panel["line"]) < side:
            axes.axhline(panel["line"], color="black", linestyle="--", linewidth=1.5, label="head and tail equally likely")
        axes.set(title=panel["title"], xlim=(low, high), ylim=(low, high), aspect="equal")
    figure.colorbar(image, ax=drawn, aspect=40, location="right").set_label("probability of the head")
    figure.suptitle("Score of a toy head (orange dots, above) and tail (blue triangles, below)")
    caption = "arrows: direction of the score of the samples; colour and dashed line: closed form; at most 300 samples drawn"
    return _save(figure, path, caption)


def transfer_curves(path: str | Path, summary: Mapping[str, Any]) -> Path:
    """Transfer probability against t, a panel a gate: mean and standard deviation over batches, as `figures t2h` writes them."""
    figure, panels = _figure(len(summary["curves"]), 4.4 * len(summary["curves"]) + 0.6, 4.0, sharey=True)
    t, colour_of = np.array(summary["t"]), {}
    for axes, (gate, curves) in zip(panels, summary["curves"].items(), strict=True):
        lines = {**curves, **(summary["white"] if axes is panels[0] else {})}
        for name, curve in lines.items():
            white = name not in curves
            colour = colour_of.setdefault(name.removeprefix("white noise, "), COLOURS[len(colour_of) % len(COLOURS)])
            mean, sd = np.array(curve["mean"]), np.array(curve["sd"])
            axes.plot(t, mean, color=colour, linestyle=":" if white else "-", linewidth=1.6, label=name)
            if not white:
                axes.fill_between(t, mean - sd, mean + sd, color=colour, alpha=0.25, linewidth=0)
        axes.axvspan(0.5 * t[-1], 0.8 * t[-1], color="0.94", zorder=0)
        axes.set(title=f"gate {gate}", xlabel="t", ylim=(0, 1.02), xlim=(0, t[-1]))
        axes.grid(color="0.9")
    panels[0].set_ylabel("probability of another image's target")
    figure.suptitle(f"Transfer against diffusion time, {summary['dataset']}, batches: {summary['batch_resample']}")
    caption = (
        f"band: standard deviation over batches; dotted: points N(0, .25 I) in {summary['white_dimension']} dimensions; "
        "grey: where the paper's CIFAR curve rises"
    )
    return _save(figure, path, caption)


def curves(path: str | Path, panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], *, x: str, title: str) -> Path:
    """panels[figure][line][x] = one value a seed, or None: a panel a figure, mean and standard deviation."""
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    figure, drawn = _figure(len(panels), 4.6 * columns + 0.8, 3.4 * -(-len(panels) // columns) + 0.6, columns)
    for axes, (name, lines) in zip(drawn, panels.items(), strict=True):
        for i, (line, points) in enumerate(lines.items()):
            known = {float(where): [value for value in values if value is not None] for where, values in points.items()}
            known = {where: values for where, values in known.items() if values}
            mean, sd = np.array([mean_sd(values) for values in known.values()]).reshape(-1, 2).T
            axes.errorbar(list(known), mean, yerr=sd, color=COLOURS[i], marker=MARKERS[i], capsize=3, label=line)
        axes.set(title=name.replace("_", " "), xlabel=x)
        axes.grid(color="0.9")
    figure.suptitle(title)
    seeds = {len(values) for lines in panels.values() for points in lines.values() for values in points.values()}
    return _save(figure, path, f"mean and standard deviation over {' or '.join(map(str, sorted(seeds)))} seeds")


def landscapes(
    path: str | Path, panels: Sequence[Mapping[str, Any]], *, sides: Sequence[tuple[float, float]], truth: Sequence[float]
) -> Path:
    """Losses over two means, a panel each: title, loss (P, P) by m1 and m2 over `sides`, argmin (m1, m2) or None where there is none."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, drawn = _figure(len(panels), 3.4 * columns + 1.2, 3.6 * rows + 1.2, columns, sharex=True, sharey=True)
    (left, right), (low, high) = sides
    for axes, panel in zip(drawn, panels, strict=True):
        loss = _numpy(panel["loss"]).T  # rows are m2
        above = loss - loss.min()
        levels = above.max() * np.linspace(0, 1, 15) ** 2  # dense where the loss is low
        x, y = np.linspace(left, right, loss.shape[1]), np.linspace(low, high, loss.shape[0])
        axes.contourf(x, y, above, levels, cmap="viridis")
        axes.contour(x, y, above, levels, colors="white", linewidths=0.4)
        axes.plot([max(left, low), min(right, high)], [max(left, low), min(right, high)], ":", color="white", linewidth=1.2)
        axes.plot(*truth, "*", color=ORANGE, markersize=15, markeredgecolor="black", label="truth", linestyle="none")
        if panel["argmin"] is not None:
            axes.plot(*panel["argmin"], "X", color=VERMILION, markersize=8, markeredgecolor="white", label="minimum", linestyle="none")
        else:
            axes.text(0.5, 0.03, "no minimum", transform=axes.transAxes, ha="center", color="white", weight="bold")
        axes.set(title=panel["title"], xlabel="m1", xlim=(left, right), ylim=(low, high))
    for axes in drawn[::columns]:
        axes.set_ylabel("m2")
    figure.suptitle("Loss of two estimated means, most of the weight on the first")
    return _save(figure, path, "colour: loss above the least in the frame, dark is low; dotted: m1 = m2")


# ---- shared ----------------------------------------------------------------------------------------------------------


def _figure(panels: int, width: float, height: float, columns: int = 0, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    columns = columns or panels
    figure = Figure(figsize=(width, height), dpi=130, layout="compressed")
    axes = list(figure.subplots(-(-panels // columns), columns, squeeze=False, **kwargs).flat)
    for unused in axes[panels:]:
        unused.remove()
    for one in axes[:panels]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def _save(figure: Figure, path: str | Path, caption: str) -> Path:
    """Caption and, where the first axes have labels, a legend below everything, where they hide nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    fits = sum(len(label) + 8 for label in labels) < 14 * figure.get_figwidth()
    # The caption is the legend's title: the layout then keeps room for both.
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels) if fits else 1,
        frameon=False,
        fontsize=9,
        title=caption,
        title_fontsize=8,
    )
    legend.get_title().set_color(GREY)
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return path


def _rgb(images: Array) -> np.ndarray:
    """(N, H, W, 3) uint8 of images (N, C, H, W) uint8 with one or three channels."""
    images = np.asarray(images, dtype=np.uint8).transpose(0, 2, 3, 1)
    return np.broadcast_to(images, (*images.shape[:3], 3)) if images.shape[3] == 1 else images


def _numpy(values: Array) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)


def _spread(xy: np.ndarray, at_most: int) -> np.ndarray:
    """Farthest-first rows: they cover the plane evenly where a random choice would crowd the head."""
    rows = [int(np.argmin(((xy - xy.mean(0)) ** 2).sum(1)))]
    distance = ((xy - xy[rows[0]]) ** 2).sum(1)
    while len(rows) < min(at_most, len(xy)) and distance.max() > 0:
        rows.append(int(distance.argmax()))
        distance = np.minimum(distance, ((xy - xy[rows[-1]]) ** 2).sum(1))
    return np.array(rows)


def _plane(points: np.ndarray) -> tuple[Any, tuple[str, str]]:
    """(map of rows to the plane, axis names): two principal components of `points`, or the coordinates if d <= 2."""
    d = points.shape[1]
    if d == 2:
        return lambda z: z, ("latent coordinate 1", "latent coordinate 2")
    if d == 1:
        return lambda z: np.concatenate([z, np.zeros_like(z)], 1), ("latent coordinate", "")
    centre = points.mean(0)
    _, values, directions = np.linalg.svd(points - centre, full_matrices=False)
    part = 100 * values[:2] ** 2 / max((values**2).sum(), 1e-30)
    names = tuple(f"principal component {i + 1} ({part[i]:.0f} % of variance)" for i in range(2))
    return lambda z: (z - centre) @ directions[:2].T, names
