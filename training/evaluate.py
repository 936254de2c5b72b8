"""How good generated images are: `python -m training evaluate RUN`, and the same at the end of a run.

Every figure is a distance between sets of features, so it says as much about the network they are from and about the images they are
compared with: both are named in every result, and `tabulate` refuses to put figures of different networks into one table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ltkernels

from . import card, checkpoint, config, data, metrics, plots
from .classifier import load_classifier
from .config import ImageConfig, short_name
from .dumps import read_images, read_statistics
from .fetch import INCEPTION, inception_folder
from .loop import generator
from .runfolder import aligned

SCORES = ("fid", "fid_head", "fid_med", "fid_tail", "is", "f8", "f1_8", "precision", "recall", "memorisation")
TO_FETCH = "not on this machine; on a machine with network run: ltkernels fetch inception"
NEIGHBOURS, SPLITS = 5, 10  # of improved precision and recall, of the inception score


# ---- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """Images to features and class probabilities, on `device`; answers are on the CPU."""

    name: str  # of the weights: equal names, equal features
    net: Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, C, H, W) uint8 or float in [0, 1] -> features (B, F), logits (B, classes)
    device: str = "cpu"
    batch: int = 500

    @torch.no_grad()
    def __call__(self, images: Tensor, progress: bool = False) -> tuple[Tensor, Tensor]:
        """(features (N, F), probabilities (N, classes)) of images (N, C, H, W), uint8 or float in [0, 1]."""
        out = []
        for part in tqdm(images.split(self.batch), desc=f"features of {self.name}", leave=False, disable=not progress):
            features, logits = self.net(part.to(self.device))
            out.append((features.float().cpu(), logits.float().softmax(1).cpu()))
        return tuple(torch.cat(parts) for parts in zip(*out, strict=True))


def feature_net(
    reference: data.Dataset, *, cache: str | Path, inception: str | Path | None = None, device: str = "cpu", progress: bool = True
) -> FeatureNet:
    """Inception from the file `inception`, or, for colour images above 16 pixels, if torch-fidelity and its weights are on this machine;
    otherwise the classifier of the reference's images, which is trained if the cache has none."""
    channels, size, _ = reference.images.shape[1:]
    if inception is None and channels == 3 and size > 16:
        if importlib.util.find_spec("torch_fidelity"):
            inception = next((inception_folder() / name for name in INCEPTION if (inception_folder() / name).is_file()), None)
        if inception is None:
            print(f"features of a small classifier: Inception is {TO_FETCH} (and pip install torch-fidelity)", file=sys.stderr)
    if inception is not None:
        return _inception(Path(inception), device)
    net, name, _ = load_classifier(reference, Path(cache), device=device, progress=progress)
    return FeatureNet(name, lambda x: net(x.float() / 127.5 - 1 if x.dtype == torch.uint8 else 2 * x - 1), device)


def net_of(reference: data.Dataset, settings: ImageConfig) -> FeatureNet:
    """The network that a run's settings ask for."""
    return feature_net(reference, cache=settings.cache, inception=settings.inception, device=settings.device, progress=settings.progress)


def _inception(weights: Path, device: str) -> FeatureNet:
    """The network of FID, ported from TensorFlow: 2048 pooled features; 1008 logits without bias, as in the first inception scores."""
    if not weights.is_file():
        raise FileNotFoundError(f"evaluate: no such file of Inception's weights: {weights}: {TO_FETCH}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("evaluate: Inception's weights need torch-fidelity: pip install torch-fidelity") from error
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run whatever a pickle says
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights)).to(device)
    except Exception as error:  # torch has half a dozen types for a damaged file
        raise ValueError(f"evaluate: cannot read Inception's weights from {weights}: {error}") from error
    name = f"inception-{checkpoint.digest(*(tensors[key] for key in sorted(tensors)))[:8]}"

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.uint8:
            raise ValueError("evaluate: torch-fidelity's Inception takes 8-bit images; leave round=True")
        return net(x.expand(-1, 3, -1, -1))

    return FeatureNet(name, features, device, batch=50)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as they would be stored."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def reference_features(
    reference: data.Dataset, net: FeatureNet, cache: Path | None, progress: bool = False
) -> tuple[Tensor, metrics.Moments]:
    """(features (n, F), moments) of real images, from the cache if it has those of these images and this network."""
    images = to_uint8(reference.images)

    def make() -> tuple[dict[str, Tensor], dict]:
        features = net(images, progress)[0]
        mean, cov, n = metrics.moments(features)
        return {"features": features, "mu": mean, "sigma": cov}, {"n": n, "reference": reference.name, "features": net.name}

    if cache is None:
        tensors, about = make()
    else:
        key = checkpoint.digest("float64, unbiased", net.name, images)
        name = f"statistics-{short_name(reference.name)}-{key[:12]}.safetensors"
        tensors, about = checkpoint.cached(cache / name, key, make)
    return tensors["features"], metrics.Moments(tensors["mu"], tensors["sigma"], about["n"])


# ---- figures ---------------------------------------------------------------------------------------------------------


def evaluate_images(
    samples: Tensor,
    labels: Tensor,
    dataset: data.Dataset,
    reference: data.Dataset,
    net: FeatureNet,
    *,
    guidance: float | None,
    rule: str = "tercile",
    split_ref: str = "balanced",
    seed: int = 0,
    round: bool = True,
    prd: bool = True,
    statistics: metrics.Moments | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> dict:
    """Every figure of samples (N, C, H, W), uint8 or float in [-1, 1], with labels (N,), -1 for none.

    dataset: the long-tailed training set, whose counts make head, med and tail (`rule`) and whose images may have been copied. reference:
    the balanced images. split_ref: what the figures of groups and classes are compared with, these or the training images ("lt").
    round: float images become 8-bit ones first, as the reference's are. prd: f8 and f1_8, which take most of the time. statistics: for
    `fid`, in place of the reference's. What is not computed is None, and `remarks` says why.
    """
    _check(samples, labels, dataset, reference, split_ref)
    samples = to_uint8(samples) if samples.is_floating_point() and round else samples
    features, probabilities = net(samples if samples.dtype == torch.uint8 else (samples + 1) / 2, progress)
    real, real_moments = reference_features(reference, net, cache, progress)
    out = {
        "n": len(samples), "reference": f"{reference.name}, n = {len(reference)}", "guidance": guidance, "features": net.name,
        "split_ref": split_ref, "split_rule": rule, "memorisation_in": "pixels", "remarks": {},
    }  # fmt: skip
    record = lambda names, compute: _record(out, names, compute)  # noqa: E731

    record(["fid"], lambda: _fid(features, statistics or real_moments))
    record(["is", "is_sd"], lambda: metrics.inception_score(probabilities[_shuffled(len(samples), seed)], SPLITS))
    mine, theirs = equal_sets(features, real, seed)
    if len(features) != len(real):
        out["remarks"]["equal_sets"] = f"f8, f1_8, precision and recall compare {len(mine)} rows of each set, drawn with seed {seed}"
    clusters = 20 * dataset.num_classes
    if prd:
        record(["f8", "f1_8"], lambda: metrics.prd(mine, theirs, num_clusters=clusters, seed=seed, progress=progress))
    else:
        out |= {"f8": None, "f1_8": None}
        out["remarks"]["f8"] = "not asked for"
    record(["precision", "recall"], lambda: metrics.improved_precision_recall(mine, theirs, NEIGHBOURS))

    pairs = Pairs(features, labels, *_real_parts(net, dataset, reference, real, split_ref, progress))
    groups = data.split_groups(dataset.counts, rule)
    for name, classes in zip(("head", "med", "tail"), groups, strict=True):
        record([f"fid_{name}"], lambda classes=classes: pairs.fid(classes))
    out["class_fid"], out["class_fid_rank_deficient"] = pairs.class_fid(dataset.num_classes)

    pixels, train = (_pixels(images).flatten(1) for images in (samples, to_uint8(dataset.images)))
    tail = torch.tensor(groups[2], dtype=torch.int64)
    rows = torch.isin(dataset.labels, tail).nonzero().flatten()
    record(["memorisation"], lambda: metrics.memorisation(pixels[torch.isin(labels, tail)], train, rows))
    record(["memorisation_all"], lambda: metrics.memorisation(pixels, train))
    return out


@dataclass(frozen=True, eq=False)
class Pairs:
    """Generated and real features with their labels, to be compared class by class."""

    features: Tensor
    labels: Tensor
    real: Tensor
    real_labels: Tensor

    def fid(self, classes: Sequence[int]) -> float:
        wanted = torch.tensor(list(classes), dtype=torch.int64)
        mine, theirs = self.features[torch.isin(self.labels, wanted)], self.real[torch.isin(self.real_labels, wanted)]
        if min(len(mine), len(theirs)) < 2:
            raise ValueError(f"needs two generated and two real images of classes {list(classes)}; got {len(mine)} and {len(theirs)}")
        return _fid(mine, metrics.moments(theirs))

    def class_fid(self, num_classes: int) -> tuple[list[float | None], bool]:
        """(a figure for every class, None where it needs more images; whether some covariance was singular for want of images)."""
        sizes = torch.tensor([data.class_counts(part[part >= 0], num_classes) for part in (self.labels, self.real_labels)]).amin(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the flag says it once
            values = [self.fid((label,)) if size >= 2 else None for label, size in enumerate(sizes.tolist())]
        return values, bool(((sizes >= 2) & (sizes <= self.features.shape[1])).any())


def _real_parts(
    net: FeatureNet, dataset: data.Dataset, reference: data.Dataset, real: Tensor, split_ref: str, progress: bool
) -> tuple[Tensor, Tensor]:
    if split_ref == "balanced":
        return real, reference.labels
    return net(to_uint8(dataset.images), progress)[0], dataset.labels


def real_data_anchor(dataset: data.Dataset, reference: data.Dataset, settings: ImageConfig) -> dict:
    """FID and IS of the training images themselves (001, Table 6): what a perfect generator of the long-tailed set would have."""
    net = net_of(reference, settings)
    features, probabilities = net(to_uint8(dataset.images), settings.progress)
    out = {"n": len(dataset), "reference": f"{reference.name}, n = {len(reference)}", "guidance": None, "features": net.name, "remarks": {}}
    moments = reference_features(reference, net, Path(settings.cache), settings.progress)[1]
    _record(out, ["fid"], lambda: _fid(features, moments))
    _record(out, ["is", "is_sd"], lambda: metrics.inception_score(probabilities[_shuffled(len(dataset), 0)], SPLITS))
    return out


def equal_sets(a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """As many rows of each as the smaller one has, drawn from the larger one."""
    size = min(len(a), len(b))
    return tuple(x if len(x) == size else x[_shuffled(len(x), seed)[:size]] for x in (a, b))


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "evaluate"))


def _fid(features: Tensor, real: metrics.Moments) -> float:
    return metrics.frechet_distance(metrics.moments(features), real)


def _pixels(images: Tensor) -> Tensor:
    """In [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def _record(out: dict, names: Sequence[str], compute: Callable[[], float | tuple]) -> None:
    """out[name] for each of what `compute` answers; None if it cannot, with its reason, or its warning, among the remarks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            values = compute()
        except ValueError as error:
            values, caught = (None,) * len(names), [error]
    out.update(zip(names, values if isinstance(values, tuple) else (values,), strict=True))
    if caught:
        out["remarks"][names[0]] = str(getattr(caught[0], "message", caught[0]))


def _check(samples: Tensor, labels: Tensor, dataset: data.Dataset, reference: data.Dataset, split_ref: str) -> None:
    def require(fine: bool, expected: str, fact: object) -> None:
        if not fine:
            raise ValueError(f"evaluate: expected {expected}; got {fact}")

    require(split_ref in ("balanced", "lt"), "split_ref balanced or lt", repr(split_ref))
    require(dataset.images is not None and reference.images is not None, "data sets of images", "features")
    shape = tuple(reference.images.shape[1:])
    require(tuple(dataset.images.shape[1:]) == shape, f"training images like the reference's {shape}", tuple(dataset.images.shape[1:]))
    require(samples.dim() == 4 and tuple(samples.shape[1:]) == shape, f"samples (N, {', '.join(map(str, shape))})", tuple(samples.shape))
    kinds = samples.dtype == torch.uint8 or samples.is_floating_point()
    require(len(samples) > 0 and kinds, "at least one sample, uint8 or float", f"{len(samples)} of {samples.dtype}")
    fact = f"{labels.dtype} of shape {tuple(labels.shape)}"
    require(labels.shape == samples.shape[:1] and labels.dtype == torch.int64, f"int64 labels of shape ({len(samples)},)", fact)
    require(dataset.num_classes == reference.num_classes, f"a reference of {dataset.num_classes} classes", reference.num_classes)
    low, high = labels.min().item(), labels.max().item()
    require(low >= -1 and high < dataset.num_classes, f"labels in [-1, {dataset.num_classes})", f"{low} to {high}")


# ---- runs ------------------------------------------------------------------------------------------------------------


def find_reference(settings: ImageConfig) -> data.Dataset:
    """The images to compare a run's samples with, if whatever else evaluation reads is there, too."""
    check_inception(settings)
    return data.balanced_reference(settings.dataset, root=settings.root, image_size=settings.image_size)


def check_reference(settings: ImageConfig) -> None:
    """Raises what `find_reference` would, without decoding the images of a folder."""
    check_inception(settings)
    data.check_reference(settings.dataset, root=settings.root, image_size=settings.image_size)


def check_inception(settings: ImageConfig) -> None:
    if settings.inception is not None and not Path(settings.inception).is_file():
        raise FileNotFoundError(f"evaluate: no such file of Inception's weights: {settings.inception}: {TO_FETCH}")


def score(folder: Path, settings: ImageConfig, dataset: data.Dataset, samples: Tensor, labels: Tensor, prd: bool = True) -> dict:
    """The figures of a run's samples, with samples.png and class_fid.png in its folder."""
    reference = find_reference(settings)
    net = net_of(reference, settings)
    report = evaluate_images(
        samples, labels, dataset, reference, net, guidance=settings.omega if settings.conditional else 0.0, rule=settings.split_rule,
        split_ref=settings.split_ref, seed=settings.seed, prd=prd, cache=Path(settings.cache), progress=settings.progress,
    )  # fmt: skip
    draw(folder, samples, labels, dataset, report)
    return report


def draw(folder: Path, samples: Tensor, labels: Tensor, dataset: data.Dataset, report: Mapping) -> None:
    """Samples beside their nearest training images, a row a class from head to tail, and FID class by class."""
    groups = data.split_groups(dataset.counts, report["split_rule"])
    train, rows = to_uint8(dataset.images), picture_rows(labels, dataset.counts)
    chosen = torch.cat([members for _, members in rows])
    nearest = torch.zeros(len(samples), dtype=torch.int64)
    nearest[chosen] = ltkernels.knn(_pixels(samples[chosen]).flatten(1), _pixels(train).flatten(1), 1).index[:, 0]
    plots.sample_grid(
        folder / "samples.png", [(label, samples[members], train[nearest[members]]) for label, members in rows], dataset.counts, groups
    )
    if any(value is not None for value in report["class_fid"]):
        about = f"{said(report)}; features: {report['features']}"
        plots.class_bars(folder / "class_fid.png", {"": [report["class_fid"]]}, dataset.counts, groups, caption=about)


def said(report: Mapping) -> str:
    """What a report's figures are of."""
    guidance = "guidance unknown" if report["guidance"] is None else f"guidance {report['guidance']:g}"
    return f"{report['n']} samples, {guidance}; reference: {report['reference']}"


def picture_rows(labels: Tensor, counts: Sequence[int], count: int = 8, at_most: int = 20) -> list[tuple[int, Tensor]]:
    """(class, numbers of its first samples), head first, evenly chosen where there are many classes; (-1, ..) for samples without one."""
    order = [label for label in sorted(range(len(counts)), key=lambda c: -counts[c]) if (labels == label).any()]
    order = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, min(len(order), at_most)).round().astype(int))] if order else []
    rows = [(label, (labels == label).nonzero().flatten()[:count]) for label in order]
    if not rows:
        rows = [(-1, part) for part in torch.arange(min(len(labels), 10 * count)).split(count)]
    return rows


def evaluate_run(run: Path, **changes) -> dict:
    """The figures of `run`/samples.npy, merged into its metrics.json, and its pictures. changes: of the run's settings."""
    from .run_images import load  # which evaluates, too

    stored, expected = run / "config.json", f"a run of {', '.join(config.IMAGE_CONFIGS)}"
    for file in (stored, run / "samples.npy", run / "sample_labels.npy"):
        if not file.is_file():
            raise FileNotFoundError(f"evaluate: expected {expected} that has drawn samples; there is no {file}")
    method = json.loads(stored.read_text()).get("method")
    if method not in config.IMAGE_CONFIGS:
        raise ValueError(f"evaluate: expected {expected}; {run} is one of {method}")
    settings = dataclasses.replace(config.read(stored, config.IMAGE_CONFIGS[method]), **changes)
    try:
        samples, labels = (torch.from_numpy(np.load(run / f"{name}.npy", allow_pickle=False)) for name in ("samples", "sample_labels"))
    except ValueError as error:
        raise ValueError(f"evaluate: cannot read the samples of {run}: {error}") from error
    figures = score(run, settings, load(method, settings), samples, labels)
    path = run / "metrics.json"
    before = json.loads(path.read_text()) if path.is_file() else {"method": method, "dataset": settings.dataset}
    report = {**before, **figures}
    if (run / "weights").is_dir():  # not of a folder that `sample` wrote
        card.write(run, report)
    checkpoint.write_json(path, report)
    return figures


def evaluate_dump(samples: Path, labels: Path | None, settings: ImageConfig, out: Path, statistics: Path | None = None) -> dict:
    """The figures of other people's images against the data set of `settings`, into `out`: metrics.json and the pictures."""
    from .run_images import load

    dataset, reference = load("evaluate", settings), find_reference(settings)
    images, classes, done = read_images(samples, labels, tuple(reference.images.shape[1:]))
    moments = None if statistics is None else read_statistics(statistics)
    net = net_of(reference, settings)
    if moments is not None and (width := len(net(images[:1])[0][0])) != len(moments.mean):
        raise ValueError(f"evaluate: {statistics}: expected statistics of the {width} features of {net.name}; got {len(moments.mean)}")
    figures = evaluate_images(
        images, classes, dataset, reference, net, guidance=None, rule=settings.split_rule, split_ref=settings.split_ref, seed=settings.seed,
        statistics=moments, cache=Path(settings.cache), progress=settings.progress,
    )  # fmt: skip
    if statistics is not None:
        figures["remarks"]["fid"] = "; ".join([f"against the statistics of {statistics}", *filter(None, [figures["remarks"].get("fid")])])
    draw(out, images, classes, dataset, figures)
    report = {"samples": str(samples), "dataset": dataset.name, "counts": list(dataset.counts), "preprocessing": done, **figures}
    checkpoint.write_json(out / "metrics.json", report)
    return report


def tabulate(reports: Mapping[str, Mapping], columns: Sequence[str] = SCORES) -> str:
    """Results as aligned text, a row each. Figures of different features are not comparable, so they are refused."""
    features = sorted({str(report.get("features")) for report in reports.values()})
    if len(features) > 1:
        raise ValueError(f"evaluate: a table holds figures of one feature network; got {', '.join(features)}")
    return aligned(reports, columns)


def main(arguments: Sequence[str]) -> int:
    text = f"Score the samples of runs of {', '.join(config.IMAGE_CONFIGS)}, or with --samples the images of anybody else."
    parser = argparse.ArgumentParser(prog="python -m training evaluate", description=text)
    parser.add_argument("run", type=Path, nargs="*", help="run folder, or one that sample has written; the options default to the run's")
    parser.add_argument("--inception", help="file of Inception's weights, for torch-fidelity")
    parser.add_argument("--split-ref", choices=("balanced", "lt"), help="what groups and classes are compared with")
    parser.add_argument("--split-rule", choices=("tercile", "count"), help="which classes are many, med and few")
    parser.add_argument("--cache", help="folder for feature networks and the references' features")
    parser.add_argument("--root", help="folder with downloaded data sets")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--no-progress", dest="progress", action="store_false", default=None)
    foreign = parser.add_argument_group("images that are no run's")
    foreign.add_argument("--samples", type=Path, help=".npy of images (N, C, H, W), uint8 or float in [0, 1]")
    foreign.add_argument("--labels", type=Path, help=".npy of their classes (N,), -1 for none; default: they have none")
    foreign.add_argument("--dataset", help="what they stand for: a data set as for training; default digits-lt")
    foreign.add_argument("--imbalance-ratio", type=float, help="of the training set; default 20 for digits, 100 elsewhere")
    foreign.add_argument("--class-order", help="of the training set, as for training")
    foreign.add_argument("--image-size", type=int)
    foreign.add_argument("--seed", type=int, help="of the training set's rows and of the evaluation's draws; default 0")
    foreign.add_argument("--statistics", type=Path, help=".npz with mu and sigma of the same features: fid is against these")
    foreign.add_argument("--out", type=Path, help="folder for metrics.json and pictures; default: runs/evaluate-NAME")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    runs, dump = options.pop("run"), {name: options.pop(name, None) for name in ("samples", "labels", "statistics", "out")}
    if (dump["samples"] is None) == (not runs):
        raise ValueError("evaluate: give run folders, or --samples FILE; got " + ("both" if runs else "neither"))
    if dump["samples"] is not None:
        chosen = options.get("dataset", "digits-lt")
        settings = config.DDPMConfig(**{"imbalance_ratio": 20.0 if chosen.startswith("digits") else 100.0, **options})
        out = dump["out"] or Path("runs") / f"evaluate-{dump['samples'].stem}"
        report = evaluate_dump(dump["samples"], dump["labels"], settings, out, dump["statistics"])
        print(f"{dump['samples']}: {report['preprocessing']}; features: {report['features']}\n{tabulate({dump['samples'].stem: report})}")
        print(f"{said(report)}\n" + "".join(f"  {figure}: {remark}\n" for figure, remark in report["remarks"].items()), end="")
        return 0
    wrong = [name for name in ("dataset", "imbalance_ratio", "class_order", "image_size", "seed") if name in options]
    wrong += [name for name, value in dump.items() if value is not None]
    if wrong:
        raise ValueError(f"evaluate: --{wrong[0].replace('_', '-')} goes with --samples; a run has its own")
    tables: dict[str, dict[str, dict]] = {}
    for run in runs:
        figures = evaluate_run(run, **options)
        tables.setdefault(figures["features"], {})[str(run)] = figures
    for features, reports in tables.items():
        print(f"features: {features}\n{tabulate(reports)}")
        for name, report in reports.items():
            print(f"{name}: {said(report)}")
            print("".join(f"  {figure}: {remark}\n" for figure, remark in report["remarks"].items()), end="")
    return 0
