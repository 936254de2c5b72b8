"""`figures t2h`: the figures and tables of 001 that fit on a small machine, part by part (--parts).

mixing (Fig. 3), field (Fig. 4) and transfer (Fig. 7, left) ask the operators and train nothing. anchor (Table 6), table (Table 1), steps
(Fig. 6) and cut (Fig. 7, right) evaluate images; their runs leave folders and are not run again, one that was cut short goes on from its
checkpoint. Every part writes PART.json and a picture; figures.md holds the text of all parts that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ltkernels

from . import data, evaluate, plots, run_images, toy
from .config import T2HConfig
from .diffusion import Diffusion
from .figures import heading, row
from .figures_runs import Rows, about, note, panels, panels_text, run_all, write_parts
from .loop import generator

PARTS = ("mixing", "field", "transfer", "anchor", "table", "steps", "cut")
GATES = ("full", "t2h", "h2t")
SIZES = (16, 128, 1024)  # K of Fig. 7, beside the whole set
ROWS = 4096  # noisy images at each t and K
NOISY = 128  # of them in one batch, where the batch has so many

BETAS = (0.0, 1.0, -1.0)  # Fig. 3
OWN_WEIGHTS = (0.9, 0.5, 0.2)  # what the image itself has at the noise levels that Fig. 3 is drawn at, beta = 0
SIGMAS = (1.0, 2.0, 3.0)  # Fig. 4
SETS = {"long-tailed": (10_000, 100), "balanced": (10_000, 10_000)}  # head and tail samples of Fig. 4
WHITE = (3072, 0.5)  # dimension and standard deviation of Fig. 7's reference curve: CIFAR's size and about its spread

GATED = {"batch_resample": "balanced", "transfer_beta": None, "transfer_cut_time": None, "transfer_estimator": "sample"}
METHODS = {  # row of Table 1: method, what makes it that row
    "F": ("ddpm", {"batch_resample": "none"}),
    "G": ("ddpm", {"batch_resample": "balanced"}),
    "H": ("t2h", {**GATED, "transfer_mode": "h2t"}),
    "I": ("t2h", {**GATED, "transfer_mode": "full"}),
    "J": ("t2h", {**GATED, "transfer_mode": "t2h"}),
    "CBDM": ("cbdm", {"batch_resample": "none"}),
}
NAMES = {
    "F": "F: DDPM", "G": "G: F + Batch-Resample", "H": "H: G + H2T", "I": "I: G + Full", "J": "J: G + T2H", "CBDM": "CBDM",
}  # fmt: skip
STEP_ROWS = ("F", "G", "J", "CBDM")
STEP_FACTORS = (0.2, 1.0, 3.0)  # of --steps
CUT_TIMES = (0.2, 0.4, 0.6, 0.8)  # of T; 0 is row G and 1 is row J
SWEEP_SEEDS = 2  # of the first seeds: a sweep shows a trend, the table compares methods


def add_options(parser: argparse.ArgumentParser) -> None:
    what = f"of {', '.join(PARTS)}; default: all"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=what)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="K of part transfer; the whole set is always added")
    parser.add_argument("--rows", type=int, default=ROWS, help="noisy images at each t and K of part transfer")


def figures(
    settings: T2HConfig, preset: T2HConfig, seeds: Sequence[int], folder: Path, *,
    parts: Sequence[str] = PARTS, sizes: Sequence[int] = SIZES, rows: int = ROWS,
) -> str:  # fmt: skip
    """Make the chosen parts; returns their text as markdown."""
    if min(*sizes, rows) < 1:
        raise ValueError(f"figures t2h: --sizes and --rows must be >= 1; got {', '.join(map(str, sizes))} and {rows}")
    table = Rows("figures t2h", METHODS, NAMES, settings, preset, folder)
    make = {
        "mixing": lambda: mixing(settings, folder),
        "field": lambda: field(settings, folder),
        "transfer": lambda: transfer(settings, folder, sizes, rows),
        "anchor": lambda: anchor(settings, seeds, folder),
        "table": lambda: table.table("table", list(METHODS), seeds, f"Rows of Table 1 on {settings.dataset}"),
        "steps": lambda: steps(table, seeds[:SWEEP_SEEDS]),
        "cut": lambda: cut(table, seeds[:SWEEP_SEEDS]),
    }
    texts = {
        "mixing": mixing_text, "field": field_text, "transfer": transfer_text, "anchor": anchor_text, "table": table.table_text,
        "steps": sweep_text, "cut": sweep_text,
    }  # fmt: skip
    return write_parts(parts, make, texts, folder)


# ---- mixing: Fig. 3 --------------------------------------------------------------------------------------------------


def mixing(settings: T2HConfig, folder: Path, targets: int = 10, draws: int = 512) -> dict:
    """Mean weight of each image of a reference batch in the score of one of them, a tail image, with the priors q(y)^beta of Eq. 7.

    The batch holds one image of each class, head first; of more than `targets` classes, evenly spaced ones.
    """
    dataset = run_images.load("figures t2h", settings)
    order = [c for c in np.argsort([-count for count in dataset.counts], kind="stable").tolist() if dataset.counts[c]]
    classes = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, targets).round().astype(int))]
    own = max(len(classes) - 2, 0)  # of ten, the image with ID 8
    clean = torch.stack([dataset.images[dataset.labels == c][0] for c in classes]).flatten(1).to(settings.device)
    counts = torch.tensor([dataset.counts[c] for c in classes])
    log_q = (counts / sum(dataset.counts)).log().to(clean)
    eps = torch.randn(draws, clean.shape[1], generator=generator(settings.seed, "mixing")).to(clean)

    times = times_of(settings, 100)
    weights = []
    for scale, std in coefficients(settings, times):
        x_t = scale * clean[own] + std * eps
        weights.append(torch.stack([ltkernels.p_sel(x_t, clean, scale, std, log_prior=beta * log_q).mean(0) for beta in BETAS]).cpu())
    weights = torch.stack(weights)  # (times, betas, targets)
    shown = [int((weights[:, 0, own] - level).abs().argmin()) for level in OWN_WEIGHTS]
    summary = {
        "dataset": dataset.name, "classes": classes, "counts": counts.tolist(), "own": own, "betas": list(BETAS),
        "t": [times[i] for i in shown], "weights": weights[shown].tolist(), "draws": draws,
    }  # fmt: skip
    plots.mixing_weights(folder / "mixing.png", summary)
    return summary


def mixing_text(summary: dict) -> str:
    own, lines = summary["own"], []
    title = f"mixing weights of an image of class {summary['classes'][own]}, {summary['dataset']}"
    lines += heading(title, "the image itself", "more frequent classes", "rarer classes")
    for t, betas in zip(summary["t"], summary["weights"], strict=True):
        for beta, weights in zip(summary["betas"], betas, strict=True):
            parts = weights[own], sum(weights[:own]), sum(weights[own + 1 :])
            lines.append(row(f"t = {t}, beta = {beta:g}", [[part] for part in parts]))
    return "\n".join(lines) + "\n"


# ---- field: Fig. 4 ---------------------------------------------------------------------------------------------------


def field(settings: T2HConfig, folder: Path, side: float = 6.5, arrows: int = 17, pixels: int = 81) -> dict:
    """Scores of the samples of appendix J, long-tailed and balanced, at three noise levels; in closed form the head's probability and the
    line where it is half."""
    grid, fine = (torch.cartesian_prod(*[torch.linspace(-half, half, n)] * 2) for half, n in ((0.94 * side, arrows), (side, pixels)))
    places = torch.tensor([[0.0, 0.0], toy.CENTRES[1].tolist()])  # between the classes, and where the tail is
    panels, figures = [], {}
    for name, (head, tail) in SETS.items():
        samples, ratio = toy.gaussian_samples(head, tail, generator(settings.seed, "field", name)), head / tail
        for sigma in SIGMAS:
            _, probability = toy.two_gaussians(fine, sigma, ratio)
            exact, at_places = toy.two_gaussians(places, sigma, ratio)
            panels.append({
                "title": f"{name}, σ = {sigma:g}", "samples": samples, "head": head, "line": toy.equal_line(sigma, ratio),
                "at": grid, "score": toy.sample_score(grid, samples, sigma), "probability": probability.view(pixels, pixels), "side": side,
            })  # fmt: skip
            figures[f"{name}, sigma = {sigma:g}"] = {
                "score_y_at_0": float(exact[0, 1]), "of_samples": float(toy.sample_score(places, samples, sigma)[0, 1]),
                "head_at_tail_centre": float(at_places[1]), "equal_line": toy.equal_line(sigma, ratio),
            }  # fmt: skip
    plots.score_fields(folder / "field.png", panels, columns=len(SIGMAS))
    return {"samples": SETS, "panels": figures}


def field_text(summary: dict) -> str:
    lines = heading("toy of appendix J", "upward score at (0, 0)", "of the samples", "head's share at the tail's centre", "equal at y =")
    return "\n".join([*lines, *(row(name, [[value] for value in own.values()]) for name, own in summary["panels"].items())]) + "\n"


# ---- transfer: Fig. 7, left ------------------------------------------------------------------------------------------


def transfer(settings: T2HConfig, folder: Path, sizes: Sequence[int], rows: int) -> dict:
    """Probability that a target moves to another image, against t: reference batches of K images, and the whole set."""
    dataset = run_images.load("figures t2h", settings)
    x, y = dataset.images.flatten(1).to(settings.device), dataset.labels.to(settings.device)
    q, everything = torch.tensor(dataset.counts, device=x.device), torch.arange(len(x), device=x.device)
    batches = {f"K = {size}": size for size in sizes if size < len(x)} | {f"whole set, {len(x)}": None}
    times = times_of(settings, 40)
    noise = coefficients(settings, times)
    curves: dict[str, dict[str, dict]] = {gate: {} for gate in GATES}
    with tqdm(total=len(batches) + len(sizes), desc="transfer", disable=not settings.progress) as bar:
        for name, size in batches.items():
            rng, count = generator(settings.seed, "transfer", name, device=x.device), min(NOISY, size or NOISY)
            shares = []
            for number in range(-(-rows // count)):
                chosen = data.batch_of_rows(y, settings.batch_resample, size or count, number, settings.seed, rng)
                if size is None:
                    reference, source, own = x, everything, chosen
                else:
                    reference, source, own = x[chosen], chosen, torch.arange(count, device=x.device)
                x0 = x[source[own]]
                shares.append([moved(x0, reference, source, q[y[source]], own, *level, rng) for level in noise])
            for gate, values in zip(GATES, np.moveaxis(np.array(shares), 2, 0), strict=True):
                curves[gate][name] = over_batches(values)
            bar.update()
        white = {}
        for size in sizes:
            white[f"white noise, K = {size}"] = white_curve(size, rows, noise, settings.seed)
            bar.update()
    summary = {
        "dataset": dataset.name, "batch_resample": settings.batch_resample, "rows": rows, "t": times, "curves": curves, "white": white,
        "white_dimension": WHITE[0],
    }  # fmt: skip
    plots.transfer_curves(folder / "transfer.png", summary)
    return summary


def moved(
    x0: Tensor, reference: Tensor, source: Tensor, q: Tensor, own: Tensor, scale: float, std: float, rng: torch.Generator
) -> list[float]:
    """Probability, for each gate of GATES, that the target of a noisy x0 (B, D) becomes another image of the reference (K, D).

    Its rows are the images `source` (K,) with class counts q (K,); x0 are its rows `own` (B,). Another copy of an image is no other image.
    The mean over the draws of `score_select` is known, so nothing is drawn but the noise.
    """
    x_t = scale * x0 + std * torch.randn(x0.shape, generator=rng, device=x0.device, dtype=x0.dtype)
    p = ltkernels.p_sel(x_t, reference, scale, std)
    p = p * (source[own][:, None] != source)
    passes = {"t2h": q >= q[own][:, None], "h2t": q <= q[own][:, None], "full": torch.ones((), dtype=torch.bool, device=p.device)}
    return [float((p * passes[gate]).sum(1).mean()) for gate in GATES]


def white_curve(size: int, rows: int, noise: Sequence[tuple[float, float]], seed: int) -> dict:
    """The same for fresh points N(0, .25 I), for which all gates are one."""
    rng, draws, count = generator(seed, "white", size), np.random.default_rng([seed, size]), min(NOISY, size)
    own, source, q = torch.arange(count), torch.arange(size), torch.ones(size)
    shares = []
    for _ in range(-(-rows // count)):
        points = toy.white_points(size, *WHITE, draws)
        shares.append([moved(points[own], points, source, q, own, *level, rng)[0] for level in noise])
    return over_batches(np.array(shares))


def over_batches(values: np.ndarray) -> dict:
    """(batches, times): what is kept of them."""
    return {"mean": values.mean(0).tolist(), "sd": values.std(0, ddof=len(values) > 1).tolist(), "batches": len(values)}


def transfer_text(summary: dict) -> str:
    marks = [i for i, t in enumerate(summary["t"]) if t * 10 % summary["t"][-1] == 0]
    title = f"transfer probability, {summary['dataset']}, batches: {summary['batch_resample']}"
    lines = heading(title, *(f"t = {summary['t'][i]}" for i in marks))
    for gate, curves in {**summary["curves"], "any gate": summary["white"]}.items():
        lines += [row(f"{gate}, {name}", [[curve["mean"][i]] for i in marks]) for name, curve in curves.items()]
    return "\n".join(lines) + "\n"


def times_of(settings: T2HConfig, count: int) -> list[int]:
    """Evenly spaced times up to T."""
    return sorted({max(round(settings.timesteps * i / count), 1) for i in range(1, count + 1)})


def coefficients(settings: T2HConfig, times: Sequence[int]) -> list[tuple[float, float]]:
    """(scale, std) of x_t = scale x0 + std noise."""
    diffusion = Diffusion(settings.timesteps, settings.beta_start, settings.beta_end)
    pairs = diffusion.coefficients(torch.tensor(times), torch.zeros((), dtype=torch.float64))
    return list(zip(*(values.tolist() for values in pairs), strict=True))


# ---- anchor: Table 6 -------------------------------------------------------------------------------------------------


def anchor(settings: T2HConfig, seeds: Sequence[int], folder: Path) -> dict:
    """The long-tailed images themselves in place of generated ones, one choice of rows a seed."""
    reference = data.balanced_reference(settings.dataset, root=settings.root, image_size=settings.image_size)
    found = []
    for seed in seeds:
        dataset = run_images.load("figures t2h", dataclasses.replace(settings, seed=seed))
        found.append(evaluate.real_data_anchor(dataset, reference, settings))
    about = {key: found[0][key] for key in ("features", "reference")}
    return {"dataset": settings.dataset, "seeds": list(seeds), **about, **{key: [one[key] for one in found] for key in ("n", "fid", "is")}}


def anchor_text(summary: dict) -> str:
    lines = heading(f"real images, {summary['dataset']}, features: {summary['features']}, reference: {summary['reference']}", "FID", "IS")
    return "\n".join([*lines, row(f"long-tailed, n = {summary['n'][0]}", [summary["fid"], summary["is"]])]) + "\n"


# ---- table, steps, cut: runs -----------------------------------------------------------------------------------------


def steps(rows: Rows, seeds: Sequence[int]) -> dict:
    """Fig. 6: rows of the table after fewer and after more steps. A longer run starts as a shorter one, so a line is one training."""
    settings = rows.settings
    points = {NAMES[name]: {round(settings.steps * factor): (name, {}) for factor in STEP_FACTORS} for name in STEP_ROWS}
    for own in points.values():
        for count, (name, _) in own.items():
            own[count] = (name, {} if count == settings.steps else {"suffix": f"-steps{count}", "steps": count})
    summary = sweep("steps", points, rows, seeds)
    plots.curves(rows.folder / "steps.png", summary["panels"], x="training steps", title=f"Robustness over training, {settings.dataset}")
    return summary


def cut(rows: Rows, seeds: Sequence[int]) -> dict:
    """Fig. 7, right: T2H below a time only. 0 is row G, T is row J."""
    settings = rows.settings
    points = {0: ("G", {}), settings.timesteps: ("J", {})}
    for share in CUT_TIMES:
        time = round(share * settings.timesteps)
        points[time] = ("J", {"suffix": f"-cut{time}", "transfer_cut_time": time})
    summary = sweep("cut", {"T2H below the cut time": dict(sorted(points.items()))}, rows, seeds)
    plots.curves(rows.folder / "cut.png", summary["panels"], x="cut time t", title=f"Transfer below a cut time only, {settings.dataset}")
    return summary


def sweep(part: str, points: dict, rows: Rows, seeds: Sequence[int]) -> dict:
    """The summary of points[line][x] = (row, options of `Rows.run`)."""
    jobs = [
        (f"{line}, {x}", seed, lambda one=one, seed=seed: rows.run(one[0], seed, **one[1]))
        for seed in seeds for line, own in points.items() for x, one in own.items()
    ]  # fmt: skip
    results = run_all(rows.command, part, jobs, rows.settings.progress)
    figures = panels(results, points, seeds, ("fid", "fid_head", "fid_tail", "memorisation"))
    return {"command": f"python -m training {rows.command} --parts {part}", **about(results, rows.settings, seeds), "panels": figures}


def sweep_text(summary: dict) -> str:
    return f"{note(summary)}\n{panels_text(summary, summary['settings']['dataset'])}"
