"""One run of DiffRC: source model, target model, encoder, samples, classifier, with an artefact after each of them.

artefacts.json says what each was made of: the settings that it depends on and the keys of the artefacts that it was made from. So a run
goes on from its last artefact, a stage can be made again by itself, another run can take what it would make with the same bits (--source),
and what was made with other settings is refused by name rather than used.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import ltkernels

from . import checkpoint, config, data, plots
from .config import DDPMConfig, DiffRCConfig
from .diffusion import Diffusion, sample
from .ema import Ema
from .evaluate import to_uint8
from .loop import generator, read_log, train
from .methods.ddpm import Denoise
from .methods.diffrc import LEAST, Adapt, DiffRC, Prototypes, Prototypical
from .networks import NoisyEncoder, build_denoiser
from .recognition import RECIPES, Recipe, predict, recipe_of, recognition_scores, to_unit, train_classifier
from .run_images import write_samples
from .runfolder import check_device, finish, load_rows, open_folder

STAGES = ("source", "target", "encoder", "samples", "classifier")
SCORES = ("top1", "top1_many", "top1_med", "top1_few", "std")
BASELINES = ("softmax", "balanced")  # classifiers of the real images alone
METHOD = tuple(item.name for item in dataclasses.fields(DiffRC) if item.name != "class_counts")

# ---- what a stage depends on, beside the images and the artefacts that it starts from. Every setting is in one of these.
DATA = ("dataset", "imbalance_ratio", "profile", "indices", "image_size", "holdout", "seed")
NOISE = ("timesteps", "beta_start", "beta_end")
NETWORK = ("network", "width", "flip")
SPLIT = ("head_classes", "split_rule")  # as the classes that they make
SETTINGS = {
    "source": (*NOISE, *NETWORK, "dropout", "batch_size", "lr", "warmup", "ema_decay", "clip", "source_steps"),
    "target": ("target_steps", "group_size", "group_classes", "lam", "pair_gamma", "pair_weight", "pair_kl", "pair_t", "pair_reduce"),
    "encoder": (*NOISE, *NETWORK, "batch_size", "encoder_steps", "encoder_lr", "encoder_dim", "proto_momentum", "tau", "pc_prior"),
    "samples": (
        "sample_steps", "s", "guidance_sign", "grad_norm", "clip_x0", "fill", "fill_ratio", "fill_count", "label_by", "filter_conf",
        "fill_tries", "sample_batch",
    ),
    "classifier": ("recipe", "classifier_steps", "classifier_loss"),
    **dict.fromkeys(BASELINES, ("recipe", "classifier_steps")),
}  # fmt: skip


def diffrc(settings: DiffRCConfig, preset: DiffRCConfig) -> dict | None:
    """Make what is missing of the stages that are asked for and write everything; returns what metrics.json holds, None before stage 5."""
    began = time.perf_counter()
    wanted = chosen(settings.stages)
    dataset = load(settings)
    test = data.test_set(settings.dataset, root=settings.root, image_size=settings.image_size)
    run = Pipeline(settings, dataset)
    run.check(wanted)
    open_folder("diffrc", settings, preset, dataset, may_change=settings.stages is not None)
    for name, text in run.notes().items():
        print(f"{name}: {text}", flush=True)
    if settings.source is not None:
        run.borrow(Path(settings.source))
    for stage in wanted:
        run.make(stage)
    if STAGES[-1] not in wanted:
        print(f"stages {', '.join(str(STAGES.index(stage) + 1) for stage in wanted)} are made; {run.folder}", flush=True)
        return None
    report = run.report(test)
    report["seconds"] = round(time.perf_counter() - began, 1)
    run.draw(report)
    finish(run.folder, report)
    return report


# ---- before the first step -------------------------------------------------------------------------------------------


def chosen(text: str | None) -> tuple[str, ...]:
    """The stages of "4", "4,5" or "1-3"; None: all."""
    if text is None:
        return STAGES
    ends = [part.partition("-") for part in text.split(",")]
    ends = [(first.strip(), (last if dash else first).strip()) for first, dash, last in ends]
    if not all(end.isdecimal() and 1 <= int(end) <= len(STAGES) for pair in ends for end in pair) or any(int(a) > int(b) for a, b in ends):
        raise ValueError(f"diffrc: --stages must be numbers of 1 to {len(STAGES)}, as in 4 or 4,5 or 1-3; got {text!r}")
    numbers = {number for first, last in ends for number in range(int(first), int(last) + 1)}
    return tuple(stage for number, stage in enumerate(STAGES, 1) if number in numbers)


def load(settings: DiffRCConfig) -> data.Dataset:
    """The training set, and the checks that need it or the machine."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"diffrc: trains in one process; got WORLD_SIZE={os.environ['WORLD_SIZE']}")
    dataset = load_rows(settings).train
    if dataset.images is None:
        raise ValueError(f"diffrc: expected a data set of images; {settings.dataset} holds features")
    check_device("diffrc", settings.device)
    return dataset


def head_of(settings: DiffRCConfig, dataset: data.Dataset) -> list[int]:
    """The H most frequent classes, by falling counts."""
    order = sorted(range(dataset.num_classes), key=lambda label: -dataset.counts[label])
    count = settings.head_classes or len(data.split_groups(dataset.counts, settings.split_rule)[0])
    seen = sum(n > 0 for n in dataset.counts)
    if not 1 <= count < seen:
        hint = "" if settings.head_classes else f", the many classes by --split-rule {settings.split_rule}; give --head-classes"
        raise ValueError(f"diffrc: the source model needs between 1 and {seen - 1} of {seen} classes with images; got {count}{hint}")
    return order[:count]


def wanted_images(settings: DiffRCConfig, dataset: data.Dataset, head: list[int]) -> Tensor:
    """Images to generate of each class, (C,): none of the head's, and none of a class that nothing was seen of."""
    counts = torch.tensor(dataset.counts)
    of = {
        "max": counts.max() - counts,
        "ratio": (settings.fill_ratio * counts).round().long(),
        "fixed": torch.full_like(counts, settings.fill_count),
    }[settings.fill]
    of[head] = 0
    return of.where(counts > 0, 0)


def denoising_settings(settings: DiffRCConfig, steps: int) -> DDPMConfig:
    """What the stage of plain denoising knows of our settings."""
    names = (*NOISE, *NETWORK, "dropout", "batch_size", "lr", "warmup", "ema_decay", "clip", "seed", "device")
    return DDPMConfig(**{name: getattr(settings, name) for name in names}, steps=steps, conditional=False, cfg_drop=0.0)


# ---- the stages ------------------------------------------------------------------------------------------------------


class Pipeline:
    """The stages of one run and what each leaves in the run's folder."""

    def __init__(self, settings: DiffRCConfig, dataset: data.Dataset):
        self.settings, self.dataset, self.folder = settings, dataset, config.run_folder(settings, "diffrc")
        self.head = head_of(settings, dataset)
        self.wanted = wanted_images(settings, dataset, self.head)
        options = {name: getattr(settings, name) for name in METHOD if name != "momentum"}
        self.method = DiffRC(torch.tensor(dataset.counts, device=settings.device), momentum=settings.proto_momentum, **options)
        self.diffusion = Diffusion(*(getattr(settings, name) for name in NOISE))
        self.by_classifier = settings.label_by == "classifier" or settings.label_by == "auto" and settings.s == 0
        self.flips = settings.flip == "yes" or settings.flip == "auto" and not dataset.name.startswith("digits")
        self.step = {"seed": settings.seed, "checkpoint_every": settings.checkpoint_every, "progress": settings.progress}
        # what each stage is made from; of what a run does not need, nothing is made
        judged = ("balanced",) if self.by_classifier or settings.filter_conf > 0 else ()
        self.parents = {
            "source": (), "target": ("source",), "encoder": (), "softmax": (), "balanced": (),
            "samples": ("target", *(["encoder"] if settings.s > 0 else []), *judged),
            "classifier": ("samples", *BASELINES),
        }  # fmt: skip
        self.made_of = self._made_of()

    def _made_of(self) -> dict[str, dict]:
        images = checkpoint.digest(self.dataset.images, self.dataset.labels, self.dataset.num_classes)[:12]
        out = {}
        for stage in ("source", "target", "encoder", *BASELINES, "samples", "classifier"):
            about = {name: getattr(self.settings, name) for name in (*DATA, *SETTINGS[stage])}
            about["images"] = images
            if stage in ("source", "target", "samples"):
                about["head"] = self.head
            own = {parent: key_of(out[parent]) for parent in self.parents[stage] if parent not in BASELINES or stage == "samples"}
            out[stage] = {**about, **own}
        return out

    # ---- artefacts

    def found(self, folder: Path | None = None) -> dict[str, dict]:
        """artefacts.json: {stage: {"made_of": .., "done": ..}}."""
        path = (folder or self.folder) / "artefacts.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text())
            if not (isinstance(found, dict) and all(isinstance(one, dict) and {"made_of", "done"} == set(one) for one in found.values())):
                raise ValueError(f"expected stages with made_of and done; got {found!r:.100}")
        except ValueError as error:
            raise ValueError(f"diffrc: {path} is damaged ({error}); give --overwrite, or another --out") from error
        return found

    def note(self, stage: str, done: bool) -> None:
        checkpoint.write_json(self.folder / "artefacts.json", {**self.found(), stage: {"made_of": self.made_of[stage], "done": done}})

    def check(self, wanted: tuple[str, ...]) -> None:
        """Refuse a wrong call before anything is touched: artefacts that would be used, but are of other settings or not there."""
        found = self.found() if self.settings.resume else {}
        if self.settings.source is not None:
            theirs = self.found(Path(self.settings.source))
            if not theirs.get("source", {}).get("done"):
                raise ValueError(f"diffrc: --source needs a run of diffrc whose stage 1 is finished; got {self.settings.source}")
            if changed := differences(theirs["source"]["made_of"], self.made_of["source"]):
                raise ValueError(f"diffrc: stage 1 (source) of --source {self.settings.source} is of other settings ({'; '.join(changed)})")
            found = {**{stage: one for stage, one in theirs.items() if one == {"made_of": self.made_of[stage], "done": True}}, **found}
        again = set(wanted) if self.settings.stages is not None else set()
        needed = [parent for stage in wanted for parent in self.parents[stage]]
        for stage in STAGES:
            number, there = STAGES.index(stage) + 1, found.get(stage)
            if stage in again or stage not in (*needed, *wanted):
                continue
            if there is not None and (changed := differences(there["made_of"], self.made_of[stage])):
                way = f"give --stages {number} to make it again, or another --out"
                raise ValueError(f"diffrc: stage {number} ({stage}) in {self.folder} is of other settings ({'; '.join(changed)}); {way}")
            if stage not in wanted and not (there or {}).get("done"):
                raise ValueError(f"diffrc: --stages {self.settings.stages} needs stage {number} ({stage}); {self.folder} does not have it")

    def borrow(self, source: Path) -> None:
        """Take from another run what it made with the same settings, but for samples."""
        theirs = self.found(source)
        for stage in ("source", "target", "encoder", *BASELINES):
            same = theirs.get(stage, {}) == {"made_of": self.made_of[stage], "done": True}
            if same and stage not in self.found():
                checkpoint.borrow(source, self.folder, stage)
                if stage in BASELINES:
                    checkpoint.write_json(self.folder / f"{stage}.json", json.loads((source / f"{stage}.json").read_text()))
                self.note(stage, done=True)

    def make(self, stage: str) -> None:
        """The artefact of `stage`, and of what it is made from; what is there and finished stays."""
        for parent in self.parents[stage]:
            self.make(parent)
        there = self.found().get(stage)
        if there == {"made_of": self.made_of[stage], "done": True}:
            if (damage := self.damage(stage)) is None:
                return
            print(f"{stage}: {damage}; it is made again", flush=True)
            self.discard(stage)
            there = None
        if there is not None and there["made_of"] != self.made_of[stage]:
            self.discard(stage)
        elif there is None:
            self.clear(stage)  # what a call that was killed while it discarded has left
        self.note(stage, done=False)
        getattr(self, f"make_{stage}")()
        self.note(stage, done=True)

    def damage(self, stage: str) -> str | None:
        """What is wrong with the files of a finished stage: lengths and headers are looked at, not every number."""
        if stage == "samples":
            files = [self.folder / f"{name}.npy" for name in ("samples", "sample_labels")]
            files += sorted((self.folder / "samples").glob("*.safetensors"))
        else:
            step = checkpoint.latest(self.folder, stage)
            files = [self.folder / "weights" / (f"{stage}.safetensors" if step is None else f"{stage}-{step:06d}.safetensors")]
        lengths = []
        for path in files:
            try:
                if path.suffix == ".npy":
                    lengths.append(len(np.load(path, mmap_mode="r")))
                else:
                    with safe_open(path, "pt") as file:
                        lengths += [int(file.get_tensor("keep").sum())] if stage == "samples" else []
            except (OSError, ValueError, SafetensorError) as error:
                return f"{path} is lost or damaged ({error})"
        if stage == "samples" and not lengths[0] == lengths[1] == sum(lengths[2:]):
            return f"{self.folder}: samples are lost or damaged ({lengths[0]} images, {lengths[1]} labels, parts of {lengths[2:]})"
        return None

    def discard(self, stage: str) -> None:
        found = self.found()
        del found[stage]
        checkpoint.write_json(self.folder / "artefacts.json", found)  # first: an artefact that is not noted down is none
        for name in ("metrics.json", "card.md"):  # they speak of what is no more
            (self.folder / name).unlink(missing_ok=True)
        self.clear(stage)

    def clear(self, stage: str) -> None:
        checkpoint.discard(self.folder, stage)
        (self.folder / f"{stage}.json").unlink(missing_ok=True)
        for part in (self.folder / "samples").glob("*.safetensors") if stage == "samples" else ():
            part.unlink()

    def load(self, stage: str, modules: Mapping[str, nn.Module]) -> None:
        """Weights of a finished stage."""
        step = checkpoint.latest(self.folder, stage)
        checkpoint.load_modules(self.folder / "weights" / f"{stage}-{step:06d}.safetensors", modules)

    # ---- stages 1 and 2: the models

    def denoiser(self, key: str = "network", dropout: float = 0.0) -> nn.Module:
        """A freshly initialised network without labels: a function of (seed, key)."""
        channels, size, _ = self.dataset.images.shape[1:]
        mlp = self.settings.network == "mlp" or self.settings.network == "auto" and size <= 8
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.settings.seed, key).initial_seed())
            net = build_denoiser(
                self.settings.network, channels, size, 0, width=self.settings.width or (256 if mlp else 128), dropout=dropout
            )
        return net.to(self.settings.device)

    def models(self) -> dict[str, nn.Module]:
        net = self.denoiser(dropout=self.settings.dropout)
        return {"net": net, "ema": Ema(net, self.settings.ema_decay)}

    def make_source(self) -> None:
        own = denoising_settings(self.settings, self.settings.source_steps)
        stage = Denoise(self.dataset.subset(torch.isin(self.dataset.labels, torch.tensor(self.head))), self.models(), own)
        stage.name = "source"
        train(stage, self.folder, **self.step)

    def make_target(self) -> None:
        own, modules = denoising_settings(self.settings, self.settings.target_steps), self.models()
        self.load("source", {"ema": modules["ema"]})
        source = copy.deepcopy(modules["ema"].net)
        modules["net"].load_state_dict(source.state_dict())
        rest = self.dataset.subset(~torch.isin(self.dataset.labels, torch.tensor(self.head)))
        train(Adapt(rest, modules, own, self.method, source, self.settings), self.folder, **self.step)

    # ---- stage 3: the encoder

    def encoders(self) -> dict[str, nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.settings.seed, "encoder").initial_seed())
            encoder = NoisyEncoder(self.denoiser("encoder"), self.settings.encoder_dim)  # dropout would move the prototypes
        modules = {"encoder": encoder, "prototypes": Prototypes(self.dataset.num_classes, self.settings.encoder_dim)}
        return {name: module.to(self.settings.device) for name, module in modules.items()}

    def make_encoder(self) -> None:
        train(Prototypical(self.dataset, self.encoders(), self.method, self.settings, self.flips), self.folder, **self.step)

    # ---- stage 4: images

    def make_samples(self) -> None:
        """Images for the medium and tail classes, a part of --sample-batch at a time; parts that are there are read."""
        key, missing, drawn, limit = key_of(self.made_of["samples"]), self.wanted.clone(), 0, self.settings.fill_tries * self.wanted.sum()
        images, labels, number = [], [], 0
        while missing.sum() > 0 and drawn < limit:
            path = self.folder / "samples" / f"{number:04d}.safetensors"
            request = missing.clone()
            part, _ = checkpoint.cached(
                path, checkpoint.digest(key, number, request), lambda number=number, request=request: (self.part(number, request), {})
            )
            images.append(part["images"][part["keep"]])
            labels.append(part["labels"][part["keep"]])
            missing -= torch.bincount(labels[-1], minlength=len(missing))
            drawn, number = drawn + len(part["keep"]), number + 1
        if short := [label for label in range(len(missing)) if missing[label] > 0]:
            print(f"samples: {drawn} drawn; of classes {listed(short)} {int(missing.sum())} images are missing", flush=True)
        shape = self.dataset.images.shape[1:]
        images = torch.cat([torch.zeros(0, *shape, dtype=torch.uint8), *images])
        write_samples(self.folder, images, torch.cat([torch.zeros(0, dtype=torch.int64), *labels]))

    @cached_property
    def sampler(self) -> dict[str, nn.Module]:
        """What stage 4 asks: the target's averaged weights, and encoder or classifier where they are needed."""
        modules = {"ema": self.models()["ema"]}
        self.load("target", modules)
        if "encoder" in self.parents["samples"]:
            modules |= (own := self.encoders())
            self.load("encoder", own)
        if "balanced" in self.parents["samples"]:
            modules["balanced"] = self.real_only("balanced")
        return {name: module.eval().requires_grad_(False) for name, module in modules.items()}

    @torch.no_grad()
    def part(self, number: int, missing: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) uint8 with labels (N,), and which to keep, (N,) bool, no more of a class than are missing (C,). trace
        (steps, 3): the time, and the mean norm of the shift and of the noise, of every reverse step."""
        settings, device, trace = self.settings, self.settings.device, []
        labels = torch.arange(len(missing)).repeat_interleave(missing)
        if settings.filter_conf > 0:  # by turns, or a class that the filter never lets pass would take all that may be drawn
            turn = torch.cat([torch.arange(count) for count in missing.tolist()])
            labels = labels[turn.argsort(stable=True)]
        labels = labels[: settings.sample_batch].to(device)
        if self.by_classifier:
            labels = labels.new_full((min(settings.sample_batch, int(2 * missing.sum())),), -1)
        rng = generator(settings.seed, "samples", number, device=device)
        x = torch.randn(len(labels), *self.dataset.images.shape[1:], generator=rng, device=device)
        if settings.s > 0 and self.by_classifier:  # led to classes all the same, by their shares of what is missing
            goals = torch.multinomial(missing.double(), len(labels), replacement=True, generator=generator(settings.seed, "goals", number))
            goals = goals.to(device)
        else:
            goals = labels

        def shift(z: Tensor, mean: Tensor, var: float, x0hat: Tensor, fraction: float) -> Tensor:
            t = torch.full((len(z),), round(fraction * settings.timesteps), device=z.device)
            moved = self.method.shift(z, t, var, self.sampler["encoder"], self.sampler["prototypes"].rows, goals)
            trace.append([float(t[0]), float(moved.flatten(1).norm(dim=1).mean()), (var * z[0].numel()) ** 0.5])
            return moved

        x = sample(
            self.diffusion, self.sampler["ema"], x, settings.sample_steps, rng, shift=shift if settings.s > 0 else None,
            clip=(-1.0, 1.0) if settings.clip_x0 else None, progress=f"samples, part {number}" if settings.progress else None,
        )  # fmt: skip
        images, keep = to_uint8(x), torch.ones(len(labels), dtype=torch.bool, device=device)
        if "balanced" in self.sampler:
            probability = self.sampler["balanced"](to_unit(images)).softmax(1)
            labels = probability.argmax(1) if self.by_classifier else labels
            keep &= probability.gather(1, labels[:, None])[:, 0] >= settings.filter_conf
        mine = F.one_hot(labels, len(missing)) * keep[:, None]
        rank = mine.cumsum(0).gather(1, labels[:, None])[:, 0]  # 1 for the first of a class
        keep &= rank <= missing.to(device)[labels]
        out = {"images": images, "labels": labels, "keep": keep, "trace": torch.tensor(trace).reshape(-1, 3)}
        return {name: value.cpu() for name, value in out.items()}

    # ---- stage 5: classifiers

    def recipe(self, loss: str) -> Recipe:
        name, steps = self.settings.recipe, self.settings.classifier_steps
        recipe = recipe_of(self.settings.dataset) if name == "auto" else RECIPES[name]
        return dataclasses.replace(recipe, loss=loss, **({} if steps is None else {"steps": steps, "epochs": None}))

    def classify(self, stage: str, images: Tensor, labels: Tensor, loss: str) -> nn.Module:
        return train_classifier(
            images.to(self.settings.device), labels.to(self.settings.device), self.dataset.num_classes, self.recipe(loss),
            folder=self.folder, stage=stage, **self.step,
        )  # fmt: skip

    def real_only(self, loss: str) -> nn.Module:
        return self.classify(loss, self.dataset.images, self.dataset.labels, loss)

    def make_softmax(self) -> None:
        self.real_only("softmax")

    def make_balanced(self) -> None:
        self.real_only("balanced")

    def generated(self) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) uint8 and labels (N,) of stage 4."""
        return tuple(torch.from_numpy(np.load(self.folder / f"{name}.npy")) for name in ("samples", "sample_labels"))

    def make_classifier(self) -> nn.Module:
        images, labels = self.generated()
        together = torch.cat([self.dataset.images, to_unit(images)]), torch.cat([self.dataset.labels, labels])
        return self.classify("classifier", *together, self.settings.classifier_loss)

    # ---- the report

    def notes(self) -> dict[str, str]:
        """What is said before the first step."""
        counts = self.dataset.counts
        rest = [label for label in range(len(counts)) if label not in self.head]
        out = {"source model": f"classes {listed(self.head)}, {sum(counts[label] for label in self.head)} images"}
        if few := [label for label in rest if 0 < counts[label] < LEAST]:
            out["pair loss"] = f"classes {listed(few)} have fewer than {LEAST} images and count 0"
        if absent := [label for label in rest if counts[label] == 0]:
            out["samples"] = f"classes {listed(absent)} have no image, so none is generated"
        return out

    def report(self, test: data.Dataset) -> dict:
        score = lambda net: recognition_scores(net, test, self.dataset.counts, self.settings.split_rule)  # noqa: E731
        nets = {name: self.real_only(name) for name in BASELINES}
        return {
            "method": "diffrc", **score(self.make_classifier()), "dataset": self.dataset.name, "test": f"{test.name}, n = {len(test)}",
            "counts": list(self.dataset.counts), "head": self.head, "split_rule": self.settings.split_rule,
            **self.sampling(nets["balanced"]), **self.encoder_report(), "notes": self.notes(),
            "baselines": {name: score(net) for name, net in nets.items()},
        }  # fmt: skip

    @torch.no_grad()
    def sampling(self, judge: nn.Module) -> dict:
        """Images a class, how many of them the balanced softmax of the real images would label alike, and the steps of the sampling."""
        images, labels = self.generated()
        parts = [load_file(path) for path in sorted((self.folder / "samples").glob("*.safetensors"))]
        alike = predict(judge, images.to(self.settings.device)) == labels
        per_class = lambda rows: torch.bincount(rows, minlength=self.dataset.num_classes).tolist()  # noqa: E731
        drawn = sum(len(part["keep"]) for part in parts)
        made = {"wanted": self.wanted.tolist(), "kept": per_class(labels), "alike": per_class(labels[alike]), "drawn": drawn}
        made["label_by"] = "classifier" if self.by_classifier else "guidance"
        traces = torch.stack([part["trace"] for part in parts]).mean(0).T.tolist() if parts and len(parts[0]["trace"]) else None
        return {"generated": made, "sampling": traces and dict(zip(("t", "shift", "noise"), traces, strict=True))}

    @torch.no_grad()
    def encoder_report(self) -> dict:
        """Share of the training images whose nearest prototype at noise level t is that of their class."""
        if "encoder" not in self.sampler:
            return {}
        x, y = self.dataset.images.to(self.settings.device), self.dataset.labels
        times = [max(round(share * self.settings.timesteps), 1) for share in (0, 0.1, 0.25, 0.5, 0.75)]
        accuracy = []
        for t in times:
            eps = torch.randn(x.shape, generator=generator(self.settings.seed, "encoder report", t, device=x.device), device=x.device)
            every = torch.full((len(x),), t, device=x.device)
            parts = zip(self.diffusion.add_noise(x, eps, every).split(512), every.split(512), strict=True)
            near = torch.cat([self.sampler["encoder"](*part) @ self.sampler["prototypes"].rows.T for part in parts]).argmax(1)
            accuracy.append(float((near.cpu() == y).double().mean()))
        return {"encoder": {"t": times, "accuracy": accuracy}}

    def draw(self, report: dict) -> None:
        groups = data.split_groups(self.dataset.counts, self.settings.split_rule)
        bars = {"DiffRC": report, **report["baselines"]}
        plots.class_bars(
            self.folder / "per_class.png", {name: [one["per_class"]] for name, one in bars.items()}, self.dataset.counts, groups,
            title="Recognised class by class", ylabel="share of test images", caption=report["test"],
        )  # fmt: skip
        rows = read_log(self.folder / "log.jsonl")
        for stage in ("source", "target", "encoder"):
            if own := [row for row in rows if row["stage"] == stage]:
                plots.loss_curves(self.folder / f"losses_{stage}.png", own, title=f"Losses of stage {STAGES.index(stage) + 1}, {stage}")
        if report["sampling"]:
            plots.shift_against_noise(self.folder / "guidance.png", report["sampling"])
        if grid := self.neighbours():
            plots.sample_grid(self.folder / "generated.png", grid, self.dataset.counts, groups)

    def neighbours(self, columns: int = 6, classes: int = 20) -> list[tuple[int, Tensor, Tensor]]:
        """For each generated class, some images and the training image that is nearest to each in pixels, of whatever class."""
        images, labels = self.generated()
        train_images, out = to_uint8(self.dataset.images), []
        order = sorted(labels.unique().tolist(), key=lambda label: -self.dataset.counts[label])
        for label in order[-classes:]:
            own = images[labels == label][:columns]
            near = ltkernels.knn(to_unit(own).flatten(1), to_unit(train_images).flatten(1), 1).index[:, 0]
            out.append((label, own, train_images[near]))
        return out


def key_of(made_of: dict) -> str:
    return checkpoint.digest(json.dumps(made_of, sort_keys=True))[:12]


def differences(mine: dict, other: dict) -> list[str]:
    names = dict.fromkeys([*mine, *other])
    return [f"{name}: {mine.get(name)!r} != {other.get(name)!r}" for name in names if mine.get(name) != other.get(name)]


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
