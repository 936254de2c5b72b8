"""card.md of a run, one page: what was trained on what, how it differs from the default, its figures and what they are of, its use."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from . import checkpoint, config, papers

FIGURES = (  # of all methods, in the order in which they are told
    "acc", "nmi", "ari", "acc_head", "acc_med", "acc_tail", "top1", "top1_many", "top1_med", "top1_few",
    "fid", "fid_head", "fid_med", "fid_tail", "is", "precision", "recall", "memorisation",
)  # fmt: skip
ABOUT = {"n": "n = {}", "reference": "reference: {}", "guidance": "omega = {:g}", "features": "features: {}", "test": "{}",
         "latents": "latents: {}", "class_prior": "class prior: {}"}  # fmt: skip
LIMITS = {
    "clusters": "Clusters have no names: for ACC they are matched with the labels, which no loss sees.",
    "images": "Figures compare with those of the same n, reference, omega and features only. Memorisation is of the tail's samples: "
    "1 as far from the training images as those lie from each other, 0 copies.",
    "diffrc": "The figures are of classifiers on real test images; how good the generated images look, none of them says.",
}


def write(folder: Path, report: Mapping) -> Path:
    """card.md in a run's folder from its config.json and what its metrics.json holds: at most 30 lines."""
    about = json.loads((folder / "config.json").read_text())
    method, settings, counts = about["method"], about["settings"], about["data"]["counts"]
    kind, run = type(config.PRESETS[method]["default"]), shlex.quote(str(folder))
    known = {item.name: item for item in dataclasses.fields(kind) if "runtime" not in item.metadata}
    changed = [
        f"{name} {one['value']} ({one['provenance']})" for name, one in settings.items()
        if name in known and one["value"] != known[name].default
    ]  # fmt: skip
    shown = {name: report[name] for name in FIGURES if isinstance(report.get(name), float)}
    beside = ", ".join(report.get("baselines", {})) or "nothing"
    remarks = [f"remarks in metrics.json on {', '.join(report['remarks'])}"] if report.get("remarks") else []
    seconds = f", {report['seconds']:.0f} s on {settings['device']['value']}" if "seconds" in report else ""
    commands = [f"{method} --out {run} --resume  # its figures and pictures once more, from the weights"]
    if method in config.IMAGE_CONFIGS:
        commands = [f"sample {run} --n 64 --out {run}/samples", f"evaluate {run}"]
    elif method == "diffrc":
        commands.append(f"diffrc --out {run} --resume --stages 4,5 --s 0.4  # other images and their classifier")
    lines = [
        f"# {method.upper()} on {settings['dataset']['value']}, seed {settings['seed']['value']}", "",
        (kind.__doc__ or "").splitlines()[0], "",
        f"**Trained on** {sum(counts)} rows in {len(counts)} classes, {max(counts)} to {min(counts)} a class, of shape "
        f"{' x '.join(map(str, about['data']['shape']))}; indices.json names them. torch {about['versions']['torch']}, "
        f"ltkernels {about['versions']['ltkernels']}{seconds}.",
        f"**Not the default:** {', '.join(changed) or 'nothing'}.", "",
        *([f"| {' | '.join(shown)} |", "|" + "---|" * len(shown), f"| {' | '.join(f'{value:.3g}' for value in shown.values())} |"]
          if shown else ["Not evaluated."]), "",
        f"**Figures:** {'; '.join([*facts(report), *remarks]) or 'none'}; beside them: {beside}.",
        f"**Limits:** one seed, {settings['dataset']['value']}. {LIMITS.get(method, LIMITS['images' if 'omega' in known else 'clusters'])}",
        "", "```sh", *(f"python -m training {command}" for command in commands), "```", "",
        "```bibtex", papers.bibtex(method), "```",
    ]  # fmt: skip
    with checkpoint.replacing(folder / "card.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return folder / "card.md"


def facts(report: Mapping) -> list[str]:
    """What a report's figures are of."""
    return [text.format(report[name]) for name, text in ABOUT.items() if isinstance(report.get(name), (str, int, float))]
