"""Files of other people's images: arrays of samples and labels, and the Gaussians that FID is made of."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .metrics import Moments


def read_images(samples: Path, labels: Path | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, str]:
    """Images (N, C, H, W), uint8 or float in [0, 1], and labels (N,) of files written by np.save: (uint8 images, int64 labels, -1 where no
    file is given, what was done to the images)."""

    def read(path: Path) -> np.ndarray:
        if not path.is_file():
            raise FileNotFoundError(f"evaluate: no such file: {path}")
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:  # pickles, files cut off
            raise ValueError(f"evaluate: cannot read {path}: {error}") from error

    def refuse(path: Path, expected: str, fact: object) -> None:
        raise ValueError(f"evaluate: {path}: expected {expected}; got {fact}")

    images = read(samples)
    if not isinstance(images, np.ndarray):
        refuse(samples, "one array, as np.save writes it", "several, as np.savez does")
    wanted = f"images of shape (N, {', '.join(map(str, shape))})"
    if images.ndim == 4 and tuple(images.shape[1:]) == (*shape[1:], shape[0]) != shape:
        refuse(samples, wanted, f"{images.shape}, whose channels are last: transpose(0, 3, 1, 2)")
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or len(images) == 0:
        refuse(samples, wanted, images.shape)
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        refuse(samples, "uint8, or floats in [0, 1]", images.dtype)
    done = "8-bit images, as they are"
    if images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())
        if not 0 <= low <= high <= 1:  # NaN, too
            way = "(x + 1) / 2" if -1 <= low < 0 and high <= 1 else "x / 255" if 0 <= low and 2 < high <= 255 else None
            refuse(samples, "floats in [0, 1]", f"{low:.9g} to {high:.9g}" + (f": {way} makes them so" if way else ""))
        done, floats, images = f"{images.dtype} in [0, 1], rounded to 8 bits", images, np.empty(images.shape, np.uint8)
        for rows in range(0, len(images), 1000):  # float64 of all of them would be eight times the file
            images[rows : rows + 1000] = np.rint(floats[rows : rows + 1000].astype(np.float64) * 255)
    images = np.require(images, requirements="W")  # a copy of the mapped file, if it is that still
    if labels is None:
        return torch.from_numpy(images), torch.full((len(images),), -1), done
    classes = read(labels)
    if not isinstance(classes, np.ndarray) or classes.dtype.kind not in "iu":
        refuse(labels, "an array of integers", getattr(classes, "dtype", "several arrays"))
    if classes.shape != (len(images),):
        refuse(labels, f"one label an image, shape ({len(images)},)", classes.shape)
    if classes.min() < -1 or classes.max() >= 2**31:
        refuse(labels, "labels from 0 on, or -1 for none", f"{classes.min()} to {classes.max()}")
    return torch.from_numpy(images), torch.from_numpy(classes.astype(np.int64)), done


def read_statistics(path: Path) -> Moments:
    """mu (F,) and sigma (F, F) of a .npz, as pytorch-fid and the released codes write them."""
    if not path.is_file():
        raise FileNotFoundError(f"evaluate: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = (torch.from_numpy(file[name].astype(np.float64, casting="same_kind")) for name in ("mu", "sigma"))
    except (ValueError, KeyError, EOFError, OSError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"evaluate: {path}: expected an .npz with mu and sigma; {error}") from error
    if mean.dim() != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"evaluate: {path}: expected mu (F,) and sigma (F, F); got {tuple(mean.shape)} and {tuple(cov.shape)}")
    if not (torch.isfinite(mean).all() and torch.isfinite(cov).all()):
        raise ValueError(f"evaluate: {path}: expected finite mu and sigma; got NaN or inf")
    if not torch.allclose(cov, cov.T, rtol=1e-5, atol=1e-8):
        raise ValueError(f"evaluate: {path}: expected a symmetric sigma; it differs from its transpose by {(cov - cov.T).abs().max():g}")
    if len(mean) == 0 or (least := torch.linalg.eigvalsh(cov)[0].item()) < -1e-6 * max(1.0, cov.diagonal().max().item()):
        raise ValueError(f"evaluate: {path}: expected a covariance sigma; got {f'the eigenvalue {least:g}' if len(mean) else 'F = 0'}")
    return Moments(mean, cov, None)
