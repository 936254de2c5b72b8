"""Data sets with a long tail: what `--dataset` can name, how rows are chosen, three synthetic sets of known density.

A name with `-lt` (`digits-lt`, `cifar10-lt`, `folder-lt:<path>`, `features-lt:<file>`) is a long-tailed subset of the
set without it; class 0 is the head, unless `order` says otherwise. Counts and rows are LDAM's (Cao et al., 2019): CIFAR row
lists equal theirs.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .loop import generator

CIFAR = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100)}  # name: torchvision class, number of classes
NAMES = (
    *(f"{name}[-lt]" for name in ("digits", "digits-train", *CIFAR, "tiny-imagenet")),
    "imagenet-lt", "folder[-lt]:<path>", "features[-lt]:<file.npz>",
)  # fmt: skip
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"})
PROFILES = ("exp", "step", "uniform")
SYNTHETIC = ("two-gaussians", "moons", "tail-16d")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of one source. Exactly one of `images` and `features` is present."""

    name: str
    images: Tensor | None  # (N, C, H, W) float32 in [-1, 1]
    features: Tensor | None  # (N, D) float32
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64, rows of the source
    num_classes: int
    counts: tuple[int, ...]  # rows per class

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def data(self) -> Tensor:
        """Whichever of images and features is present."""
        return self.features if self.images is None else self.images

    def subset(self, rows: Tensor | np.ndarray | Sequence[int]) -> Dataset:
        """The given rows (positions, or a mask of length N) in the given order; `num_classes` stays."""
        rows = torch.as_tensor(rows, device="cpu")
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()
        labels = self.labels[rows]
        return Dataset(
            self.name,
            None if self.images is None else self.images[rows],
            None if self.features is None else self.features[rows],
            labels,
            self.indices[rows],
            self.num_classes,
            class_counts(labels, self.num_classes),
        )


# ---- long tails ------------------------------------------------------------------------------------------------------


def resolve_imbalance(
    imbalance_ratio: float | None = None, imb_factor: float | None = None, default: float = 10.0
) -> float:
    """The ratio head : tail from either spelling: `imb_factor=0.1` (LDAM, CBDM) is `imbalance_ratio=10`."""
    if imbalance_ratio is not None and imb_factor is not None:
        given = f"{imbalance_ratio} and {imb_factor}"
        raise ValueError(f"imbalance: give imbalance_ratio or imb_factor, not both; got {given}")
    if imb_factor is not None:
        if not 0 < imb_factor <= 1:
            raise ValueError(f"imbalance: imb_factor must be in (0, 1]; got {imb_factor}")
        return 1 / imb_factor
    ratio = default if imbalance_ratio is None else imbalance_ratio
    if not 1 <= ratio < float("inf"):
        raise ValueError(
            f"imbalance: imbalance_ratio must be finite and >= 1 (10 means head : tail = 10 : 1); got {ratio}"
        )
    return float(ratio)


def long_tail_counts(n_max: int, num_classes: int, imbalance_ratio: float, profile: str = "exp") -> tuple[int, ...]:
    """Rows per class, head first: `exp` n_i = int(n_max * ratio^(-i/(C-1))), `step` the second half of the classes has
    n_max / ratio, `uniform` n_max for all."""
    if profile not in PROFILES:
        raise ValueError(f"long_tail_counts: profile must be one of {', '.join(PROFILES)}; got {profile!r}")
    if n_max < 1 or num_classes < 1:
        raise ValueError(f"long_tail_counts: n_max and num_classes must be >= 1; got {n_max} and {num_classes}")
    factor = 1 / resolve_imbalance(imbalance_ratio)
    if profile == "exp":
        counts = tuple(int(n_max * factor ** (i / max(num_classes - 1, 1))) for i in range(num_classes))
    elif profile == "step":
        head = num_classes // 2 if num_classes > 1 else 1
        counts = (int(n_max),) * head + (int(n_max * factor),) * (num_classes - head)
    else:
        counts = (int(n_max),) * num_classes
    if counts[-1] < 1:
        raise ValueError(
            f"long_tail_counts: the tail class would be empty; "
            f"imbalance_ratio {imbalance_ratio:g} needs n_max >= {imbalance_ratio:g}, got {n_max}"
        )
    return counts


def class_counts(labels: Tensor | np.ndarray, num_classes: int) -> tuple[int, ...]:
    """Rows per class, length `num_classes`."""
    counts = torch.bincount(torch.as_tensor(labels).flatten().long(), minlength=num_classes).tolist()
    if len(counts) > num_classes:
        raise ValueError(f"class_counts: labels must be in [0, {num_classes}); got {len(counts) - 1}")
    return tuple(counts)


def split_groups(counts: Sequence[int], rule: str = "tercile") -> tuple[tuple[int, ...], ...]:
    """Class ids (many, med, few). `tercile`: thirds of the classes by falling count (3/4/3 of 10, 33/34/33 of 100);
    `count`: more than 100 rows, 20 to 100, fewer than 20."""
    if rule == "tercile":
        order = sorted(range(len(counts)), key=lambda c: -counts[c])  # stable: ties keep the order of class ids
        third = (len(counts) + 1) // 3
        groups = order[:third], order[third : len(counts) - third], order[len(counts) - third :]
        return tuple(tuple(sorted(group)) for group in groups)
    if rule == "count":
        kinds = [0 if n > 100 else 1 if n >= 20 else 2 for n in counts]
        return tuple(tuple(c for c, kind in enumerate(kinds) if kind == group) for group in range(3))
    raise ValueError(f"split_groups: rule must be tercile or count; got {rule!r}")


def select_rows(labels: np.ndarray, counts: Sequence[int], seed: int = 0) -> np.ndarray:
    """Rows of a long-tailed subset in LDAM's order: per class ascending, shuffle its rows and keep the first n_i.

    RandomState is np.random.seed without the global state: seed 0 gives the rows of LDAM's, CBDM's and OC_LT's loaders.
    """
    rng = np.random.RandomState(seed)
    rows = []
    for label, count in enumerate(counts):
        own = np.flatnonzero(labels == label)
        if len(own) < count:
            raise ValueError(f"select_rows: class {label} needs {count} rows; the source has {len(own)}")
        rng.shuffle(own)
        rows.append(own[:count])
    return np.concatenate(rows)


def save_indices(dataset: Dataset, path: str | Path) -> Path:
    """Write the source's rows that make up `dataset`, as .npy or .json; `load(..., indices=path)` reads them."""
    path = Path(path)
    if path.suffix not in (".npy", ".json"):
        raise ValueError(f"save_indices: the file must end in .npy or .json; got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, dataset.indices.numpy())
    else:
        path.write_text(json.dumps(dataset.indices.tolist()))
    return path


def read_indices(path: str | Path, num_rows: int) -> np.ndarray:
    """Rows written by `save_indices`, checked against a source of `num_rows` rows."""
    path = Path(path)
    if path.suffix not in (".npy", ".json"):
        raise ValueError(f"indices: the file must end in .npy or .json; got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"indices: no such file: {path}")
    try:
        rows = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.asarray(json.loads(path.read_text()))
    except ValueError as error:  # a pickled or truncated .npy, ragged or broken JSON
        raise ValueError(f"indices: {path} is not a list of row numbers: {error}") from error
    if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu":
        fact = f"{rows.dtype} of shape {rows.shape}"
        raise ValueError(f"indices: {path} must hold a non-empty 1-D array of integers; got {fact}")
    if rows.min() < 0 or rows.max() >= num_rows:
        raise ValueError(f"indices: {path} must name rows in [0, {num_rows}); got {rows.min()} to {rows.max()}")
    if len(np.unique(rows)) != len(rows):
        raise ValueError(f"indices: {path} names {len(rows) - len(np.unique(rows))} rows twice")
    return rows.astype(np.int64)


def train_holdout_split(dataset: Dataset, fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(train, holdout): round(fraction * n_i) rows of every class are held out, at least one where it has two."""
    if not 0 < fraction < 1:
        raise ValueError(f"train_holdout_split: fraction must be in (0, 1); got {fraction}")
    rng, held = np.random.RandomState(seed), np.zeros(len(dataset), dtype=bool)
    labels = dataset.labels.numpy()
    for label, count in enumerate(dataset.counts):
        take = 0 if count < 2 else min(max(round(fraction * count), 1), count - 1)
        held[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return dataset.subset(~held), dataset.subset(held)


def class_order(text: str | None, num_classes: int) -> list[int]:
    """Classes from head to tail: "7,2,6", "reversed", "seed:N" (a permutation), None as they are numbered."""
    order = list(range(num_classes))
    if text is None:
        return order
    if text == "reversed":
        return order[::-1]
    if text.startswith("seed:") and text[5:].isdecimal():
        return np.random.RandomState(int(text[5:])).permutation(num_classes).tolist()
    given = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if sorted(given) != order:
        raise ValueError(f"class_order: expected reversed, seed:N or each of 0 to {num_classes - 1} once, with commas; got {text!r}")
    return given


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_of_rows(labels: Tensor, resample: str, batch_size: int, step: int, seed: int, rng: torch.Generator) -> Tensor:
    """Rows (batch_size,) of step `step` of a set with labels (N,).

    none: permutations of all rows, one after another, cut into batches of one size. balanced, sqrt: a class, uniformly or by the square
    root of its size, then one of its rows, both with replacement and drawn from `rng`.
    """
    if resample == "none":
        place = step * batch_size + np.arange(batch_size)
        epochs = np.unique(place // len(labels))
        order = [torch.randperm(len(labels), generator=generator(seed, "denoise", "epoch", int(epoch))) for epoch in epochs]
        return torch.cat(order)[torch.from_numpy(place - epochs[0] * len(labels))].to(labels.device)
    counts = torch.bincount(labels)
    weight = torch.where(counts > 0, counts.double() ** {"balanced": 0.0, "sqrt": 0.5}[resample], 0.0)
    label = torch.multinomial(weight, batch_size, replacement=True, generator=rng)
    place = torch.rand(batch_size, generator=rng, device=labels.device, dtype=torch.float64) * counts[label]
    first = counts.cumsum(0) - counts  # where a class starts among the rows sorted by class
    return labels.argsort(stable=True)[first[label] + place.long()]


# ---- sources ---------------------------------------------------------------------------------------------------------
# A source is (labels of every row, number of classes, read(rows) -> tensor): rows are chosen before any is decoded.

Source = tuple[np.ndarray, int, Callable[[np.ndarray], Tensor]]


def load(
    name: str = "digits-lt",
    *,
    root: str | Path = "data",
    imbalance_ratio: float = 10.0,
    profile: str = "exp",
    seed: int = 0,
    indices: str | Path | None = None,
    image_size: int = 32,
    width: int | None = None,
    order: str | None = None,
) -> Dataset:
    """The data set `name`. Nothing is ever downloaded here; see fetch.py.

    imbalance_ratio, profile, seed: the long-tailed choice of rows, for names with `-lt` only. n_max is the size of the
    smallest class, so that every class can play every part (digits: 174, hence 707 images at ratio 10). order: which class is the head,
    and so on, see `class_order`; labels keep their numbers. imagenet-lt is a list of files and has all this already.
    indices: a file of `save_indices`: those rows and no others, in that order. image_size: side of a folder's images.
    width: refuse a feature file of another width. digits-train is digits without the third that is its test set, see `test_set`.
    Example: `load("digits-lt").counts[0] == 174`.
    """
    kind, _, path = name.partition(":")
    base = kind.removesuffix("-lt")
    if kind == "imagenet-lt" and not path:
        kind = base = "imagenet-lt"
        labels, num_classes, read = _imagenet(Path(root), "train", image_size)
    elif base == "tiny-imagenet" and not path:
        labels, num_classes, read = _tiny(Path(root) / "tiny-imagenet-200", image_size)
    elif base in ("digits", "digits-train") and not path:
        labels, num_classes, read = _digits({"digits": "all", "digits-train": "train"}[base])
    elif base in CIFAR and not path:
        labels, num_classes, read = _cifar(base, root)
    elif base == "folder" and path:
        labels, num_classes, read = _folder(Path(path), image_size)
    elif base == "features" and path:
        labels, num_classes, read = _features(Path(path), width)
    else:
        raise ValueError(f"dataset: expected one of {', '.join(NAMES)}; got {name!r}")

    if order is not None and not makes_tail(name, indices):
        expected = "class_order is of the long tails that are made here: of names with -lt, without indices"
        raise ValueError(f"dataset {name}: {expected}; got {order!r}")
    if indices is not None:
        rows = read_indices(indices, len(labels))
    elif kind != base:
        available = class_counts(labels, num_classes)
        if 0 in available:
            raise ValueError(
                f"dataset {name}: a long tail needs rows of every class; class {available.index(0)} has none"
            )
        counts, classes = long_tail_counts(min(available), num_classes, imbalance_ratio, profile), class_order(order, num_classes)
        rows = select_rows(labels, [counts[classes.index(label)] for label in range(num_classes)], seed)
    else:
        rows = np.arange(len(labels))
    return _taken(name, base == "features", (labels, num_classes, read), rows)


def makes_tail(name: str, indices: str | Path | None = None) -> bool:
    """Whether `load` chooses a long tail of the set's rows; imagenet-lt is a list that has one."""
    return name.partition(":")[0].endswith("-lt") and name != "imagenet-lt" and indices is None


def balanced_reference(name: str, *, root: str | Path = "data", image_size: int = 32) -> Dataset:
    """The images that generated ones are compared with: all of the set without -lt; the validation sets of TinyImageNet and ImageNet-LT,
    as in 001."""
    base = name.partition(":")[0].removesuffix("-lt")
    if base == "imagenet":
        source = _imagenet(Path(root), "val", image_size)
    elif base == "tiny-imagenet":
        source = _tiny(Path(root) / "tiny-imagenet-200", image_size, validation=True)
    else:
        return load(name.replace("-lt", "", 1) if name.partition(":")[0].endswith("-lt") else name, root=root, image_size=image_size)
    return _taken(f"{base} validation", False, source, np.arange(len(source[0])))


def test_set(name: str, *, root: str | Path = "data", image_size: int = 32) -> Dataset:
    """The images that a classifier trained on `name`, with -lt or without, is tested on: no image of the training set is among them, and
    labels have the same numbers.

    digits-train: the third of digits that it lacks, the same whatever the seed is. CIFAR: its test split. tiny-imagenet: its validation
    images. imagenet-lt: the list ImageNet_LT_test.txt. folder:PATH/train: PATH/test, whose folders are classes of PATH/train.
    """
    kind, _, path = name.partition(":")
    base = kind.removesuffix("-lt")
    if kind == "imagenet-lt" and not path:
        source = _imagenet(Path(root), "test", image_size)
    elif base == "tiny-imagenet" and not path:
        source = _tiny(Path(root) / "tiny-imagenet-200", image_size, validation=True)
    elif base == "digits-train" and not path:
        source = _digits("test")
    elif base in CIFAR and not path:
        source = _cifar(base, root, train=False)
    elif base == "folder" and Path(path).name == "train":
        source = _test_folder(Path(path), image_size)
    else:
        hint = "; digits-train is digits without the images of its test set" if base == "digits" else ""
        known = ", ".join(["digits-train", *CIFAR, "tiny-imagenet", "imagenet-lt", "folder:PATH/train"])
        raise ValueError(f"test_set: expected a data set with a test set of its own ({known}; [-lt]); got {name!r}{hint}")
    return _taken(f"test set of {name}", False, source, np.arange(len(source[0])))


def check_reference(name: str, *, root: str | Path = "data", image_size: int = 32) -> None:
    """Raises what `balanced_reference` would, but for damage inside of a folder's images: those are opened and not decoded."""
    kind, _, path = name.partition(":")
    if kind.removesuffix("-lt") == "folder":
        for file in folder_files(Path(path))[1]:
            with _opened(file):
                pass
    else:
        balanced_reference(name, root=root, image_size=image_size)


def _taken(name: str, features: bool, source: Source, rows: np.ndarray) -> Dataset:
    labels, num_classes, read = source
    labels, data = torch.from_numpy(labels[rows]), read(rows)
    counts = class_counts(labels, num_classes)
    return Dataset(name, None if features else data, data if features else None, labels, torch.from_numpy(rows), num_classes, counts)


def _digits(part: str = "all") -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8), 0..16 -> [-1, 1]
    labels = digits.target.astype(np.int64)
    held = _every_third(labels, 10)
    chosen = np.flatnonzero({"all": np.ones_like(held), "train": ~held, "test": held}[part])
    return labels[chosen], 10, lambda rows: images[chosen[rows]]


def _every_third(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) bool: every third row of each class in the order of the source, so that all parts of it are in both."""
    held = np.zeros(len(labels), dtype=bool)
    for label in range(num_classes):
        held[np.flatnonzero(labels == label)[2::3]] = True
    return held


def torchvision_set(base: str) -> type:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"dataset {base}: needs torchvision: pip install 'ltkernels[train]'") from error
    return getattr(datasets, CIFAR[base][0])


def _cifar(base: str, root: str | Path, train: bool = True) -> Source:
    try:
        source = torchvision_set(base)(str(root), train=train, download=False)
    except RuntimeError as error:  # torchvision's word for missing or damaged files
        raise FileNotFoundError(
            f"dataset {base}: no intact copy under {root}: not on this machine; "
            f"on a machine with network run: ltkernels fetch {base} --root {root}"
        ) from error
    return np.asarray(source.targets, dtype=np.int64), CIFAR[base][1], lambda rows: _to_unit(source.data[rows])


def _folder(path: Path, image_size: int) -> Source:
    if image_size < 1:
        raise ValueError(f"dataset folder: image_size must be >= 1; got {image_size}")
    classes, flat, labels = folder_files(path)
    return labels, len(classes), _reader(flat, image_size, path.name)


def _test_folder(train: Path, image_size: int) -> Source:
    """The sibling `test` of a folder `train`, with the numbers that its classes have there."""
    classes, (own, files, labels) = folder_files(train)[0], folder_files(train.with_name("test"))
    unknown = [name for name in own if name not in classes]
    if unknown:
        raise ValueError(f"test_set: {train.with_name('test')} must hold classes of {train}; got {unknown[0]}")
    numbers = np.array([classes.index(name) for name in own])
    return numbers[labels], len(classes), _reader(files, image_size, "test")


def _reader(files: Sequence[Path], image_size: int, name: str) -> Callable[[np.ndarray], Tensor]:
    def read(rows: np.ndarray) -> Tensor:
        out = np.empty((len(rows), image_size, image_size, 3), dtype=np.uint8)
        for i, row in enumerate(tqdm(rows, desc=f"reading {name}", unit="image", leave=False, disable=None)):
            out[i] = _read_image(files[row], image_size)
        return _to_unit(out)

    return read


def _tiny(path: Path, image_size: int, validation: bool = False) -> Source:
    """TinyImageNet as it is unpacked: train/<wnid>/images/<image>, val/images/<image> with val/val_annotations.txt."""
    where = "dataset tiny-imagenet"
    if not (path / "train").is_dir():
        raise FileNotFoundError(f"{where}: expected {path}/train/<wnid>/images/<image>, as unpacked; there is no {path}/train")
    classes, files, labels = folder_files(path / "train")
    if validation:
        table = path / "val" / "val_annotations.txt"
        if not table.is_file():
            raise FileNotFoundError(f"{where}: expected {table} with lines of an image and its wnid; there is no such file")
        pairs = [line.split("\t")[:2] for line in table.read_text().splitlines() if line]
        unknown = [pair for pair in pairs if len(pair) < 2 or pair[1] not in classes]
        if unknown:
            raise ValueError(f"{where}: {table} must name classes of {path}/train; got {unknown[0]}")
        files = [path / "val" / "images" / name for name, _ in pairs]
        labels = np.array([classes.index(wnid) for _, wnid in pairs])
    return labels.astype(np.int64), len(classes), _reader(files, image_size, path.name)


def _imagenet(root: Path, part: str, image_size: int) -> Source:
    """ImageNet-LT: the public lists ImageNet_LT_<part>.txt with lines "path label", whose paths are below `root`."""
    table, where = root / f"ImageNet_LT_{part}.txt", "dataset imagenet-lt"
    if not table.is_file():
        raise FileNotFoundError(f"{where}: expected the public list {table}, 'path label' a line; there is no such file")
    pairs = [line.rsplit(maxsplit=1) for line in table.read_text().splitlines() if line.strip()]
    bad = [number for number, pair in enumerate(pairs, 1) if len(pair) != 2 or not pair[1].isdecimal()]
    if bad or not pairs:
        raise ValueError(f"{where}: {table} must have lines 'path label'; got {f'another line {bad[0]}' if bad else 'none'}")
    files, labels = [root / name for name, _ in pairs], np.array([int(label) for _, label in pairs], dtype=np.int64)
    if not files[0].is_file():
        raise FileNotFoundError(f"{where}: {table} names {files[0]}; there is no such file, so images are not below {root} as in the list")
    return labels, int(labels.max()) + 1, _reader(files, image_size, "ImageNet-LT")


def folder_files(path: Path) -> tuple[list[str], list[Path], np.ndarray]:
    """(class names, files, labels) of path/<class>/**/<image>; classes are the sorted folder names, the first one is class 0."""
    if not path.is_dir():
        raise FileNotFoundError(f"dataset folder: no such folder: {path}")
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [sorted(f for f in entry.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) for entry in classes]
    if not any(files):
        raise FileNotFoundError(
            f"dataset folder: expected {path}/<class>/<image>; got {len(classes)} folders, no image"
        )
    labels = np.repeat(np.arange(len(classes)), [len(own) for own in files])
    return [entry.name for entry in classes], [file for own in files for file in own], labels


def _read_image(file: Path, size: int) -> np.ndarray:
    """RGB, shorter side resized to `size`, centre crop: (size, size, 3) uint8."""
    from PIL import Image, ImageOps

    with _opened(file) as image:
        # fit() resizes and crops in one resampling; it leaves an image of the right size untouched.
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


@contextmanager
def _opened(file: Path) -> Iterator:
    """The image, not yet decoded."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except OSError as error:
        raise ValueError(f"dataset folder: cannot read image {file}: {error}") from error


def _to_unit(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous().div_(127.5).sub_(1)


def _features(path: Path, width: int | None) -> Source:
    """A .npz with `features` (N, D) and `labels` (N,)."""
    where = f"dataset features: {path}"
    if not path.is_file():
        raise FileNotFoundError(f"dataset features: no such file: {path}")
    key = "file"  # named in the error below
    try:
        file = np.load(path, allow_pickle=False)
        keys = file.files if isinstance(file, np.lib.npyio.NpzFile) else []  # np.load also opens a lone array
        missing = [key for key in ("features", "labels") if key not in keys]
        if missing:
            raise ValueError(
                f"needs the keys features and labels; {missing[0]} is missing, got {', '.join(keys) or 'none'}"
            )
        arrays = []
        for key in ("features", "labels"):
            arrays.append(_mapped(path, key) if key == "features" else file[key])
        file.close()
    except (ValueError, EOFError, zipfile.BadZipFile) as error:  # also: pickled objects, a damaged archive
        raise ValueError(f"{where}: {key}: {error}") from error
    features, labels = arrays

    def require(fine: bool, expected: str, fact: str) -> None:
        if not fine:
            raise ValueError(f"{where}: {expected}; got {fact}")

    n, width_found = features.shape if features.ndim == 2 else (0, 0)
    shape = f"{features.dtype} of shape {features.shape}"
    require(features.dtype.kind in "fiu" and n * width_found > 0, "features must be numbers of shape (N, D)", shape)
    require(width in (None, width_found), f"features must have width {width}", f"{width_found}")
    shape = f"{labels.dtype} of shape {labels.shape}"
    require(labels.dtype.kind in "iu" and labels.shape == (n,), f"labels must be integers of shape ({n},)", shape)
    low, high = labels.min(), labels.max()  # the bound N keeps a stray 2^40 from sizing the class table
    require(low >= 0 and high < n, f"labels must be in [0, N) with N={n}", f"{low} to {high}")
    # In pieces: a mapped file may be larger than memory. What float32 cannot hold is inf after the cast.
    with np.errstate(over="ignore"):
        fine = [np.isfinite(features[i : i + 65536].astype(np.float32)).all(axis=1) for i in range(0, n, 65536)]
    bad = np.flatnonzero(~np.concatenate(fine))
    fact = f"NaN or inf in {bad.size} rows, first {bad[:5].tolist()}"
    require(not bad.size, "features must be finite in float32", fact)
    return labels.astype(np.int64), int(high) + 1, lambda rows: torch.from_numpy(features[rows].astype(np.float32))


def _mapped(path: Path, key: str) -> np.ndarray:
    """Array `key` of a .npz, memory-mapped where it is stored uncompressed (np.savez, `features`), read where it is compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
    with np.load(path, allow_pickle=False) as file, open(path, "rb") as raw:
        if member.compress_type != zipfile.ZIP_STORED:
            return file[key]
        raw.seek(member.header_offset + 26)  # lengths of name and extra field in the local header, which the directory does not repeat
        name, extra = int.from_bytes(raw.read(2), "little"), int.from_bytes(raw.read(2), "little")
        raw.seek(member.header_offset + 30 + name + extra)
        version = np.lib.format.read_magic(raw)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(raw)
        if dtype.hasobject or 0 in shape:
            return file[key]  # which refuses objects by name
        return np.memmap(path, dtype, "r", raw.tell(), shape, "F" if fortran else "C")


# ---- synthetic latents -----------------------------------------------------------------------------------------------


def synthetic_latents(name: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Callable[..., Tensor], Tensor]:
    """(z (n, d) float32, labels (n,), log_density, class_shares (C,)) of a set whose density is known.

    two-gaussians: 2-D, 10 : 1. moons: two interleaved arcs in 2-D, 10 : 1. tail-16d: ten classes in 16-D, 10 : 1, exp.
    log_density(z, bandwidth=0.0) -> (Q,): exact log p of the mixture convolved with N(0, bandwidth^2 I): the limit of a
    kernel estimate of that bandwidth; differentiable in z. It depends on `name` alone, never on seed or n.
    """
    if name not in SYNTHETIC:
        raise ValueError(f"synthetic_latents: name must be one of {', '.join(SYNTHETIC)}; got {name!r}")
    if n < 1:
        raise ValueError(f"synthetic_latents: n must be >= 1; got {n}")
    centres, owner, std, shares = _mixture(name)
    weight = shares[owner] / torch.bincount(owner)[owner]  # a class spreads its share evenly over its components

    generator = torch.Generator().manual_seed(seed)
    component = torch.multinomial(weight, n, replacement=True, generator=generator)
    z = centres[component] + std * torch.randn(n, centres.shape[1], dtype=torch.float64, generator=generator)

    def log_density(queries: Tensor, bandwidth: float = 0.0) -> Tensor:
        mean, log_weight = centres.to(queries), weight.log().to(queries)
        variance = std**2 + bandwidth**2
        sqdist = (queries[:, None] - mean).square().sum(-1)  # (Q, components)
        log_norm = mean.shape[1] / 2 * math.log(2 * math.pi * variance)
        return torch.logsumexp(log_weight - sqdist / (2 * variance), 1) - log_norm

    return z.float(), owner[component], log_density, shares


def _mixture(name: str) -> tuple[Tensor, Tensor, float, Tensor]:
    """(centres (M, d) float64, class of each (M,), common standard deviation, class shares (C,))."""
    two = torch.tensor([10.0, 1.0], dtype=torch.float64) / 11
    if name == "two-gaussians":
        return torch.tensor([[0.0, 3.0], [0.0, -3.0]], dtype=torch.float64), torch.arange(2), 1.0, two
    if name == "moons":
        angle = torch.linspace(0, torch.pi, 16, dtype=torch.float64)  # 16 Gaussians make an arc of even height
        arc = torch.stack([angle.cos(), angle.sin()], 1)
        centres = torch.cat([arc, torch.tensor([1.0, 0.5], dtype=torch.float64) - arc])
        return centres, torch.arange(2).repeat_interleave(16), 0.12, two
    shares = 10.0 ** -(torch.arange(10, dtype=torch.float64) / 9)
    centres = 2.0 * torch.randn(10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return centres, torch.arange(10), 1.0, shares / shares.sum()
