"""Files that are either whole or absent: checkpoints of a stage, small JSON files, and a cache that runs share.

A checkpoint is a pair: weights/<stage>-<step>.safetensors with every module, and weights/<stage>-<step>.pt with the optimiser and the
stage's cached tensors, read with weights_only=True. The .pt is renamed into place last, so a pair is complete exactly when it exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Modules = Mapping[str, nn.Module]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is synced to the disk and takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def save(folder: Path, stage: str, step: int, modules: Modules, optimiser: torch.optim.Optimizer, cache: dict[str, Tensor]) -> None:
    """Write the checkpoint of `stage` after `step` steps and remove the stage's older ones."""
    weights = folder / "weights" / f"{stage}-{step:06d}.safetensors"
    tensors = {f"{name}.{key}": value.contiguous() for name, module in modules.items() for key, value in module.state_dict().items()}
    with replacing(weights) as temporary:
        save_file(tensors, temporary)
    with replacing(weights.with_suffix(".pt")) as temporary:
        torch.save({"step": step, "optimiser": optimiser.state_dict(), "cache": cache}, temporary)
    discard(folder, stage, but=step)


def discard(folder: Path, stage: str, but: int | None = None) -> None:
    """Remove the checkpoints of `stage`, but for the one after `but` steps."""
    for old in _steps(folder, stage):
        if old != but:
            path = folder / "weights" / f"{stage}-{old:06d}.pt"
            path.unlink()  # first: a weights file without its .pt is not a checkpoint
            path.with_suffix(".safetensors").unlink(missing_ok=True)


def latest(folder: Path, stage: str) -> int | None:
    """Steps done in the stage's newest checkpoint, None where there is none."""
    return max(_steps(folder, stage), default=None)


def restore(folder: Path, stage: str, modules: Modules, optimiser: torch.optim.Optimizer, cache: dict[str, Tensor]) -> int:
    """Load the newest checkpoint of `stage` into the arguments; the number of steps done, 0 where there is none."""
    step = latest(folder, stage)
    if step is None:
        return 0
    path = folder / "weights" / f"{stage}-{step:06d}.pt"
    device = next(iter(next(iter(modules.values())).state_dict().values())).device
    load_modules(path.with_suffix(".safetensors"), modules)
    try:
        rest = torch.load(path, map_location=device, weights_only=True)
        optimiser.load_state_dict(rest["optimiser"])
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise ValueError(f"checkpoint: cannot read {path}: {error}") from error
    cache.clear()
    cache.update(rest["cache"])
    return step


def borrow(source: Path, folder: Path, stage: str) -> None:
    """Copy the newest checkpoint of `stage` from the run in `source` to `folder`, unless there is one already."""
    step = latest(source, stage)
    if step is None or latest(folder, stage) is not None:
        return
    for suffix in (".safetensors", ".pt"):  # in the order of `save`
        name = f"{stage}-{step:06d}{suffix}"
        with replacing(folder / "weights" / name) as temporary:
            shutil.copyfile(source / "weights" / name, temporary)


def load_modules(path: Path, modules: Modules) -> None:
    """Weights of `path` into modules; a missing, surplus or misshapen tensor is an error."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"checkpoint: cannot read {path}: {error}") from error
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: {path} does not fit {name}: {error}") from error


# ---- the cache: what is computed once for many runs ------------------------------------------------------------------


def digest(*parts: object) -> str:
    """Hexadecimal SHA-256 of tensors, by dtype, shape and bytes, and of whatever else by its repr."""
    whole = hashlib.sha256()
    for part in parts:
        tensor = isinstance(part, Tensor)
        whole.update(f"{part.dtype} {tuple(part.shape)}\n".encode() if tensor else f"{part!r}\n".encode())
        if tensor:
            whole.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def cached(path: Path, key: str, make: Callable[[], tuple[dict[str, Tensor], dict]]) -> tuple[dict[str, Tensor], dict]:
    """Tensors and a few JSON values, from `path` or, where it is absent or was made for another key, from `make`, which also writes it.

    Several processes may do this at once: each writes a file of its own, the first one's is kept, and all answer with that one.
    """
    if (found := _read_cached(path, key)) is None:
        tensors, about = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as own:
            with replacing(Path(own) / path.name) as temporary:
                metadata = {"key": key, "about": json.dumps(about)}
                save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
            try:
                os.link(Path(own) / path.name, path)  # which, unlike a rename, fails where another process was first
            except FileExistsError:
                if _read_cached(path, key) is None:
                    os.replace(Path(own) / path.name, path)
            except OSError:  # a file system without hard links
                os.replace(Path(own) / path.name, path)
        found = _read_cached(path, key)
    return found


def _read_cached(path: Path, key: str) -> tuple[dict[str, Tensor], dict] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about["about"])
    except Exception as error:  # safetensors has its own types for a damaged file
        raise ValueError(f"cache: cannot read {path}: {error}; delete it, and it will be made again") from error


def _steps(folder: Path, stage: str) -> list[int]:
    pattern = re.compile(re.escape(stage) + r"-(\d+)\.pt")
    return [int(match[1]) for path in (folder / "weights").glob("*.pt") if (match := pattern.fullmatch(path.name))]
