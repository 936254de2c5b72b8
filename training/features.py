"""`features`: run a pretrained image model over a folder once and keep what it says as a feature file for `--dataset features:FILE`.

The file is an uncompressed .npz with features (N, D) float32, labels (N,), the class names and the model's name; `data.load` maps its
features into memory instead of reading them. Rows are in the order of the folder: classes by name, files by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, data


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training features", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a model of timm, such as vit_small_patch16_224.dino")
    parser.add_argument("--data", required=True, help="folder with one folder of images per class")
    parser.add_argument("--out", default=None, help="file to write; default: features/MODEL-FOLDER.npz")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ValueError(f"features: --batch-size must be >= 1; got {options.batch_size}")
    out = Path(options.out or f"features/{options.model.replace('/', '_')}-{Path(options.data).resolve().name}.npz")
    if out.suffix != ".npz":
        raise ValueError(f"features: --out must end in .npz; got {out}")
    if out.exists():
        raise FileExistsError(f"features: {out} is there already; use it, delete it, or give another --out")
    classes, files, labels = data.folder_files(Path(options.data))
    model, transform = pretrained(options.model)
    write(out, model, transform, files, labels, classes, options.model, options.batch_size, options.device, not options.no_progress)
    print(f"{len(files)} rows in {out}; cluster them with: python -m training cludi --dataset features:{out}")
    return 0


def pretrained(name: str) -> tuple[nn.Module, Callable]:
    """(model without its classifier, the transform it was trained with), weights from wherever timm finds them."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"features: the model {name} needs timm, which is not installed: pip install 'ltkernels[dino]'") from error
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except RuntimeError as error:  # timm's word for an unknown name, and for a model without weights
        raise ValueError(f"features: timm has no pretrained model {name!r}: {error}") from error
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


@torch.no_grad()
def write(
    out: Path, model: nn.Module, transform: Callable, files: Sequence[Path], labels: np.ndarray, classes: Sequence[str], name: str,
    batch_size: int = 64, device: str = "cpu", progress: bool = True,
) -> None:  # fmt: skip
    """Features of `files` into `out`, batch by batch through a memory-mapped array: the file is whole or absent, and never in memory."""
    model.to(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, features = out.with_name(f".{out.name}.rows.npy"), None
    try:
        done = 0
        with tqdm(total=len(files), desc=name, unit="image", disable=not progress) as bar:
            for batch in _batches(files, transform, batch_size):
                rows = model(batch.to(device)).flatten(1).float().cpu().numpy()
                if not np.isfinite(rows).all():
                    raise ValueError(f"features: {name} answers NaN or inf for an image among {files[done]} and the next {len(rows) - 1}")
                if features is None:
                    features = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(files), rows.shape[1]))
                features[done : done + len(rows)] = rows
                done += len(rows)
                bar.update(len(rows))
        with checkpoint.replacing(out) as whole, open(whole, "wb") as file:
            np.savez(file, features=features, labels=labels, classes=np.array(classes), model=np.array(name))
    finally:
        temporary.unlink(missing_ok=True)


def _batches(files: Sequence[Path], transform: Callable, size: int) -> Iterator[Tensor]:
    for start in range(0, len(files), size):
        yield torch.stack([_read(file, transform) for file in files[start : start + size]])


def _read(file: Path, transform: Callable) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return transform(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"features: cannot read image {file}: {error}") from error
