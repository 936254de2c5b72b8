"""`figures diffrc`: the ablation of 003, part by part (--parts).

table (Table 3) compares the classifier without generated images with four ways to make them, and with two things that the paper prints and
we do not do; lam and s (Fig. 3) vary one number each; images (Fig. 2) shows what was made. Runs leave folders and are not run again, one
that was cut short goes on; those of one seed share source model, encoder and baselines. Every part writes PART.json and a picture;
figures.md holds the text of all parts that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from . import checkpoint, config, data, plots, run_diffrc
from .config import DiffRCConfig
from .figures import heading, row

PARTS = ("table", "lam", "s", "images")
FULL = "both"
ARMS = {  # rows of Table 3 and what makes them; of every seed the first is run first, and the others take what they share with it
    FULL: {},
    "pdl": {"s": 0.0},
    "mpcl": {"lam": 0.0},
    "plain": {"lam": 0.0, "s": 0.0},
    "sign": {"guidance_sign": "paper"},
    "unit": {"grad_norm": "l2"},
}
NAMES = {
    "softmax": "baseline: softmax, no images", "balanced": "balanced softmax, no images", "plain": "images without PDL and MPCL",
    "pdl": "+ PDL", "mpcl": "+ MPCL", FULL: "+ PDL + MPCL", "sign": "both, sign as printed (C5)", "unit": "both, unit gradient (C7)",
}  # fmt: skip
SCORES = (*run_diffrc.SCORES, "alike")
LAMBDAS, STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9), (0.2, 0.4, 0.6, 0.8, 1.0)
SWEEP_SEEDS = 2  # of the first seeds: a sweep shows a trend, the table compares


def add_options(parser: argparse.ArgumentParser) -> None:
    what = f"of {', '.join(PARTS)}; default: all"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=what)


def figures(
    settings: DiffRCConfig, preset: DiffRCConfig, seeds: Sequence[int], folder: Path, *, parts: Sequence[str] = PARTS
) -> str:  # fmt: skip
    """Make the chosen parts; returns their text as markdown."""
    if settings.lam == 0 or settings.s == 0:
        raise ValueError(f"figures diffrc: the arms leave out what lam and s > 0 put in; got lam={settings.lam:g}, s={settings.s:g}")
    make = {
        "table": lambda: table(settings, preset, seeds, folder),
        "lam": lambda: sweep("lam", LAMBDAS, settings, preset, seeds[:SWEEP_SEEDS], folder),
        "s": lambda: sweep("s", STRENGTHS, settings, preset, seeds[:SWEEP_SEEDS], folder),
        "images": lambda: images(settings, preset, seeds[0], folder),
    }
    for part in parts:
        checkpoint.write_json(folder / f"{part}.json", make[part]())
    texts = {part: TEXTS[part](json.loads((folder / f"{part}.json").read_text())) for part in PARTS if (folder / f"{part}.json").exists()}
    with checkpoint.replacing(folder / "figures.md") as temporary:
        temporary.write_text("\n".join(texts.values()))
    return "\n".join(texts[part] for part in PARTS if part in parts)


# ---- runs ------------------------------------------------------------------------------------------------------------


def job(name: str, settings: DiffRCConfig, preset: DiffRCConfig, folder: Path, seed: int, **changes) -> dict:
    """metrics.json of the run of one arm, from the disk if it is there."""
    out = folder / f"{name}-{seed}"
    shared = None
    if name != FULL:
        job(FULL, settings, preset, folder, seed)
        shared = str(folder / f"{FULL}-{seed}")
    here = {"seed": seed, "out": str(out), "resume": (out / "config.json").exists(), "overwrite": False, "stages": None, "source": shared}
    one = dataclasses.replace(settings, **changes, **here)
    finished = out / "metrics.json"
    if not finished.exists():
        return run_diffrc.diffrc(one, preset)
    changed = config.differences(config.read(out / "config.json", DiffRCConfig), one)
    if changed:
        raise ValueError(f"figures diffrc: {out} was made with other settings ({'; '.join(changed)}); give another --out")
    return json.loads(finished.read_text())


def run_all(jobs: Sequence[tuple[str, int, Callable[[], dict]]], settings: DiffRCConfig, part: str) -> dict[str, list[dict]]:
    """results[name] = one report a seed."""
    results: dict[str, list[dict]] = {}
    with tqdm(jobs, desc=part, disable=not settings.progress) as bar:
        for name, seed, run in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            results.setdefault(name, []).append(run())
    return results


def scores(report: dict) -> dict[str, float | None]:
    """The figures of a row; alike: share of the generated images that the balanced softmax of the real ones would label as they are."""
    made = report.get("generated")
    alike = None if made is None or made["label_by"] == "classifier" or not sum(made["kept"]) else sum(made["alike"]) / sum(made["kept"])
    return {**{name: report[name] for name in run_diffrc.SCORES}, "alike": alike}


def about(part: str, settings: DiffRCConfig, seeds: Sequence[int], report: dict) -> dict:
    """What figures can only be read with."""
    told = {key: report[key] for key in ("test", "counts")}
    command = f"python -m training figures diffrc --parts {part}"
    return {"command": command, "seeds": list(seeds), "settings": config.identity(settings), **told}


def note(summary: dict) -> str:
    return f"Mean ± standard deviation over seeds {', '.join(map(str, summary['seeds']))}; {summary['test']} images.\n"


# ---- table: Table 3 --------------------------------------------------------------------------------------------------


def table(settings: DiffRCConfig, preset: DiffRCConfig, seeds: Sequence[int], folder: Path) -> dict:
    make = lambda name, seed: lambda: job(name, settings, preset, folder, seed, **ARMS[name])  # noqa: E731
    results = run_all([(name, seed, make(name, seed)) for seed in seeds for name in ARMS], settings, "table")
    rows = {**{name: [one["baselines"][name] for one in results[FULL]] for name in run_diffrc.BASELINES}, **results}
    rows = {name: rows[name] for name in NAMES}
    found = {name: [scores(one) for one in own] for name, own in rows.items()}
    summary = {
        **about("table", settings, seeds, results[FULL][0]),
        "table": {name: {figure: [one[figure] for one in own] for figure in SCORES} for name, own in found.items()},
        "per_class": {name: [one["per_class"] for one in own] for name, own in rows.items()},
        "kept": {name: [sum(one["generated"]["kept"]) for one in own] for name, own in results.items()},
        "seconds": {name: [one["seconds"] for one in own] for name, own in results.items()},
    }
    drawn = {NAMES[name]: {figure: own[figure] for figure in run_diffrc.SCORES} for name, own in summary["table"].items()}
    plots.comparison(folder / "table.png", drawn, title=f"Rows of Table 3 on {settings.dataset}")
    bars = {NAMES[name]: summary["per_class"][name] for name in ("softmax", "balanced", "pdl", "mpcl", FULL)}
    plots.class_bars(
        folder / "per_class.png", bars, summary["counts"], data.split_groups(summary["counts"], settings.split_rule),
        title="Recognised class by class", ylabel="share of test images", caption=summary["test"],
    )  # fmt: skip
    return summary


def table_text(summary: dict) -> str:
    lines = [note(summary), *heading(summary["settings"]["dataset"], *SCORES, "images")]
    for name, own in summary["table"].items():
        lines.append(row(NAMES[name], [*(own[figure] for figure in SCORES), summary["kept"].get(name, [])]))
    return "\n".join(lines) + "\n"


# ---- lam, s: Fig. 3 --------------------------------------------------------------------------------------------------


def sweep(option: str, values: Sequence[float], settings: DiffRCConfig, preset: DiffRCConfig, seeds: Sequence[int], folder: Path) -> dict:
    """panels[figure][option][value] = one figure a seed; where the value is the table's, it is the table's run."""
    jobs = []
    for seed in seeds:
        for value in values:
            name, own = (FULL, {}) if value == getattr(settings, option) else (f"{option}{value:g}", {option: value})
            jobs.append((f"{value:g}", seed, lambda name=name, seed=seed, own=own: job(name, settings, preset, folder, seed, **own)))
    results = run_all(jobs, settings, option)
    found = {value: [scores(one) for one in own] for value, own in results.items()}
    panels = {figure: {option: {value: [one[figure] for one in own] for value, own in found.items()}} for figure in SCORES}
    drawn = {figure: panels[figure] for figure in ("top1", "top1_few", "std", "alike")}
    plots.curves(folder / f"{option}.png", drawn, x=option, title=f"Recognition against {option}, {settings.dataset}")
    return {**about(option, settings, seeds, results[f"{values[0]:g}"][0]), "panels": panels}


def sweep_text(summary: dict) -> str:
    lines = [note(summary)]
    for figure, panel in summary["panels"].items():
        ((option, own),) = panel.items()
        lines += heading(f"{figure}, {summary['settings']['dataset']}", *own)
        lines += [row(option, list(own.values())), ""]
    return "\n".join(lines)


# ---- images: Fig. 2 --------------------------------------------------------------------------------------------------


def images(settings: DiffRCConfig, preset: DiffRCConfig, seed: int, folder: Path, columns: int = 6) -> dict:
    """Images of every class that were made with and without MPCL, and beside each the training image nearest to it."""
    report = job(FULL, settings, preset, folder, seed)
    job("pdl", settings, preset, folder, seed, **ARMS["pdl"])
    sheets = {}
    for name in (FULL, "pdl"):
        one = dataclasses.replace(settings, seed=seed, out=str(folder / f"{name}-{seed}"), **ARMS[name])
        run = run_diffrc.Pipeline(one, run_diffrc.load(one))
        grid = run.neighbours(columns)
        sheets[name] = {label: len(own) for label, own, _ in grid}
        if grid:
            groups = data.split_groups(run.dataset.counts, settings.split_rule)
            title = f"Generated images ({NAMES[name]}), and beside each its nearest training image"
            plots.sample_grid(folder / f"images-{name}.png", grid, run.dataset.counts, groups, title=title)
    return {**about("images", settings, [seed], report), "shown": sheets}


def images_text(summary: dict) -> str:
    shown = "; ".join(f"{NAMES[name]}: {sum(own.values())} images of {len(own)} classes" for name, own in summary["shown"].items())
    return f"Seed {summary['seeds'][0]}, {shown}.\n"


TEXTS = {"table": table_text, "lam": sweep_text, "s": sweep_text, "images": images_text}
