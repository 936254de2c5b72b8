"""What the run of every method shares: the rows it works on, its folder, the scores and the table of clusterings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ltkernels

from . import card, checkpoint, config, data, metrics
from .config import RunConfig

SCORES = ("acc", "nmi", "ari", "acc_head", "acc_med", "acc_tail")


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows to train on, those that are kept from training, and all of them; head, medium and tail are those of all."""

    train: data.Dataset
    held: data.Dataset | None
    whole: data.Dataset

    def scores(self, label: np.ndarray) -> dict[str, float]:
        return metrics.cluster_scores(label, self.train.labels, self.whole.counts)

    def held_scores(self, label: np.ndarray) -> dict[str, float]:
        return metrics.cluster_scores(label, self.held.labels, self.whole.counts)


def load_rows(settings: RunConfig, width: int | None = None) -> Rows:
    dataset = data.load(
        settings.dataset, root=settings.root, imbalance_ratio=settings.imbalance_ratio, profile=settings.profile,
        seed=settings.seed, indices=settings.indices, image_size=settings.image_size, width=width,
    )  # fmt: skip
    train, held = data.train_holdout_split(dataset, settings.holdout, settings.seed) if settings.holdout else (dataset, None)
    return Rows(train, held, dataset)


def check_clusters(method: str, settings: RunConfig, dataset: data.Dataset, least: int = 1) -> None:
    """What can only be checked once the data are there."""
    clusters = settings.clusters or dataset.num_classes
    if not least <= clusters <= len(dataset):
        raise ValueError(f"{method}: clusters must be in [{least}, N]; got {clusters} with N={len(dataset)}")
    check_device(method, settings.device)


def check_device(command: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{command}: device cuda needs a GPU and a torch built for it; found none, use --device cpu")


def open_folder(method: str, settings: RunConfig, preset: RunConfig, dataset: data.Dataset, *, may_change: bool = False) -> Path:
    """Create the run folder, or enter it to resume. A folder with a run in it is never touched without being told how.

    may_change: a resumed run may have other settings than before, which are then written down: its artefacts know what they were made of.
    """
    folder = config.run_folder(settings, method)
    stored, changed = folder / "config.json", []
    if settings.resume and settings.overwrite:
        raise ValueError(f"{method}: give --resume or --overwrite, not both")
    if settings.resume:
        if not stored.is_file():
            raise FileNotFoundError(f"{method}: --resume needs a run in {folder}; there is no {stored}")
        changed = config.differences(config.read(stored, type(settings)), settings)
        if changed and not may_change:
            raise ValueError(f"{method}: --resume goes on with the run's own settings; {folder} has {'; '.join(changed)}")
    elif folder.exists() and any(folder.iterdir()):
        if not settings.overwrite:
            state = "a finished run" if (folder / "metrics.json").exists() else "something"
            raise FileExistsError(f"{method}: {folder} already holds {state}; give --resume, --overwrite or another --out")
        if not stored.is_file():
            raise FileExistsError(f"{method}: --overwrite deletes runs only, and {folder} holds no config.json")
        config.read(stored, type(settings))  # another program's config.json is refused
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "card.md") if changed else ():  # they speak of the settings before
        (folder / name).unlink(missing_ok=True)
    if not settings.resume or changed:
        versions = {"torch": torch.__version__, "numpy": np.__version__, "ltkernels": getattr(ltkernels, "__version__", "?")}
        shape = {"shape": list(dataset.data.shape[1:]), "counts": list(dataset.counts)}
        stated = {"method": method, "settings": config.resolved(settings, preset), "data": shape, "versions": versions}
        checkpoint.write_json(stored, stated)
        data.save_indices(dataset, folder / "indices.json")
    return folder


def finish(folder: Path, report: dict) -> None:
    """card.md and metrics.json, whose presence says that the run is finished."""
    card.write(folder, report)
    checkpoint.write_json(folder / "metrics.json", report)


def table(report: dict, columns: Sequence[str] = SCORES) -> str:
    """The comparison as aligned text."""
    return aligned({report["method"].upper(): report, **report["baselines"]}, columns)


def aligned(rows: Mapping[str, Mapping], columns: Sequence[str]) -> str:
    width = max(10, *map(len, rows))
    lines = ["  ".join([f"{'method':<{width}}", *(f"{column:>8}" for column in columns)])]
    for name, row in rows.items():
        lines.append("  ".join([f"{name:<{width}}", *(f"{row[c]:8.3f}" if row.get(c) is not None else f"{'-':>8}" for c in columns)]))
    return "\n".join(lines)
