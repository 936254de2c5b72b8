"""`fetch`: what a machine without network will need, downloaded where there is one to the place where the code looks for it.

Nothing else in this package uses the network, but timm for the models of `features`. A file is whole, with the hash that its publisher
states, or absent: torchvision's own constants for CIFAR; of Inception's weights the first eight digits of the SHA-256, which their name
carries by the convention of torch.hub.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import importlib.util
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import checkpoint, data

INCEPTION = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")  # torch-fidelity's, pytorch-fid's
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION[0]}"
NAMES = ("inception", *data.CIFAR, "digits")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training fetch", description="Download what a machine without network will need.")
    parser.add_argument("name", nargs="+", help=", ".join(NAMES))
    parser.add_argument("--root", default="data", help="folder for data sets; Inception's weights go to torch's hub folder (TORCH_HOME)")
    options = parser.parse_args(arguments)
    for name in options.name:
        print(f"{name}: {fetch(name, options.root)}")
    return 0


def fetch(name: str, root: str | Path = "data") -> str:
    """Where `name` is now, in words. What is there already, whole, is not downloaded again."""
    base = name.removesuffix("-lt")
    if base == "inception":
        digits = INCEPTION[0].removesuffix(".pth").rsplit("-", 1)[1]
        path = download(INCEPTION_URL, inception_folder() / INCEPTION[0], "sha256", digits)
        return f"{path}" if importlib.util.find_spec("torch_fidelity") else f"{path}; to use it: pip install torch-fidelity"
    if base in data.CIFAR:
        return str(_cifar(base, Path(root)))
    if base in ("digits", "digits-train"):
        return f"a part of scikit-learn, {len(data.load('digits'))} images: nothing to download"
    raise ValueError(f"fetch: expected one of {', '.join(NAMES)}; got {name!r} (TinyImageNet and ImageNet are unpacked by hand)")


def _cifar(base: str, root: Path) -> Path:
    kind = data.torchvision_set(base)
    try:
        kind(str(root), train=True, download=False)
    except RuntimeError:  # missing or damaged
        download(kind.url, root / kind.filename, "md5", kind.tgz_md5)
        kind(str(root), train=True, download=True)  # finds the archive whole, unpacks it and checks every file
    return root / kind.base_folder


def inception_folder() -> Path:
    """Where torch-fidelity and pytorch-fid keep Inception's weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def download(url: str, path: Path, algorithm: str, digits: str) -> Path:
    """`url` as the file `path`, whose hash begins with `digits`; what is cut off or another file leaves nothing behind."""
    if path.is_file() and _hash(path, algorithm).startswith(digits):
        return path
    with checkpoint.replacing(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(temporary, "wb") as file:
                size = int(answer.headers.get("Content-Length") or 0)
                with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                    while part := answer.read(1 << 20):
                        file.write(part)
                        bar.update(len(part))
        except (OSError, http.client.HTTPException) as error:  # no network, no such file, a connection that broke
            raise OSError(f"fetch: cannot download {url}: {error}") from error
        if (got := temporary.stat().st_size) < size:
            raise OSError(f"fetch: {url} was cut off after {got} of {size} bytes; nothing is kept, try again")
        if not (found := _hash(temporary, algorithm)).startswith(digits):
            raise ValueError(f"fetch: {url}: expected {algorithm} {digits}; got {found}; nothing is kept")
    return path


def _hash(path: Path, algorithm: str) -> str:
    whole = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            whole.update(part)
    return whole.hexdigest()
