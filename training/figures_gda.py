"""`figures gda`: generative data augmentation (002, Table 3): what samples of diffusion models are worth to a classifier.

Every row is a classifier: of the long-tailed images alone, of these and the samples of one model, and of the full set; all are tested on
the images of `data.test_set`. The models are runs like those of any command. Runs and classifiers that are there are not made again; one
that was cut short goes on, and one of other settings or images is refused.
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

from . import checkpoint, config, data, plots, run_images
from .config import DiffROPConfig
from .figures import heading, row
from .figures_runs import Rows
from .recognition import Recipe, predict, recipe_of, recognition_scores, to_unit, train_classifier

METHODS = {  # row: method, what makes it that row
    "DDPM": ("ddpm", {}),
    "DiffROP": ("diffrop", {"base": "ddpm"}),
    "CBDM": ("cbdm", {}),
    "CBDM-DiffROP": ("diffrop", {"base": "cbdm"}),
}
SCORES = ("top1", "precision", "recall", "top1_many", "top1_med", "top1_few", "std")
SHOWN = ("top1", "precision", "top1_many", "top1_med", "top1_few")  # of the picture
SMALL = {"dataset": "digits-train-lt", "samples": 1200}  # as many as the full set has, as in the table
PRESETS = {
    "default": dataclasses.replace(config.IMAGE_PRESETS["diffrop"]["default"], steps=2000, **SMALL),
    "short": dataclasses.replace(config.IMAGE_PRESETS["diffrop"]["short"], **SMALL),
    "table3": config.IMAGE_PRESETS["diffrop"]["table1-cifar100-ddpm"],  # one w for all rows, where the paper tunes it for each
}


def add_options(parser: argparse.ArgumentParser) -> None:
    what = f"diffusion models, of {', '.join(METHODS)}; default: all"
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=list(METHODS), metavar="ROW", help=what)
    parser.add_argument("--runs", type=Path, help="folder of their runs ROW-SEED, made where they are missing; default: OUT/runs")
    what = "add as many samples as bring every class to the size of the largest one; default: add all"
    parser.add_argument("--fill", action="store_true", help=what)
    parser.add_argument("--loss", choices=("softmax", "balanced"), default="softmax", help="of the classifiers")


def figures(
    settings: DiffROPConfig, preset: DiffROPConfig, seeds: Sequence[int], folder: Path, *,
    rows: Sequence[str] = tuple(METHODS), runs: Path | None = None, fill: bool = False, loss: str = "softmax",
) -> str:  # fmt: skip
    """Make the missing runs and classifiers, metrics.json, figures.md and the pictures; returns the table as markdown."""
    test, full = find_sets(settings)
    recipe = dataclasses.replace(recipe_of(settings.dataset), loss=loss)
    models = Rows("figures gda", METHODS, {}, settings, preset, folder / "runs" if runs is None else runs)
    said = [f"--loss {loss}"] * (loss != "softmax") + [f"--runs {runs}"] * (runs is not None) + ["--fill"] * fill
    summary = {
        "command": " ".join(["python -m training figures gda", *said]), "seeds": list(seeds), "settings": config.identity(settings),
        "recipe": dataclasses.asdict(recipe), "fill": fill, "test": f"{test.name}, n = {len(test)}", "counts": None, "images": {},
        "table": {}, "per_class": {}, "agreement": {},
    }  # fmt: skip
    with tqdm(total=len(seeds) * (len(rows) + 2), desc="gda", disable=not settings.progress) as bar:
        for seed in seeds:
            train = run_images.load("figures gda", dataclasses.replace(settings, seed=seed))
            summary["counts"] = list(train.counts)  # of every seed, which chooses other rows
            sets = {"full": lambda: (full.images, full.labels)} if full is not None else {}
            sets |= {"LT": lambda train=train: (train.images, train.labels)}
            sets |= {name: lambda name=name, seed=seed, train=train: added(models, name, seed, train, fill) for name in rows}
            judge = None
            for name, make in sets.items():
                bar.set_postfix_str(f"{name}, seed {seed}")
                images, labels = make()
                net = classifier(images, labels, test.num_classes, recipe, seed, folder / "classifiers" / f"{name}-{seed}", settings)
                judge = net if name == "full" else judge
                scores = recognition_scores(net, test, train.counts, settings.split_rule)
                summary["per_class"].setdefault(name, []).append(scores.pop("per_class"))
                for figure, value in scores.items():
                    summary["table"].setdefault(name, {}).setdefault(figure, []).append(value)
                summary["images"].setdefault(name, []).append(len(labels))
                if name in rows and judge is not None:
                    told = agreement(judge, images[len(train) :], labels[len(train) :], train.counts, settings.split_rule)
                    summary["agreement"].setdefault(name, []).append(told)
                bar.update()
    order = [name for name in ("LT", *rows, "full") if name in summary["table"]]
    for key in ("images", "table", "per_class"):
        summary[key] = {name: summary[key][name] for name in order}
    checkpoint.write_json(folder / "metrics.json", summary)
    draw(folder, summary)
    text = markdown(summary)
    with checkpoint.replacing(folder / "figures.md") as temporary:
        temporary.write_text(text)
    return text


def find_sets(settings: DiffROPConfig) -> tuple[data.Dataset, data.Dataset | None]:
    """(test images, the full training set, None where the long tail is all there is), before anything is trained."""
    kind = settings.dataset.partition(":")[0]
    if not kind.endswith("-lt"):
        raise ValueError(f"figures gda: expected a long tail, digits-train-lt for one; got {settings.dataset}")
    if not settings.conditional:
        raise ValueError("figures gda: samples need labels, so the models need conditional; got --no-conditional")
    place = {"root": settings.root, "image_size": settings.image_size}
    test = data.test_set(settings.dataset, **place)
    return test, None if kind == "imagenet-lt" else data.load(settings.dataset.replace("-lt", "", 1), **place)


def added(models: Rows, name: str, seed: int, train: data.Dataset, fill: bool) -> tuple[Tensor, Tensor]:
    """The training images and, after them, samples of the run of row `name`, which is made first where it is missing."""
    models.run(name, seed, evaluate=False)
    out = models.path(name, seed)
    samples, labels = (torch.from_numpy(np.load(out / f"{file}.npy")) for file in ("samples", "sample_labels"))
    if fill:
        chosen = filling(labels, train.counts, str(out))
        samples, labels = samples[chosen], labels[chosen]
    return torch.cat([train.images, to_unit(samples)]), torch.cat([train.labels, labels])


def filling(labels: Tensor, counts: Sequence[int], where: str) -> Tensor:
    """Numbers of the first samples of each class that bring it from counts (C,) to the largest of them."""
    chosen = []
    for label, count in enumerate(counts):
        own, needed = (labels == label).nonzero().flatten(), max(counts) - count
        if len(own) < needed:
            raise ValueError(f"figures gda: class {label} needs {needed} samples; {where} has {len(own)}, so give more --samples")
        chosen.append(own[:needed])
    return torch.cat(chosen)


def classifier(
    images: Tensor, labels: Tensor, num_classes: int, recipe: Recipe, seed: int, folder: Path, settings: DiffROPConfig
) -> torch.nn.Module:
    images, labels = images.to(settings.device), labels.to(settings.device)
    return train_classifier(images, labels, num_classes, recipe, seed=seed, folder=folder, progress=settings.progress)


def agreement(net: torch.nn.Module, samples: Tensor, labels: Tensor, counts: Sequence[int], rule: str) -> list[float | None]:
    """Shares of the samples, of all and of the rare classes', that the full set's classifier gives the labels they were asked for."""
    right = (predict(net, samples) == labels).double()
    few = torch.isin(labels, torch.tensor(data.split_groups(counts, rule)[2]))
    return [float(part.mean()) if len(part) else None for part in (right, right[few])]


# ---- what is written -------------------------------------------------------------------------------------------------


def title_of(name: str, summary: dict) -> str:
    """How a row is called in tables and pictures."""
    return {"LT": "long tail", "full": "full set"}.get(name, f"+ {name}") + f" ({round(np.mean(summary['images'][name]))})"


def markdown(summary: dict) -> str:
    settings, seeds = summary["settings"], ", ".join(map(str, summary["seeds"]))
    lines = [
        f"Mean ± standard deviation over seeds {seeds}; in parentheses: training images, samples included; {summary['test']}; "
        f"{summary['recipe']['loss']} loss.\n",
        *heading(f"{settings['dataset']}, {settings['imbalance_ratio']:g} : 1", *(name.replace("top1_", "") for name in SCORES)),
    ]
    lines += [row(title_of(name, summary), [own[figure] for figure in SCORES]) for name, own in summary["table"].items()]
    if summary["agreement"]:
        lines += ["", *heading("samples that the full set's classifier takes for what they were asked to be", "all", "few")]
        lines += [row(name, list(zip(*values, strict=True))) for name, values in summary["agreement"].items()]
    return "\n".join(lines) + "\n"


def draw(folder: Path, summary: dict) -> None:
    about = f"{summary['settings']['dataset']}, {summary['recipe']['loss']} loss"
    rows = {title_of(name, summary): {figure: own[figure] for figure in SHOWN} for name, own in summary["table"].items()}
    plots.comparison(folder / "gda.png", rows, title=f"Recognition with generated images, {about}")
    groups = data.split_groups(summary["counts"], summary["settings"]["split_rule"])
    bars = {title_of(name, summary): values for name, values in summary["per_class"].items()}
    plots.class_bars(
        folder / "classes.png", bars, summary["counts"], groups, title="Accuracy class by class", ylabel="accuracy", caption=about
    )
