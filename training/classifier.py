"""A small classifier, whose features stand in for Inception's: trained once on a balanced data set and kept in the cache folder.

What it has learnt is a function of the images, the architecture and the numbers below, all of which the file's hash contains; its name has
a hash of the weights themselves, so that figures from two of them, however small the difference, never look like one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, data
from .config import short_name
from .loop import batch_rows, generator
from .runfolder import check_device
from .views import augment_images

SEED, STEPS, EPOCHS, BATCH_SIZE, LR = 0, 600, 15, 128, 2e-3  # STEPS: at least, for small sets


class Classifier(nn.Module):
    """3x3 convolutions, halving the image until it has 4 pixels a side, then a linear layer to the features and one to the logits.

    GroupNorm: an image's features do not depend on the others of its batch.
    """

    def __init__(self, channels: int, size: int, num_classes: int):
        super().__init__()
        width, self.dim = 32, 64 if size <= 16 else 128
        layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        while size > 4:
            wider = min(2 * width, 256)
            layers += [nn.Conv2d(width, wider, 3, 2, 1, bias=False), nn.GroupNorm(8, wider), nn.ReLU()]
            width, size = wider, -(-size // 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, self.dim))
        self.head = nn.Linear(self.dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features (B, dim), logits (B, C)) of images in [-1, 1]."""
        features = self.body(x)
        return features, self.head(F.relu(features))


def train_balanced_classifier(dataset: data.Dataset, *, device: str = "cpu", progress: bool = True) -> tuple[Classifier, float | None]:
    """(the network, its accuracy on a held-out fifth, None where no class has two images)."""
    train_set, held = data.train_holdout_split(dataset, 0.2, SEED)
    channels, size, _ = dataset.images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(SEED, "classifier").initial_seed())
        net = Classifier(channels, size, dataset.num_classes).to(device)
    steps = max(STEPS, EPOCHS * len(train_set) // BATCH_SIZE)
    optimiser = torch.optim.Adam(net.parameters(), LR)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in tqdm(range(steps), desc="classifier", disable=not progress):
        rows = batch_rows(len(train_set), BATCH_SIZE, step, SEED, "classifier")
        x, y = train_set.images[rows].to(device), train_set.labels[rows].to(device)
        loss = F.cross_entropy(net(augment_images(x, generator(SEED, "classifier", step, device=device)))[1], y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    net.eval().requires_grad_(False)
    if not len(held):
        return net, None
    right = [net(x.to(device))[1].argmax(1).cpu() == y for x, y in zip(held.images.split(1024), held.labels.split(1024), strict=True)]
    return net, torch.cat(right).double().mean().item()


def load_classifier(
    dataset: data.Dataset, cache: Path, *, device: str = "cpu", progress: bool = True
) -> tuple[Classifier, str, float | None]:
    """(network, name, accuracy), from the cache or, where it is not there, trained and put there."""
    channels, size, _ = dataset.images.shape[1:]
    net = Classifier(channels, size, dataset.num_classes)
    key = checkpoint.digest(repr(net), "[-1, 1]", (SEED, STEPS, EPOCHS, BATCH_SIZE, LR), dataset.images, dataset.labels)

    def make() -> tuple[dict[str, Tensor], dict]:
        if progress:
            print(f"{dataset.name}: no classifier for these images in {cache} yet, training one", flush=True)
        trained, accuracy = train_balanced_classifier(dataset, device=device, progress=progress)
        return {name: value.cpu() for name, value in trained.state_dict().items()}, {"accuracy": accuracy}

    name = short_name(dataset.name)
    weights, about = checkpoint.cached(cache / f"classifier-{name}-{key[:12]}.safetensors", key, make)
    net.load_state_dict(weights)
    name = f"classifier-{name}-{checkpoint.digest(*(weights[key] for key in sorted(weights)))[:8]}"
    return net.to(device).eval().requires_grad_(False), name, about["accuracy"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training classifier", description=__doc__)
    parser.add_argument("--dataset", default="digits", help="what the generated images are of; digits-lt means digits")
    parser.add_argument("--root", default="data", help="folder with downloaded data sets")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images of a folder")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    check_device("classifier", options.device)
    dataset = data.balanced_reference(options.dataset, root=options.root, image_size=options.image_size)
    if dataset.images is None:
        raise ValueError(f"classifier: expected a data set of images; {options.dataset} holds features")
    _, name, accuracy = load_classifier(dataset, options.cache, device=options.device, progress=not options.no_progress)
    print(f"{name}: accuracy {'-' if accuracy is None else f'{accuracy:.3f}'} on a held-out fifth of {len(dataset)} images")
    return 0
