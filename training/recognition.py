"""Recognition on a long tail: the classifiers that 002 and 003 train on real and generated images, and how they are scored.

ResNet-32 is the CIFAR network of He et al. (2016), ResNeXt-50 torchvision's, and the small network the one of `classifier` without its
features. The loss is softmax or balanced softmax (Ren et al., 2020): the log-frequencies of the training labels are added to the logits
while they are trained, so that without them they predict as if all classes had been equally frequent.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, data
from .classifier import Classifier
from .loop import Stage, batch_rows, batches_per_epoch, generator, train
from .methods.ddpm import mirrored


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: SGD whose learning rate falls from `lr` to zero as a cosine. Give `steps` or `epochs`."""

    net: Literal["auto", "small", "resnet32", "resnext50"] = "auto"  # auto: small up to 16 pixels, resnet32 up to 64, resnext50 above
    loss: Literal["softmax", "balanced"] = "softmax"
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    flip: bool = True  # every second image mirrored
    crop: bool = True  # shifted by up to an eighth of its side (4 pixels of 32), black coming in

    def __post_init__(self) -> None:
        for name, known in (("net", ("auto", *NETS)), ("loss", ("softmax", "balanced"))):
            if getattr(self, name) not in known:
                raise ValueError(f"Recipe: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"Recipe: expected steps or epochs; got {'neither' if self.steps is None else 'both'}")
        length = self.epochs if self.steps is None else self.steps
        if min(length, self.batch_size) < 1:
            raise ValueError(f"Recipe: steps, epochs and batch_size must be >= 1; got {length} and a batch of {self.batch_size}")


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, recipe: Recipe, *, seed: int, folder: str | Path | None = None,
    stage: str = "classifier", checkpoint_every: int = 1000, progress: bool = True,
) -> nn.Module:  # fmt: skip
    """A network that answers images (B, C, H, W) in [-1, 1] with logits (B, num_classes), in eval mode, on the images' device.

    images (N, C, H, W): float in [-1, 1] or uint8; labels (N,) in [0, num_classes). Its bits are a function of these, the recipe and
    seed (on a GPU: to rounding): classifiers that are to be compared have the same first weights, whatever `stage` they are. folder: keeps
    checkpoints of `stage`, goes on from them, and answers at once where the stage is finished; one of another recipe, another seed or other
    images is refused.
    Example: `train_classifier(dataset.images, dataset.labels, 10, RECIPES["digits"], seed=0)`.
    """
    _check_images(images, labels, num_classes)
    net = build(recipe, tuple(images.shape[1:]), num_classes, generator(seed, Recognise.stream, "network").initial_seed()).to(images.device)
    job = Recognise(stage, net, images, labels, num_classes, recipe, seed)
    with tempfile.TemporaryDirectory() as passing:
        kept = Path(passing if folder is None else folder)
        kept.mkdir(parents=True, exist_ok=True)
        whole = checkpoint.digest(images, labels, num_classes)
        _claim(kept / f"{stage}.json", {"recipe": dataclasses.asdict(recipe), "seed": seed, "images": whole})
        train(job, kept, seed=seed, checkpoint_every=checkpoint_every, progress=progress)
    return net.eval().requires_grad_(False)


def recognition_scores(net: nn.Module, test: data.Dataset, train_counts: Sequence[int], rule: str = "tercile") -> dict:
    """Shares in [0, 1]: top1 of all test images; top1_many, top1_med, top1_few of those of the classes that are frequent, medium and rare
    by train_counts (C,) and `rule` (see `data.split_groups`); std, the standard deviation (ddof 0) of these three. precision and recall
    are means over the classes in the test set; a class that is never predicted has precision 0. per_class (C,): share of a class's images
    that are recognised. None for a class or a group without a test image, and for std if there is such a group.
    """
    if len(train_counts) != test.num_classes:
        raise ValueError(f"recognition_scores: expected a count for each of {test.num_classes} classes; got {len(train_counts)}")
    predicted, labels = predict(net, test.images), test.labels
    count = torch.bincount(labels, minlength=test.num_classes)
    right = torch.bincount(labels[predicted == labels], minlength=test.num_classes)
    told = torch.bincount(predicted, minlength=test.num_classes)
    share = lambda part, whole: float(part) / float(whole) if whole else None  # noqa: E731
    groups = [list(classes) for classes in data.split_groups(train_counts, rule)]
    many, med, few = (share(right[classes].sum(), count[classes].sum()) for classes in groups)
    seen = count > 0
    return {
        "top1": share(right.sum(), count.sum()), "top1_many": many, "top1_med": med, "top1_few": few, "std": group_std(many, med, few),
        "precision": float((right.double() / told.clamp(min=1))[seen].mean()), "recall": float((right.double() / count)[seen].mean()),
        "per_class": [share(*pair) for pair in zip(right, count, strict=True)],
    }  # fmt: skip


def group_std(*accuracies: float | None) -> float | None:
    """Std of 003: how far the accuracies of many, med and few are apart (ddof 0)."""
    return None if None in accuracies else float(np.std(accuracies))


@torch.no_grad()
def predict(net: nn.Module, images: Tensor, batch_size: int = 512) -> Tensor:
    """Most probable class (N,) of images (N, C, H, W), float in [-1, 1] or uint8, on the CPU."""
    device = next(net.parameters()).device
    return torch.cat([net(to_unit(part.to(device))).argmax(1).cpu() for part in images.split(batch_size)])


def to_unit(images: Tensor) -> Tensor:
    """float32 in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


# ---- training --------------------------------------------------------------------------------------------------------


class Recognise(Stage):
    """Cross entropy of one classifier."""

    stream = "classifier"

    def __init__(self, name: str, net: nn.Module, images: Tensor, labels: Tensor, num_classes: int, recipe: Recipe, seed: int):
        self.name, self.net, self.modules, self.lr, self.cache = name, net.train(), {"classifier": net}, {"classifier": recipe.lr}, {}
        self.images, self.labels, self.recipe, self.seed = images, labels, recipe, seed
        self.steps = recipe.steps or recipe.epochs * batches_per_epoch(len(labels), recipe.batch_size)
        counts = torch.bincount(labels, minlength=num_classes)
        self.prior = counts.log() - torch.tensor(float(len(labels))).log() if recipe.loss == "balanced" else torch.zeros(())
        self.prior = self.prior.to(images.device)  # of a class without images: -inf, as it is no label's

    def loss(self, step, rng):
        rows = batch_rows(len(self.labels), self.recipe.batch_size, step, self.seed, self.stream).to(self.images.device)
        x, y = to_unit(self.images[rows]), self.labels[rows]
        logits = self.net(varied(x, rng, flip=self.recipe.flip, crop=self.recipe.crop))
        return F.cross_entropy(logits + self.prior, y), {"accuracy": (logits.detach().argmax(1) == y).double().mean()}

    def optimiser(self, groups):
        return torch.optim.SGD(groups, momentum=self.recipe.momentum, weight_decay=self.recipe.weight_decay)

    def clip_gradients(self, params):
        """Not here: the recipes have none."""


def varied(x: Tensor, rng: torch.Generator, *, flip: bool, crop: bool) -> Tensor:
    """Every image of x (B, C, H, W) mirrored or not, and shifted; what comes in is black (-1)."""
    if flip:
        x = mirrored(x, torch.rand(len(x), generator=rng, device=x.device) < 0.5)
    if not crop:
        return x
    count, _, height, width = x.shape
    reach = max(height // 8, 1)
    top, left = torch.randint(2 * reach + 1, (2, count), generator=rng, device=x.device)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    padded = F.pad(x, (reach,) * 4, value=-1.0)
    return padded[torch.arange(count, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _claim(path: Path, about: dict) -> None:
    """Write what the checkpoints beside `path` are of; refuse those of something else."""
    if not path.is_file():
        checkpoint.write_json(path, about)
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"train_classifier: {path} is damaged ({error}); give another folder or delete it") from error
    if found != about:
        changed = ", ".join(key for key in about if found.get(key) != about[key])
        raise ValueError(f"train_classifier: {path} is of a classifier with another value of {changed}; give another folder or delete it")


def _check_images(images: Tensor, labels: Tensor, num_classes: int) -> None:
    def require(fine: bool, expected: str, fact: object) -> None:
        if not fine:
            raise ValueError(f"train_classifier: expected {expected}; got {fact}")

    kinds = images.dtype == torch.uint8 or images.is_floating_point()
    require(images.dim() == 4 and kinds and len(images) > 0, "images (N, C, H, W), float or uint8", f"{images.dtype} {tuple(images.shape)}")
    fact = f"{labels.dtype} of shape {tuple(labels.shape)}"
    require(labels.shape == images.shape[:1] and labels.dtype == torch.int64, f"int64 labels of shape ({len(images)},)", fact)
    low, high = labels.min().item(), labels.max().item()
    require(low >= 0 and high < num_classes, f"labels in [0, {num_classes})", f"{low} to {high}")


# ---- networks --------------------------------------------------------------------------------------------------------


class SmallNet(Classifier):
    """The network of `classifier`, without its features."""

    def forward(self, x):
        return super().forward(x)[1]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights, which halves the image and fills new channels with zeros (option A)."""

    def __init__(self, before: int, width: int):
        super().__init__()
        self.grow, self.stride = width - before, 1 if width == before else 2
        self.conv1, self.norm1 = nn.Conv2d(before, width, 3, self.stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        short = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2))
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + short)


class ResNet32(nn.Sequential):
    """Three stages of five blocks with 16, 32 and 64 channels (He et al., 2016, 4.2)."""

    def __init__(self, channels: int, num_classes: int):
        widths = [16, *[16] * 5, *[32] * 5, *[64] * 5]
        super().__init__(
            nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            *(Block(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes),
        )  # fmt: skip
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)


def _resnext50(channels: int, size: int, num_classes: int) -> nn.Module:
    try:
        from torchvision.models import resnext50_32x4d
    except ImportError as error:
        raise ImportError("Recipe: resnext50 needs torchvision: pip install 'ltkernels[train]'") from error
    if channels != 3:
        raise ValueError(f"Recipe: resnext50 takes images of 3 channels; got {channels}")
    return resnext50_32x4d(weights=None, num_classes=num_classes)


NETS = {
    "small": SmallNet,
    "resnet32": lambda channels, size, num_classes: ResNet32(channels, num_classes),
    "resnext50": _resnext50,
}


def build(recipe: Recipe, shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised network for images of `shape` (C, H, W), a function of the seed."""
    channels, size = shape[0], max(shape[1:])
    name = recipe.net if recipe.net != "auto" else "small" if size <= 16 else "resnet32" if size <= 64 else "resnext50"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name](channels, size, num_classes)


RECIPES = {
    "digits": Recipe(net="small", steps=600, batch_size=64, lr=0.05, flip=False),  # ours
    "cifar": Recipe(net="resnet32", epochs=200, batch_size=256),  # 003 for network, batch and momentum; it is silent about the rest
    "imagenet-lt": Recipe(net="resnext50", epochs=90, batch_size=512, lr=0.2),  # 003; the weight decay is ours
    "imagenet-lt-200": Recipe(net="resnext50", epochs=200, batch_size=512, lr=0.2),
}


def recipe_of(dataset: str) -> Recipe:
    """The recipe for the data set of this name."""
    kind = dataset.partition(":")[0]
    return RECIPES["digits" if kind.startswith("digits") else "imagenet-lt" if kind == "imagenet-lt" else "cifar"]
