"""`figures cludi`: the tables of the README. CLUDI and its rivals over several seeds on balanced and long-tailed digits, both class priors
on the latter, and CLUDI for other noise scales F^2 and dimensions d.

Every run leaves a folder and is not run again; one that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import checkpoint, config, plots
from .config import CLUDIConfig
from .figures import heading, row
from .run_cludi import cludi
from .runfolder import SCORES

NAMES = {
    "kmeans": "k-means", "gmm": "Gaussian mixture", "spectral": "spectral", "self-classifier": "Self-Classifier*", "scan": "SCAN",
    "cc": "CC", "temi": "TEMI", "dgd": "DGD",
}  # fmt: skip
PARTS = {  # part: what it changes
    "digits": {"dataset": "digits", "class_prior": "uniform"},
    "digits-lt": {"dataset": "digits-lt", "class_prior": "uniform"},
    "digits-lt-empirical": {"dataset": "digits-lt", "class_prior": "empirical", "baselines": False},
}
SWEEP_SEEDS = 2  # of the first seeds: a sweep shows a trend, the tables compare methods
SWEEPS = {"noise_scale_f2": (4.0, 25.0, 400.0), "embedding_dim": (8, 64)}  # beside the settings' own


def figures(settings: CLUDIConfig, preset: CLUDIConfig, seeds: Sequence[int], folder: Path) -> str:
    """Run what is missing and write figures.json, figures.md and the pictures; returns the tables as markdown."""
    jobs = [(part, seed, change) for seed in seeds for part, change in PARTS.items()]
    for seed in list(seeds)[:SWEEP_SEEDS]:
        common = {**PARTS["digits"], "baselines": False, "noise_std": None}
        for option, values in SWEEPS.items():
            jobs += [(f"{option}-{value:g}", seed, {**common, option: value}) for value in values]
    results: dict[str, dict[int, dict]] = {}
    with tqdm(jobs, desc="figures", disable=not settings.progress) as bar:
        for part, seed, change in bar:
            bar.set_postfix_str(f"{part}, seed {seed}")
            one = dataclasses.replace(settings, seed=seed, **change)
            results.setdefault(part, {})[seed] = job(one, preset, folder / f"{part}-{seed}", folder / f"{change['dataset']}-{seed}")
    summary = summarise(results, settings, list(seeds))
    checkpoint.write_json(folder / "figures.json", summary)
    text = markdown(summary)
    with checkpoint.replacing(folder / "figures.md") as temporary:
        temporary.write_text(text)
    draw(folder, summary)
    return text


def job(settings: CLUDIConfig, preset: CLUDIConfig, out: Path, first: Path) -> dict:
    """metrics.json of one run, from the disk if it is there; `first` is the run whose trained encoder serves all of its data and seed."""
    settings = dataclasses.replace(settings, out=str(out), resume=(out / "config.json").exists())
    finished = out / "metrics.json"
    if not finished.exists():
        return cludi(settings, preset, None if out == first else first)
    changed = config.differences(config.read(out / "config.json", CLUDIConfig), settings)
    if changed:
        raise ValueError(f"figures cludi: {out} was made with other settings ({'; '.join(changed)}); give another --out")
    return json.loads(finished.read_text())


def summarise(results: dict[str, dict[int, dict]], settings: CLUDIConfig, seeds: list[int]) -> dict:
    runs = {part: list(own.values()) for part, own in results.items()}

    def values(rows: list[dict]) -> dict[str, list[float | None]]:
        return {figure: [one[figure] for one in rows] for figure in SCORES}

    tables = {}
    for part in ("digits", "digits-lt"):
        tables[part] = {name: values([run["baselines"][key] for run in runs[part]]) for key, name in NAMES.items()}
        tables[part]["CLUDI"] = values(runs[part])
    tables["digits-lt"]["CLUDI, uniform prior"] = tables["digits-lt"].pop("CLUDI")
    tables["digits-lt"]["CLUDI, empirical prior"] = values(runs["digits-lt-empirical"])
    own = {"noise_scale_f2": settings.std**2, "embedding_dim": settings.embedding_dim or 32}  # of ten clusters
    sweeps = {}
    for option, others in SWEEPS.items():
        points = {value: runs[f"{option}-{value:g}"] for value in others} | {own[option]: runs["digits"][:SWEEP_SEEDS]}
        sweeps[option] = {f"{value:g}": [run["acc"] for run in points[value]] for value in sorted(points)}
    samples = [run["samples"] for run in runs["digits"]]
    means = {name: [[sum(row) / len(row) for row in rows] for rows in zip(*(one[name] for one in samples), strict=True)]
             for name in ("clean", "augmented")}  # fmt: skip
    return {
        "command": "python -m training figures cludi",
        "seeds": seeds,
        "settings": config.identity(settings),
        "tables": tables,
        "smallest_cluster_share": {part: [run["smallest_cluster_share"] for run in runs[part]] for part in PARTS},
        "restarts": {part: [run["restarts"] for run in runs[part]] for part in PARTS},
        "samples": {"count": samples[0]["count"], **means},  # one value a seed, the mean over its choices of samples
        "sweeps": sweeps,
        "seconds": {part: [run["seconds"] for run in own] for part, own in runs.items()},
    }


def markdown(summary: dict) -> str:
    lines = [f"Mean ± standard deviation over seeds {', '.join(map(str, summary['seeds']))}, after the last step.", ""]
    for part, table in summary["tables"].items():
        lines += heading(part, *SCORES)
        lines += [row(name, [own[figure] for figure in SCORES]) for name, own in table.items()] + [""]
    lines += heading("assignments averaged, digits", *map(str, summary["samples"]["count"]))
    lines += [row(name, summary["samples"][name]) for name in ("clean", "augmented")] + [""]
    for option, own in summary["sweeps"].items():
        lines += [*heading(f"{option}, digits", *own), row(f"ACC, {SWEEP_SEEDS} seeds", list(own.values())), ""]
    lines += heading("five seeds", "smallest cluster / its uniform share")
    lines += [row(f"CLUDI, {part}", [shares]) for part, shares in summary["smallest_cluster_share"].items()]
    return "\n".join(lines) + "\n"


def draw(folder: Path, summary: dict) -> None:
    for part, table in summary["tables"].items():
        plots.comparison(folder / f"comparison-{part}.png", table, title=f"Clustering, {part}")
    plots.averaging(folder / "averaging.png", summary["samples"], over="seeds")
    panels = {option: {"digits": {float(value): acc for value, acc in own.items()}} for option, own in summary["sweeps"].items()}
    plots.sweep(folder / "sweeps.png", panels, title="CLUDI on digits: noise scale F² and embedding dimension d")
