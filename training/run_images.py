"""One run of an image diffusion method from data to pictures: train, sample from the averaged weights, evaluate, draw."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, config, data, evaluate, plots, ranks
from .config import ImageConfig
from .diffusion import Diffusion, sample_images
from .ema import Ema
from .loop import generator, read_log, train
from .methods import analytic, diffrop
from .methods.cbdm import Balance
from .methods.ccua import Align
from .methods.ddpm import Denoise
from .methods.t2h import Calibrate
from .networks import build_denoiser
from .runfolder import check_device, finish, open_folder

STAGES = {
    "ddpm": Denoise, "cbdm": Balance, "t2h": Calibrate, "diffrop": diffrop.stage, "ccua": Align, "analytic": analytic.Ideal,
}  # fmt: skip
CONFIGS = config.IMAGE_CONFIGS
SCORES = evaluate.SCORES


def images(method: str, settings: ImageConfig, preset: ImageConfig) -> dict | None:
    """Train, sample, evaluate and write everything; returns what metrics.json holds, None on all ranks but the first."""
    began = time.perf_counter()
    with ranks.joined(settings.device):
        dataset = load(method, settings)
        modules = build_modules(settings, tuple(dataset.images.shape[1:]), dataset.num_classes)
        folder = config.run_folder(settings, method)
        if settings.finetune is not None and not (settings.resume and checkpoint.latest(folder, Denoise.name)):
            start_from(Path(settings.finetune), modules)
        stage = STAGES[method](dataset, modules, settings)
        notes = stage.notes()  # while there are ranks to speak of
        ranks.on_the_first(lambda: begin(method, settings, preset, dataset))
        if ranks.rank() == 0:
            stage.picture = lambda step: grid(folder, modules["ema"], settings, dataset, step)
            for name, text in notes.items():
                print(f"{name.replace('_', ' ')}: {text}", flush=True)
        train(stage, folder, seed=settings.seed, checkpoint_every=settings.checkpoint_every, progress=settings.progress)
        if ranks.rank() > 0:
            return None

    samples, labels = draw_samples(modules["ema"], settings, dataset.images.shape[1:], dataset.num_classes)
    write_samples(folder, samples, labels)
    plots.tiles(folder / "samples.png", samples[some_of_each(labels)])
    scores = evaluate.score(folder, settings, dataset, samples, labels) if settings.evaluate else {}
    report = {
        "method": method, **scores, "dataset": dataset.name, "counts": list(dataset.counts), **notes, **stage.report(), "baselines": {},
    }  # fmt: skip
    report["seconds"] = round(time.perf_counter() - began, 1)
    draw(folder, report)
    finish(folder, report)
    return report


# ---- before the first step -------------------------------------------------------------------------------------------


def begin(method: str, settings: ImageConfig, preset: ImageConfig, dataset: data.Dataset) -> None:
    """The run's folder. A wrong call leaves none behind, and nobody trains for days to learn that the samples cannot be evaluated."""
    if settings.evaluate:
        evaluate.check_reference(settings)
    open_folder(method, settings, preset, dataset)


def load(method: str, settings: ImageConfig) -> data.Dataset:
    """The training set, and the checks that need it or the machine."""
    if settings.finetune == config.RUN:
        raise ValueError(f"{method}: this preset goes on from the weights of a plain run (001, Table 8); give --finetune and its folder")
    dataset = data.load(
        settings.dataset, root=settings.root, imbalance_ratio=settings.imbalance_ratio, profile=settings.profile, seed=settings.seed,
        indices=settings.indices, image_size=settings.image_size, order=settings.class_order,
    )  # fmt: skip
    if dataset.images is None:
        raise ValueError(f"{method}: expected a data set of images; {settings.dataset} holds features")
    if settings.holdout:
        dataset, _ = data.train_holdout_split(dataset, settings.holdout, settings.seed)
    check_device(method, settings.device)
    if settings.batch_size % ranks.size():
        raise ValueError(f"{method}: batch_size must be a multiple of the {ranks.size()} ranks; got {settings.batch_size}")
    return dataset


def build_modules(settings: ImageConfig, shape: tuple[int, int, int], num_classes: int) -> dict[str, nn.Module]:
    """A freshly initialised network, a function of the seed, and the average of its weights."""
    channels, size, _ = shape
    mlp = settings.network == "mlp" or settings.network == "auto" and size <= 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(settings.seed, "network").initial_seed())
        net = build_denoiser(
            settings.network, channels, size, num_classes if settings.conditional else 0, width=settings.width or (256 if mlp else 128),
            dropout=settings.dropout, augment_dim=9 if settings.augment == "ada" else 0,
        )  # fmt: skip
    net = net.to(settings.device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format)
    return {"net": net, "ema": Ema(net, settings.ema_decay)}


def start_from(run: Path, modules: dict[str, nn.Module]) -> None:
    """The averaged weights of `run`, into network and average; the optimiser and its warm-up start anew (CBDM's fine-tuning)."""
    load_weights(run, {"ema": modules["ema"]})
    modules["net"].load_state_dict(modules["ema"].net.state_dict())


def load_weights(run: Path, modules: dict[str, nn.Module]) -> int:
    """Weights of the newest checkpoint of `run`; the step it was written after."""
    step = checkpoint.latest(run, Denoise.name)
    if step is None:
        raise FileNotFoundError(f"weights: expected the run of {', '.join(CONFIGS)} with a checkpoint; there is none in {run}")
    checkpoint.load_modules(run / "weights" / f"{Denoise.name}-{step:06d}.safetensors", modules)
    return step


# ---- after the last --------------------------------------------------------------------------------------------------


def sample_labels(count: int, num_classes: int, kind: str, seed: int) -> Tensor:
    """As many of each class as of every other, in order; or uniformly drawn."""
    if kind == "equal":
        return torch.arange(count) * num_classes // count
    return torch.randint(num_classes, (count,), generator=generator(seed, "sample", "labels"))


def draw_samples(
    net: nn.Module, settings: ImageConfig, shape: tuple[int, ...], num_classes: int, labels: Tensor | None = None, key: str = "sample",
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(images (N, C, H, W) uint8, labels (N,), -1 of an unconditional network), `sample_batch` at a time. Image i is a function of weights,
    seed, sample_batch, i and its label; with the sampler ddpm also of how many images its batch has."""
    seed = settings.seed if seed is None else seed
    if labels is None:
        labels = sample_labels(settings.samples, num_classes, settings.sample_labels, seed)
    diffusion, out = Diffusion(settings.timesteps, settings.beta_start, settings.beta_end), []
    net.eval()
    for number, part in enumerate(labels.split(settings.sample_batch)):
        rng = generator(seed, key, number, device=settings.device)
        x_T = torch.randn(settings.sample_batch, *shape, generator=rng, device=settings.device)[: len(part)]
        with torch.autocast(x_T.device.type, torch.bfloat16, enabled=settings.amp == "bf16"):
            x = sample_images(
                diffusion, net, x_T, part.to(x_T.device) if settings.conditional else None, rng=rng, sampler=settings.sampler,
                steps=settings.sample_steps, guidance=settings.omega, prediction=settings.prediction, clip_x0=settings.clip_x0,
                ddim_quirk=settings.ddim_quirk, variance=settings.variance,
                progress=f"samples {number * settings.sample_batch} to {number * settings.sample_batch + len(part)} of {len(labels)}"
                if settings.progress else None,
            )  # fmt: skip
        out.append(((x.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8))
    return torch.cat(out), labels if settings.conditional else torch.full_like(labels, -1)


def write_samples(folder: Path, samples: Tensor, labels: Tensor) -> None:
    for name, array in (("samples", samples), ("sample_labels", labels)):
        with checkpoint.replacing(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array.numpy())


def some_of_each(labels: Tensor, count: int = 8, classes: int = 20) -> Tensor:
    """Numbers of the first samples of each of the first classes."""
    return torch.cat([(labels == label).nonzero().flatten()[:count] for label in labels.unique()[:classes]])


def grid(folder: Path, net: nn.Module, settings: ImageConfig, dataset: data.Dataset, step: int) -> None:
    """Samples after `step` steps from the noise that every such picture starts from."""
    labels = torch.arange(dataset.num_classes).repeat_interleave(8)[:80]
    samples, _ = draw_samples(net, settings, dataset.images.shape[1:], dataset.num_classes, labels, "grid")
    plots.tiles(folder / "grids" / f"{step:06d}.png", samples)


def draw(folder: Path, report: dict) -> None:
    if rows := read_log(folder / "log.jsonl"):
        plots.loss_curves(folder / "losses.png", rows)
    if "transfer" in report:
        plots.transfer(folder / "transfer.png", report["transfer"])


# ---- python -m training sample ---------------------------------------------------------------------------------------


def sample_run(run: Path, out: Path, raw_weights: bool = False, seed: int | None = None, **changes) -> tuple[Tensor, Tensor]:
    """Samples from the newest checkpoint of `run`, with settings changed: samples.npy, sample_labels.npy and samples.png in `out`.

    seed: of the noise; the run's own also chose the training set, so config.json in `out` keeps it.
    """
    if out.resolve() == run.resolve():
        raise ValueError(f"sample: --out must be another folder than the run's, whose own samples its metrics.json describes; got {out}")
    stored = run / "config.json"
    if not stored.is_file():
        raise FileNotFoundError(f"sample: expected a run folder; there is no {stored}")
    about = json.loads(stored.read_text())
    if about.get("method") not in CONFIGS:
        raise ValueError(f"sample: expected a run of {', '.join(CONFIGS)}; {run} is one of {about.get('method')}")
    if changes.get("sampler") == "ddpm":
        changes = {"ddim_quirk": False, **changes}
    settings = dataclasses.replace(config.read(stored, CONFIGS[about["method"]]), **changes)
    check_device("sample", settings.device)
    shape, num_classes = tuple(about["data"]["shape"]), len(about["data"]["counts"])
    modules, kind = build_modules(settings, shape, num_classes), "net" if raw_weights else "ema"
    if isinstance(settings, config.AnalyticConfig):  # its weights are the training images
        modules[kind] = analytic.of_run(load("sample", settings), settings)
    else:
        load_weights(run, {kind: modules[kind]})
    samples, labels = draw_samples(modules[kind], settings, shape, num_classes, seed=seed)
    write_samples(out, samples, labels)
    plots.tiles(out / "samples.png", samples[some_of_each(labels)])
    drawn = {"weights": kind, "seed": settings.seed if seed is None else seed}
    checkpoint.write_json(out / "config.json", {**about, "settings": config.resolved(settings, settings), "drawn": drawn})  # for `evaluate`
    return samples, labels


def sample_main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training sample", description=f"Samples from a run of {', '.join(CONFIGS)}.")
    parser.add_argument("run", type=Path, help="run folder, of a finished run or of one with a checkpoint")
    parser.add_argument("--n", type=int, dest="samples", help="how many; this and the following: default as in the run")
    parser.add_argument("--omega", type=float)
    parser.add_argument("--sampler", choices=("ddim", "ddpm"))
    parser.add_argument("--steps", type=int, dest="sample_steps")
    parser.add_argument("--labels", choices=("equal", "uniform"), dest="sample_labels", help="as many of each class, or drawn")
    parser.add_argument("--ddim-quirk", action=argparse.BooleanOptionalAction, help="the released DDIM's steps")
    parser.add_argument("--clip-x0", action=argparse.BooleanOptionalAction, help="keep predicted images in [-1, 1]")
    parser.add_argument("--seed", type=int, help="of the noise")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--raw-weights", action="store_true", help="the network's own weights instead of their average")
    parser.add_argument("--out", type=Path, help="folder for samples.npy, sample_labels.npy, samples.png; default: RUN/samples")
    options = vars(parser.parse_args(arguments))
    run, out, raw = options.pop("run"), options.pop("out"), options.pop("raw_weights")
    out = out or run / "samples"
    sample_run(run, out, raw, **{name: value for name, value in options.items() if value is not None})
    print(f"samples.npy, sample_labels.npy and samples.png are in {out}")
    return 0
