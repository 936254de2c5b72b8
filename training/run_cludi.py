"""One run of CLUDI from data to pictures: features, teacher and student, the other clusterings of the same features."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, data, metrics, plots, run
from .clustering import gmm_labels, kmeans_labels, spectral_labels
from .config import CLUDIConfig, DGDConfig
from .heads import HEADS
from .loop import batches_per_epoch, generator, read_log, train
from .methods.cludi import CLUDI, Distil
from .methods.dgd import LatentDiffusion, Pretrain
from .networks import AssignmentNet
from .runfolder import check_clusters, finish, load_rows, open_folder
from .views import perturb_features


def cludi(settings: CLUDIConfig, preset: CLUDIConfig, encoder_from: Path | None = None) -> dict:
    """Train, evaluate and write everything; returns what metrics.json holds. encoder_from: a run of the same data, seed and encoder."""
    began = time.perf_counter()
    rows = load_rows(settings, settings.feature_width)
    check_clusters("cludi", settings, rows.train, least=2)
    clusters = settings.clusters or rows.train.num_classes
    prior = class_prior(settings, rows.train, clusters).to(settings.device)
    extractor = Features(rows.train, settings)
    folder = open_folder("cludi", settings, preset, rows.train)  # last of what can go wrong: a wrong call leaves no folder behind
    if encoder_from is not None:
        checkpoint.borrow(encoder_from, folder, Pretrain.name)
    step = {"seed": settings.seed, "checkpoint_every": settings.checkpoint_every, "progress": settings.progress}

    x = extractor.fit(folder, step)
    new = None if rows.held is None else extractor(rows.held.data.to(settings.device))
    method, net, restarts = learn(x, clusters, settings, prior, folder, step)
    logits, embedding = method.assign(net, x, generator(settings.seed, "evaluate", device=x.device))
    label = method.probabilities(logits).argmax(1).cpu().numpy()
    sizes = np.bincount(label, minlength=clusters)

    labels = {"cludi": (label, None)}
    if new is not None:
        held_logits, _ = method.assign(net, new, generator(settings.seed, "evaluate", "holdout", device=x.device))
        labels["cludi"] = label, method.probabilities(held_logits).argmax(1).cpu().numpy()
    if settings.baselines:
        labels.update(comparisons(x, new, clusters, settings, folder, step))
    table = {name: rows.scores(own) for name, (own, _) in labels.items()}
    report = {
        **table.pop("cludi"),
        "method": "cludi",
        "dataset": rows.train.name,
        "n": len(rows.train),
        "counts": list(rows.train.counts),
        "features": extractor.description,
        "class_prior": settings.class_prior,
        "smallest_cluster_share": float(sizes.min() / len(label) * clusters),  # of a uniform share
        "restarts": restarts,
        "samples": averaging(method, net, x, logits, rows.train.labels, settings),
        "baselines": table,
    }
    if new is not None:
        report["holdout"] = {"n": len(rows.held), **{name: rows.held_scores(held) for name, (_, held) in labels.items()}}
    report["seconds"] = round(time.perf_counter() - began, 1)
    draw(folder, embedding, label, rows.train, report, settings)
    finish(folder, report)
    return report


# ---- before the first step -------------------------------------------------------------------------------------------


class Features:
    """The features that every method of the table clusters: a feature file's rows, an image's pixels, or the latents of DGD's encoder
    after its stage 1; then --feature-norm with the statistics of the training rows."""

    def __init__(self, dataset: data.Dataset, settings: CLUDIConfig):
        self.x, self.settings, self.encoder = dataset.data.to(settings.device), settings, None
        if dataset.images is not None and settings.features == "encoder":
            self.dgd = dgd_settings(settings, encoder="auto", encoder_epochs=settings.encoder_epochs, latent_dim=settings.latent_dim)
            self.encoder = run.build_modules(self.x, self.dgd)
        source = "file" if dataset.images is None else settings.features
        self.description = f"{source}, {settings.feature_norm} norm"

    def fit(self, folder: Path, step: dict) -> Tensor:
        if self.encoder is not None:
            train(Pretrain(self.x, self.encoder, self.dgd), folder, **step)
        raw = self.raw(self.x)
        self.mean, self.scale = raw.mean(0), raw.std(0).clamp(min=1e-6 * float(raw.std().clamp(min=1e-30)))  # pixels that never change
        self.description += f", d = {raw.shape[1]}"
        return self(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        norm, x = self.settings.feature_norm, self.raw(x)
        if norm.startswith("standard"):
            x = (x - self.mean) / self.scale
        # Unit mean square, not unit length: only the noise of --augment gaussian, given per coordinate, could tell the two apart.
        return F.normalize(x, dim=1) * math.sqrt(x.shape[1]) if norm.endswith("l2") else x

    @torch.no_grad()
    def raw(self, x: Tensor) -> Tensor:
        if self.encoder is None:
            return x.flatten(1)
        return torch.cat([self.encoder["latent"].encoder(part) for part in x.split(1024)])


def class_prior(settings: CLUDIConfig, dataset: data.Dataset, clusters: int) -> Tensor:
    """p(k), (K,). The empirical one knows how many rows every class has, and of no row which class is its own."""
    if settings.class_prior == "uniform":
        return torch.full((clusters,), 1 / clusters)
    if settings.class_prior == "empirical":
        values, what = [float(count) for count in dataset.counts], "classes"
    else:
        values, what = [float(part) for part in settings.class_prior.split(",")], "numbers"
    if len(values) != clusters:
        raise ValueError(f"cludi: class_prior needs one entry a cluster, {clusters}; got {len(values)} {what}")
    if min(values) == 0:
        raise ValueError(f"cludi: class_prior empirical needs rows of every class; class {values.index(0)} has none")
    shares = [value / max(values) for value in values]
    if min(shares) < 1e-30:  # float32 would take it for none at all
        raise ValueError(f"cludi: class_prior must be within a factor of 1e30; got {min(values)} beside {max(values)}")
    return torch.tensor(shares) / sum(shares)


def dgd_settings(settings: CLUDIConfig, **more) -> DGDConfig:
    """DGD's settings for the same data, seed and machine."""
    shared = {name: getattr(settings, name) for name in ("dataset", "seed", "clusters", "device", "progress", "checkpoint_every")}
    return DGDConfig(**shared, **more)


def learn(
    x: Tensor, clusters: int, settings: CLUDIConfig, prior: Tensor, folder: Path, step: dict
) -> tuple[CLUDI, AssignmentNet, dict[str, object]]:
    """The method, the best of --restarts networks, and what told it from the others: a bad start merges two classes for good."""
    method, nets = CLUDI(settings, prior), []
    for i in range(settings.restarts):
        modules = build_modules(x, clusters, settings, i)
        train(Distil(x, modules, settings, prior, f"distil-{i}"), folder, **step)
        nets.append(modules["net"])
    draw = lambda: generator(settings.seed, "evaluate", "restarts", device=x.device)  # noqa: E731  the same noise for every one
    scores = [method.score(net, x, draw()) for net in nets]
    best = scores.index(min(scores))
    return method, nets[best], {"class_loss": scores, "chosen": best}


def build_modules(x: Tensor, clusters: int, settings: CLUDIConfig, restart: int = 0) -> dict[str, nn.Module]:
    """A freshly initialised network: a function of (seed, restart)."""
    dim = settings.embedding_dim or (32 if clusters < 100 else 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(settings.seed, "network", restart).initial_seed())
        net = AssignmentNet(x.shape[1], dim, clusters, settings.timesteps, settings.width, settings.depth, settings.embed_trainable)
    return {"net": net.to(x.device)}


# ---- comparisons -----------------------------------------------------------------------------------------------------


def comparisons(
    x: Tensor, new: Tensor | None, clusters: int, settings: CLUDIConfig, folder: Path, step: dict
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Labels of features x, and of unseen features `new`, by every other method."""
    labels = {}
    rivals = {"kmeans": kmeans_labels, "gmm": gmm_labels, "spectral": spectral_labels}
    for name, rival in tqdm(rivals.items(), desc="comparisons", disable=not settings.progress, leave=False):
        labels[name] = rival(x, clusters, settings.seed, new)
    for kind in HEADS:
        head = kind(x, clusters, settings)
        train(head, folder, **step)
        labels[head.name] = head.labels(x), None if new is None else head.labels(new)
    labels["dgd"] = dgd_labels(x, new, clusters, settings, folder, step)
    return labels


def dgd_labels(
    x: Tensor, new: Tensor | None, clusters: int, settings: CLUDIConfig, folder: Path, step: dict
) -> tuple[np.ndarray, np.ndarray | None]:
    """DGD's clusters of real and guided generated features. The features are fixed, so its stages 1 and 3 have no encoder to train."""
    own = dgd_settings(settings, encoder="identity", latent_norm="none", k=min(64, len(x) - 1))
    epochs = -(-settings.baseline_steps // batches_per_epoch(len(x), own.batch_size))
    own = dataclasses.replace(own, diffusion_epochs=epochs)
    modules = run.build_modules(x, own)
    train(LatentDiffusion(x, modules, own), folder, **step)
    found = run.outcome(x, modules, own, clusters).clusters
    return tuple(None if part is None else found.labels(part).cpu().numpy() for part in (x, new))


# ---- evaluation ------------------------------------------------------------------------------------------------------


def averaging(method: CLUDI, net: AssignmentNet, x: Tensor, clean: Tensor, labels: Tensor, settings: CLUDIConfig, draws: int = 10) -> dict:
    """ACC against the number of averaged assignments, for features as they are and as the student sees them (Fig. 2).

    {"count": [1, 2, 4, ..., M], "clean": [[ACC of `draws` choices of so many of the M samples], ...], "augmented": the same}
    """
    rng = generator(settings.seed, "evaluate", "averaging", device=x.device)
    view = perturb_features(
        x.expand(len(clean), *x.shape), rng, settings.augment,
        (settings.aug_noise_min, settings.aug_noise_max), (settings.aug_drop_min, settings.aug_drop_max),
    )  # fmt: skip
    sets = {"clean": clean, "augmented": method.assign(net, view, rng)[0]}
    counts = [2**i for i in range(int(math.log2(len(clean))) + 1)]
    out = {"count": counts}
    for name, logits in sets.items():
        choices = [[torch.randperm(len(logits), generator=rng, device=x.device)[:count] for _ in range(draws)] for count in counts]
        out[name] = [
            [metrics.clustering_accuracy(method.probabilities(logits[choice]).argmax(1), labels) for choice in row] for row in choices
        ]
    return out


def draw(folder: Path, embedding: Tensor, label: np.ndarray, dataset: data.Dataset, report: dict, settings: CLUDIConfig) -> None:
    plots.assignments(folder / "embedding.png", embedding, label, dataset.labels, seed=settings.seed)
    plots.confusion(folder / "confusion.png", label, dataset.labels)
    plots.averaging(folder / "averaging.png", report["samples"])
    stage = f"distil-{report['restarts']['chosen']}"
    rows = [row for row in read_log(folder / "log.jsonl") if row["stage"] == stage]
    if rows:
        plots.loss_curves(folder / "losses.png", rows, ["loss", "loss_dif", "loss_cls"])
