"""`figures METHOD`, and its part for DGD: every method over several seeds, on all data, on a held-out fifth, and on synthetic latents.

Every job leaves a file when it is done and is not run again; a job that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, config, data, metrics, plots, run
from .config import CLUDIConfig, DGDConfig, DiffRCConfig, DiffROPConfig, T2HConfig
from .loop import generator, train
from .methods.dgd import LatentDiffusion, fit_guidance, generate
from .runfolder import SCORES

HOLDOUT = 0.2
METHODS = {"k-means": "kmeans", "spectral": "spectral", "eta0 = 0": "eta0=0", "DGD": None}  # name in the table: key in `baselines`
SYNTHETIC_ROWS = 1000


def main(arguments: Sequence[str]) -> int:
    from . import figures_cludi, figures_diffrc, figures_diffrop, figures_gda, figures_t2h
    from .__main__ import parse, stoppable

    methods = {  # settings, presets, what makes the figures, number of seeds, what adds options of its own
        "dgd": (DGDConfig, config.DGD_PRESETS, dgd, 5, None),
        "cludi": (CLUDIConfig, config.CLUDI_PRESETS, figures_cludi.figures, 5, None),
        "t2h": (T2HConfig, config.IMAGE_PRESETS["t2h"], figures_t2h.figures, 3, figures_t2h.add_options),
        "diffrop": (DiffROPConfig, config.IMAGE_PRESETS["diffrop"], figures_diffrop.figures, 3, figures_diffrop.add_options),
        "gda": (DiffROPConfig, figures_gda.PRESETS, figures_gda.figures, 3, figures_gda.add_options),
        "diffrc": (DiffRCConfig, config.DIFFRC_PRESETS, figures_diffrc.figures, 3, figures_diffrc.add_options),
    }
    parser = argparse.ArgumentParser(prog="python -m training figures", description="Tables and pictures of a method over several seeds.")
    commands = parser.add_subparsers(dest="method", required=True)
    for name, (_, _, make, seeds, add_options) in methods.items():
        text = f"Further options are those of `python -m training {'diffrop' if name == 'gda' else name}`."
        command = commands.add_parser(name, description=parser.description, epilog=text, allow_abbrev=False)
        command.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
        command.add_argument("--out", default=f"runs/figures-{name}", help="folder of the tables, the pictures and the runs")
        command.set_defaults(make=make)
        if add_options is not None:
            add_options(command)
    options, rest = parser.parse_known_args(arguments)
    given = vars(options)
    method, seeds, folder, make = (given.pop(key) for key in ("method", "seeds", "out", "make"))
    kind, presets, *_ = methods[method]
    settings, preset = parse(rest, f"figures {method}", kind, presets)
    return stoppable(lambda: print(make(settings, preset, seeds, Path(folder), **given)), "the same command")


def dgd(settings: DGDConfig, preset: DGDConfig, seeds: Sequence[int], folder: Path) -> str:
    """Run what is missing and write figures.json, figures.md and the pictures; returns the tables as markdown."""
    jobs: list[tuple[str, int, Callable[[], dict]]] = []
    for seed in seeds:
        one = dataclasses.replace(settings, seed=seed)
        for part, share in (("all", 0.0), ("holdout", HOLDOUT)):
            jobs.append((part, seed, lambda one=one, part=part, share=share: clustering_job(one, preset, folder, part, share)))
        for name in data.SYNTHETIC:
            jobs.append((name, seed, lambda one=one, name=name: synthetic_job(one, folder, name)))
    results: dict[str, dict[int, dict]] = {}
    with tqdm(jobs, desc="figures", disable=not settings.progress) as bar:
        for part, seed, job in bar:
            bar.set_postfix_str(f"{part}, seed {seed}")
            results.setdefault(part, {})[seed] = job()
    summary = {
        "seeds": list(seeds),
        "settings": config.identity(settings),
        "all": clustering_summary(list(results["all"].values())),
        "holdout": clustering_summary([result["holdout"] | {"baselines": result["holdout"]} for result in results["holdout"].values()]),
        "guidance": guidance_summary(list(results["all"].values())),
        "synthetic": {name: synthetic_summary(list(results[name].values())) for name in data.SYNTHETIC},
        "seconds": [result["seconds"] for result in results["all"].values()],
    }
    checkpoint.write_json(folder / "figures.json", summary)
    text = markdown(summary)
    with checkpoint.replacing(folder / "figures.md") as temporary:
        temporary.write_text(text)
    draw(folder, summary, results)
    return text


# ---- jobs ------------------------------------------------------------------------------------------------------------


def clustering_job(settings: DGDConfig, preset: DGDConfig, folder: Path, part: str, holdout: float) -> dict:
    """metrics.json of one run, from the disk if it is there."""
    out = folder / f"{part}-{settings.seed}"
    settings = dataclasses.replace(settings, holdout=holdout, out=str(out), resume=(out / "config.json").exists())
    finished = out / "metrics.json"
    if finished.exists():
        changed = config.differences(config.read(out / "config.json", DGDConfig), settings)
        if changed:
            raise ValueError(f"figures dgd: {out} was made with other settings ({'; '.join(changed)}); give another --out")
        return json.loads(finished.read_text())
    return run.dgd(settings, preset)


def synthetic_job(settings: DGDConfig, folder: Path, name: str) -> dict:
    """Latents of known density: stage 2 on them as they are (whitened), then the share of generated mass per class.

    A generated latent counts for the class of its nearest real one. The true log-density is that of the mixture the latents were drawn
    from; it knows nothing of the kernel estimate that guides.
    """
    out = folder / f"synthetic-{name}-{settings.seed}"
    settings = dataclasses.replace(settings, encoder="identity", latent_norm="whiten")
    finished = out / "metrics.json"
    if finished.exists():
        stored = json.loads(finished.read_text())
        if stored["settings"] != config.identity(settings):
            raise ValueError(f"figures dgd: {out} was made with other settings; give another --out")
        return stored
    x, labels, log_density, shares = data.synthetic_latents(name, SYNTHETIC_ROWS, settings.seed)
    x = x.to(settings.device)
    modules = run.build_modules(x, settings)
    stage = LatentDiffusion(x, modules, settings)
    train(stage, out, seed=settings.seed, checkpoint_every=settings.checkpoint_every, progress=settings.progress)
    field, latent = fit_guidance(stage.z, settings), modules["latent"]
    result = {"settings": config.identity(settings), "truth": shares.tolist()}
    for kind, guidance in (("guided", field), ("unguided", None)):
        rng = generator(settings.seed, "evaluate", device=x.device)
        z = generate(modules["denoiser"], stage.z, guidance, 4 * SYNTHETIC_ROWS, settings, rng)
        back = torch.linalg.solve(latent.matrix.T.double(), z.double().T).T + latent.mean  # unwhitened
        result[kind] = {
            "shares": metrics.nearest_class_shares(z, stage.z, labels, len(shares)).tolist(),
            "true_log_density": log_density(back.cpu()).mean().item(),
        }
    result["real"] = {"true_log_density": log_density(x.double().cpu()).mean().item()}
    checkpoint.write_json(finished, result)
    return result


# ---- summaries -------------------------------------------------------------------------------------------------------


def clustering_summary(results: list[dict]) -> dict[str, dict[str, list[float]]]:
    """table[method][figure] = one value a seed."""
    rows = {name: [result["baselines"][key] if key else result.get("dgd", result) for result in results] for name, key in METHODS.items()}
    return {name: {figure: [row[figure] for row in values] for figure in SCORES} for name, values in rows.items()}


def guidance_summary(results: list[dict]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """[networks][real, guided, unguided][figure] = one value a seed."""
    stages = results[0]["guidance"]
    return {
        stage: {
            kind: {figure: [result["guidance"][stage][kind][figure] for result in results] for figure in figures}
            for kind, figures in kinds.items()
        }
        for stage, kinds in stages.items()
    }


def synthetic_summary(results: list[dict]) -> dict:
    truth = results[0]["truth"]
    order = sorted(range(len(truth)), key=lambda c: truth[c])
    tail = order[: max(1, len(truth) // 3)]
    out = {"truth": truth, "tail_truth": sum(truth[c] for c in tail)}
    for kind in ("unguided", "guided"):
        shares = [result[kind]["shares"] for result in results]
        out[kind] = {
            "shares": shares,
            "tail": [sum(share[c] for c in tail) for share in shares],
            "total_variation": [metrics.total_variation(torch.tensor(share), torch.tensor(truth)) for share in shares],
            "true_log_density": [result[kind]["true_log_density"] for result in results],
        }
    return out


def heading(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def row(name: str, values: Sequence[Sequence[float | None]]) -> str:
    """A line of a table: the mean and standard deviation of each sequence."""
    return f"| {name} | " + " | ".join(_cell(value) for value in values) + " |"


def markdown(summary: dict) -> str:
    lines = [f"Mean ± standard deviation over seeds {', '.join(map(str, summary['seeds']))}.", ""]
    for part, title in (("all", "all data"), ("holdout", "held-out fifth")):
        lines += heading(title, *SCORES)
        lines += [row(name, [figures[figure] for figure in SCORES]) for name, figures in summary[part].items()] + [""]
    lines += heading("generated latents", "log-density", "nearest real, 95 %", "nearest to a tail class")
    for stage, kinds in summary["guidance"].items():
        for kind, figures in kinds.items():
            columns = [figures[figure] for figure in ("log_density", "nearest_real_p95", "nearest_tail_share")]
            lines.append(row(f"{stage.replace('_', ' ')}: {kind}", columns))
    lines += ["", *heading("synthetic latents", "tail's share", "truth", "total variation to the truth", "true log-density")]
    for name, result in summary["synthetic"].items():
        for kind in ("unguided", "guided"):
            figures = result[kind]
            columns = [figures["tail"], [result["tail_truth"]], figures["total_variation"], figures["true_log_density"]]
            lines.append(row(f"{name}: {kind}", columns))
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, sd = metrics.mean_sd(known)
    return f"{mean:.3f} ± {sd:.3f}" if len(known) > 1 else f"{mean:.3f}"


def draw(folder: Path, summary: dict, results: dict) -> None:
    for part, title in (("all", "all data"), ("holdout", "held-out fifth")):
        plots.comparison(folder / f"comparison-{part}.png", summary[part], title=f"Clustering, {title}")
    for name in data.SYNTHETIC:
        result = summary["synthetic"][name]
        shares = {kind: np.array(result[kind]["shares"]) for kind in ("unguided", "guided")}
        plots.class_mass(folder / f"synthetic-{name}.png", result["truth"], shares, title=f"{name}: share of generated mass per class")
