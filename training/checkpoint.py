"""Files that are either whole or absent: checkpoints of a stage, and small JSON files.

A checkpoint is a pair: weights/<stage>-<step>.safetensors with every module, and weights/<stage>-<step>.pt with the optimiser and the
stage's cached tensors, read with weights_only=True. The .pt is renamed into place last, so a pair is complete exactly when it exists.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
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
    for old in _steps(folder, stage):
        if old != step:
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


def _steps(folder: Path, stage: str) -> list[int]:
    pattern = re.compile(re.escape(stage) + r"-(\d+)\.pt")
    return [int(match[1]) for path in (folder / "weights").glob("*.pt") if (match := pattern.fullmatch(path.name))]
