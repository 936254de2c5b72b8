"""`figures diffrop`: the figures and tables of 002 that fit on a small machine, part by part (--parts).

landscape (Fig. 2) trains nothing. table (Tables 1, 2 and 4), forms (Table 5) and tau (Fig. 4a) train runs, which they share, and omega
(Fig. 4b) samples from some of these, or from the runs that --runs names, with other guidance. Finished runs are not made again. Every part
writes PART.json and a picture; figures.md holds the text of all parts that are there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from . import checkpoint, config, evaluate, plots, run_images, toy
from .config import DiffROPConfig
from .figures import heading, row
from .figures_runs import Rows, about, panels, panels_text, run_all, write_parts

PARTS = ("landscape", "table", "forms", "tau", "omega")

SIGMA = math.sqrt(0.5)  # of Fig. 2, which does not say; with it the divergence is (m1 - m2)^2
LANDSCAPES = {  # panels of Fig. 2 and lines of its table: form and options of `toy.landscape`
    "plain": (None, {}),
    "negative L2, τ = .01": ("negative_l2", {"tau": 0.01}),
    "negative L2, τ = .02": ("negative_l2", {"tau": 0.02}),
    "negative L2, τ = .04": ("negative_l2", {"tau": 0.04}),
    "negative L2, τ = .0475": ("negative_l2", {"tau": 0.0475}),
    "hinge, τ = .2, margin 4": ("hinge", {"tau": 0.2, "margin": 4.0}),
    "hinge, τ = .2, margin 8": ("hinge", {"tau": 0.2, "margin": 8.0}),
    "reciprocal, τ = .2": ("reciprocal", {"tau": 0.2}),
    "exponential, τ = .2": ("exponential", {"tau": 0.2}),
}
DRAWN = ("plain", "negative L2, τ = .02", "negative L2, τ = .0475", "hinge, τ = .2, margin 4", "reciprocal, τ = .2", "exponential, τ = .2")
SIDES = ((-2.5, 2.5), (-1.0, 5.0))  # of m1 and of m2

MARGIN = 0.5  # of the form hinge: a quarter of the digits' pairs of different classes are closer, in mean squared difference of pixels
PLAIN = {"batch_resample": "none", "loss_weight": "none", "augment": "none"}
OURS = {  # of DiffROP's rows: what --base, --pcl-form and --pcl-tau-schedule say elsewhere is not what these are
    **PLAIN, "base": "ddpm", "pcl_form": "exponential", "pcl_margin": None, "pcl_tau_schedule": "exp",
    "cb_tau": DiffROPConfig.cb_tau, "cb_sampling": DiffROPConfig.cb_sampling,
}  # fmt: skip
UNTEMPERED = {"pcl_tau_temp": DiffROPConfig.pcl_tau_temp}  # which the schedule exp alone has
BALANCED = {key: value for key, value in OURS.items() if key not in ("cb_tau", "cb_sampling")} | {"base": "cbdm"}
METHODS = {  # row: method, what makes it that row
    "ddpm": ("ddpm", PLAIN),
    "rs": ("ddpm", {**PLAIN, "batch_resample": "balanced"}),
    "sqrt-rs": ("ddpm", {**PLAIN, "batch_resample": "sqrt"}),
    "reweight": ("ddpm", {**PLAIN, "loss_weight": "inverse"}),
    "diffaug": ("ddpm", {**PLAIN, "augment": "diffaug"}),
    "diffrop": ("diffrop", OURS),
    "cbdm": ("cbdm", PLAIN),
    "cbdm-diffrop": ("diffrop", BALANCED),
    "negative-l2": ("diffrop", {**OURS, "pcl_form": "negative_l2"}),
    "reciprocal": ("diffrop", {**OURS, "pcl_form": "reciprocal"}),
    "hinge": ("diffrop", {**OURS, "pcl_form": "hinge", "pcl_margin": MARGIN}),
    "const": ("diffrop", {**OURS, **UNTEMPERED, "pcl_tau_schedule": "const"}),
    "linear": ("diffrop", {**OURS, **UNTEMPERED, "pcl_tau_schedule": "linear"}),
}
NAMES = {
    "ddpm": "DDPM", "rs": "+ RS", "sqrt-rs": "+ sqrt-RS", "reweight": "+ re-weighting", "diffaug": "+ DiffAug", "diffrop": "+ DiffROP",
    "cbdm": "CBDM", "cbdm-diffrop": "CBDM + DiffROP", "negative-l2": "+ DiffROP, negative L2", "reciprocal": "+ DiffROP, reciprocal",
    "hinge": f"+ DiffROP, hinge, margin {MARGIN:g}", "const": "+ DiffROP, constant τ", "linear": "+ DiffROP, linear τ",
}  # fmt: skip
TABLE = ("ddpm", "rs", "sqrt-rs", "reweight", "diffaug", "diffrop", "cbdm", "cbdm-diffrop")
FORMS = ("ddpm", "negative-l2", "hinge", "reciprocal", "diffrop")
SCHEDULES = ("ddpm", "const", "linear", "diffrop")
GUIDED = ("ddpm", "diffrop", "cbdm", "cbdm-diffrop")
OMEGAS = (0.0, 0.4, 0.8, 1.2, 1.6, 2.0)
SWEPT = ("fid", "fid_head", "fid_tail", "is", "precision", "recall")


def add_options(parser: argparse.ArgumentParser) -> None:
    what = f"of {', '.join(PARTS)}; default: all"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=what)
    parser.add_argument("--omegas", type=float, nargs="+", default=list(OMEGAS), help="guidance w of part omega")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="finished runs of any method for part omega, a line each")


def figures(
    settings: DiffROPConfig, preset: DiffROPConfig, seeds: Sequence[int], folder: Path, *,
    parts: Sequence[str] = PARTS, omegas: Sequence[float] = OMEGAS, runs: Sequence[Path] | None = None,
) -> str:  # fmt: skip
    """Make the chosen parts; returns their text as markdown."""
    if runs is not None and tuple(parts) != ("omega",):
        raise ValueError(f"figures diffrop: --runs needs --parts omega, which alone reads them; got --parts {' '.join(parts)}")
    rows = Rows("figures diffrop", METHODS, NAMES, settings, preset, folder)
    make = {
        "landscape": lambda: landscape(folder),
        "table": lambda: rows.table("table", TABLE, seeds, f"Rows of Tables 1, 2 and 4 on {settings.dataset}"),
        "forms": lambda: rows.table("forms", FORMS, seeds, f"Table 5 on {settings.dataset}"),
        "tau": lambda: rows.table("tau", SCHEDULES, seeds, f"Weights τ(t) on {settings.dataset}"),
        "omega": lambda: omega(rows, seeds, omegas) if runs is None else omega_of_runs(runs, omegas, settings.progress, folder),
    }
    texts = {
        "landscape": landscape_text, "table": rows.table_text, "forms": rows.table_text, "tau": rows.table_text, "omega": omega_text,
    }  # fmt: skip
    return write_parts(parts, make, texts, folder)


# ---- landscape: Fig. 2 -----------------------------------------------------------------------------------------------


def landscape(folder: Path, pixels: int = 201) -> dict:
    """Losses of two estimated means, and where each is least."""
    grid = [torch.linspace(*side, pixels, dtype=torch.float64) for side in SIDES]
    lines, shown = {}, []
    for name, (form, options) in LANDSCAPES.items():
        unbounded = form == "negative_l2" and options["tau"] >= math.prod(toy.SHARES)  # from there on the Hessian is not definite
        found = None if unbounded else toy.optimum(form, sigma=SIGMA, **options)[:2]
        found = found and [round(mean, 6) + 0.0 for mean in found]  # of what the grids leave, and no -0
        lines[name] = {"form": form, **options, "argmin": found, "distance": found and math.dist(found, toy.MEANS)}
        if name in DRAWN:
            shown.append({"title": name, "loss": toy.landscape(form, *grid, sigma=SIGMA, **options), "argmin": found})
    plots.landscapes(folder / "landscape.png", shown, sides=SIDES, truth=toy.MEANS)
    return {"shares": toy.SHARES, "truth": toy.MEANS, "sigma": SIGMA, "lines": lines}


def landscape_text(summary: dict) -> str:
    lines = heading("two Gaussians, the truth is at {:g}, {:g}".format(*summary["truth"]), "m1", "m2", "distance to the truth")
    for name, own in summary["lines"].items():
        m1, m2 = own["argmin"] or (None, None)
        lines.append(row(name if own["argmin"] else f"{name}: no minimum", [[m1], [m2], [own["distance"]]]))
    return "\n".join(lines) + "\n"


# ---- omega: Fig. 4b --------------------------------------------------------------------------------------------------


def omega(rows: Rows, seeds: Sequence[int], omegas: Sequence[float]) -> dict:
    """Figures of the rows GUIDED against the guidance of sampling. The runs are those of the table."""
    jobs = []
    for seed in seeds:
        for name in GUIDED:
            jobs.append((NAMES[name], seed, lambda name=name, seed=seed: rows.run(name, seed)))
            of = rows.path(name, seed)
            jobs += [(f"{NAMES[name]}, {w:g}", seed, lambda of=of, w=w: guided(of, w, rows.settings.progress)) for w in omegas]
    lines = {NAMES[name]: [f"{w:g}" for w in omegas] for name in GUIDED}
    results = run_all(rows.command, "omega", jobs, rows.settings.progress)
    summary = {
        "command": "python -m training figures diffrop --parts omega", "title": rows.settings.dataset,
        **about(results, rows.settings, seeds), "panels": panels(results, lines, seeds, SWEPT),
    }  # fmt: skip
    return drawn(summary, rows.folder)


def omega_of_runs(runs: Sequence[Path], omegas: Sequence[float], progress: bool, folder: Path) -> dict:
    """The same for finished runs of any method and data set, each a line of its own."""
    names = [str(run) for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"figures diffrop: --runs must name different folders; got {', '.join(names)}")
    jobs = [(f"{run}, {w:g}", 0, lambda run=run, w=w: guided(run, w, progress)) for run in runs for w in omegas]
    results = run_all("figures diffrop", "omega", jobs, progress)
    some = next(iter(results.values()))[0]
    lines = {name: [f"{w:g}" for w in omegas] for name in names}
    shared = {key: some[key] for key in ("features", "n", "reference")}
    return drawn({"title": "runs", "runs": names, "seeds": [], **shared, "panels": panels(results, lines, [0], SWEPT)}, folder)


def guided(run: Path, w: float, progress: bool) -> dict:
    """The figures, all but PRD, of a finished run's network sampled with guidance w, from RUN/omega-W if they are there.

    The noise is that of the run's own samples, so that nothing but w differs between the points of a line.
    """
    if not (run / "metrics.json").is_file():
        raise FileNotFoundError(f"figures diffrop: expected a finished run; there is no {run / 'metrics.json'}")
    out = run / f"omega-{w:g}"
    if (out / "metrics.json").is_file():
        return json.loads((out / "metrics.json").read_text())
    samples, labels = run_images.sample_run(run, out, omega=w, progress=progress)
    method = json.loads((out / "config.json").read_text())["method"]
    settings = config.read(out / "config.json", config.IMAGE_CONFIGS[method])
    figures = evaluate.score(out, settings, run_images.load(method, settings), samples, labels, prd=False)
    checkpoint.write_json(out / "metrics.json", figures)
    return figures


def drawn(summary: dict, folder: Path) -> dict:
    plots.curves(folder / "omega.png", summary["panels"], x="guidance ω", title=f"Guidance of sampling, {summary['title']}")
    return summary


def omega_text(summary: dict) -> str:
    spread = f"Mean ± standard deviation over seeds {', '.join(map(str, summary['seeds']))}; " if summary["seeds"] else ""
    about = f"{spread}{summary['n']} samples, features: {summary['features']}, reference: {summary['reference']}.\n"
    return f"{about}\n{panels_text(summary, summary['title'] + ', ω =')}"
