"""One run of DGD from data to pictures: the three stages, the same run without guidance, the comparisons."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ltkernels

from . import data, plots
from .clustering import SoftClusters, kmeans_labels, spectral_labels
from .config import DGDConfig
from .loop import generator, read_log, train
from .methods.dgd import DensityGuidance, Joint, LatentDiffusion, Pretrain, cluster, fit_guidance, generate
from .networks import Denoiser, LatentSpace, build_encoder, mlp
from .runfolder import check_clusters, finish, load_rows, open_folder


@dataclass(frozen=True, eq=False)
class Outcome:
    """What networks come to on a data set: latents, their density field, generated latents, clusters."""

    real: Tensor  # (N, d)
    field: DensityGuidance
    generated: Tensor  # (M, d) with this run's guidance
    unguided: Tensor  # (M, d) without, of the same noise
    clusters: SoftClusters


def dgd(settings: DGDConfig, preset: DGDConfig) -> dict:
    """Train, evaluate and write everything; returns what metrics.json holds."""
    began = time.perf_counter()
    rows = load_rows(settings)
    train_set, held = rows.train, rows.held
    check_against(settings, train_set)
    device = torch.device(settings.device)
    x, clusters = train_set.data.to(device), settings.clusters or train_set.num_classes
    new = None if held is None else held.data.to(device)
    modules = build_modules(x, settings)
    folder = open_folder("dgd", settings, preset, train_set)  # last of what can go wrong: a wrong call leaves no folder behind
    step = {"seed": settings.seed, "checkpoint_every": settings.checkpoint_every, "progress": settings.progress}

    train(Pretrain(x, modules, settings), folder, **step)
    train(LatentDiffusion(x, modules, settings), folder, **step)
    before = outcome(x, modules, settings, clusters)
    after, networks = {}, {}
    arms = {"joint": settings, "joint-eta0": dataclasses.replace(settings, eta0=0.0)}
    for name, arm in arms.items():  # they share stages 1 and 2
        networks[name] = copy.deepcopy(modules)
        train(Joint(x, networks[name], arm, clusters, name), folder, **step)
        after[name] = outcome(x, networks[name], arm, clusters)

    with tqdm(total=1, desc="comparisons", disable=not settings.progress, leave=False) as bar:
        z, z_new = after["joint"].real, None if held is None else networks["joint"]["latent"].encode(new)
        rivals = {"kmeans": kmeans_labels, "spectral": spectral_labels}
        labels = {name: label(z, clusters, settings.seed, z_new) for name, label in rivals.items()}
        for name, arm in (("dgd", "joint"), ("eta0=0", "joint-eta0")):
            own_new = None if held is None else after[arm].clusters.labels(networks[arm]["latent"].encode(new))
            labels[name] = after[arm].clusters.labels(after[arm].real), own_new
        bar.update()
    table = {name: rows.scores(label) for name, (label, _) in labels.items()}
    report = {
        **table.pop("dgd"),
        "method": "dgd",
        "dataset": train_set.name,
        "n": len(train_set),
        "counts": list(train_set.counts),
        "latents": f"{settings.encoder} encoder, {settings.latent_norm} norm, d = {z.shape[1]}",
        "baselines": table,
        "stages": {
            "pretrain": {"kmeans": rows.scores(kmeans_labels(before.real, clusters, settings.seed)[0])},
            "diffusion": {"dgd": rows.scores(before.clusters.labels(before.real))},
        },
        "guidance": {
            "after_diffusion": guidance_figures(before, train_set),
            "after_joint": guidance_figures(after["joint"], train_set),
            "after_joint_eta0=0": guidance_figures(after["joint-eta0"], train_set),
        },
    }
    if held is not None:
        report["holdout"] = {"n": len(held), **{name: rows.held_scores(label) for name, (_, label) in labels.items()}}
    report["seconds"] = round(time.perf_counter() - began, 1)
    draw(folder, after["joint"])
    finish(folder, report)
    return report


# ---- before the first step --------------------------------------------------------------------------------------------------


def check_against(settings: DGDConfig, dataset: data.Dataset) -> None:
    """What can only be checked once the data are there."""
    if settings.k > len(dataset) - 1:
        raise ValueError(f"dgd: k must be in [1, N - 1], a latent is no neighbour of itself; got k={settings.k} with N={len(dataset)}")
    check_clusters("dgd", settings, dataset)


def build_modules(x: Tensor, settings: DGDConfig) -> dict[str, nn.Module]:
    """Freshly initialised networks: a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = build_encoder(settings.encoder, x[:2].cpu(), settings.latent_dim)
        latent = LatentSpace(encoder, settings.latent_norm, x[:2].cpu())
        head = mlp(latent.dim, settings.head_dim, width=128)
        denoiser = Denoiser(latent.dim, settings.timesteps, settings.denoiser_width)
    modules = {"latent": latent, "head": head, "denoiser": denoiser}
    return {name: module.to(x.device) for name, module in modules.items()}


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outcome(x: Tensor, modules: dict[str, nn.Module], settings: DGDConfig, clusters: int) -> Outcome:
    real = modules["latent"].encode(x)
    field = fit_guidance(real, settings)
    guided, plain = (
        generate(modules["denoiser"], real, guide, len(real), settings, generator(settings.seed, "evaluate", device=x.device))
        for guide in (field if settings.guided else None, None)
    )
    rng = generator(settings.seed, "evaluate", "clusters", device=x.device)
    return Outcome(real, field, guided, plain, cluster(real, guided, clusters, settings, rng))


def guidance_figures(result: Outcome, dataset: data.Dataset) -> dict[str, dict[str, float]]:
    """Where generated latents lie: log-density under the real ones (real ones leave-one-out; a generated one is not in the bank),
    distance to the nearest real one beside the real ones' own, and the share of them that is nearest to the tail classes."""
    field, tail = result.field, list(data.split_groups(dataset.counts)[2])
    out = {}
    for name, z in {"real": result.real, "guided": result.generated, "unguided": result.unguided}.items():
        own = True if name == "real" else None
        density = ltkernels.knn_kde_grad(z, field.bank, field.k, bandwidth=field.bandwidth, self_index=own).log_density
        near = ltkernels.knn(z, field.bank, 1, self_index=own)
        distance, label = near.sqdist[:, 0].sqrt(), dataset.labels.to(z.device)[near.index[:, 0]]
        out[name] = {
            "log_density": float(density.mean()),
            "nearest_real_p50": float(distance.quantile(0.5)),
            "nearest_real_p95": float(distance.quantile(0.95)),
            "nearest_tail_share": float(torch.isin(label, torch.tensor(tail, device=z.device)).double().mean()),
        }
        if name == "real":
            limit = distance.quantile(0.95)
        out[name]["within_real_p95"] = float((distance <= limit).double().mean())
    return out


def draw(folder: Path, result: Outcome) -> None:
    field = result.field
    kde = ltkernels.knn_kde_grad(result.real, field.bank, field.k, bandwidth=field.bandwidth, self_index=True)
    sets = {"eta0 = 0": result.unguided, "guided": result.generated}
    plots.latents(folder / "latents.png", result.real, kde.log_density, kde.score, sets, title="DGD's latents: density, score, samples")
    dense = {name: ltkernels.knn_kde_grad(z, field.bank, field.k, bandwidth=field.bandwidth).log_density for name, z in sets.items()}
    plots.density_histogram(folder / "density.png", kde.log_density, dense)
    curves = [
        {"step": row["step"], **{f"{row['stage']}_{name}": row[name] for name in ("loss", "loss_dm", "loss_infonce") if name in row}}
        for row in read_log(folder / "log.jsonl")
    ]
    keys = ("pretrain_loss", "diffusion_loss", "joint_loss_dm", "joint_loss_infonce")
    if present := [key for key in keys if any(key in row for row in curves)]:
        plots.loss_curves(folder / "losses.png", curves, present)
