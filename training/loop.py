"""The training loop: one function for every stage of every method.

Everything random in step n is drawn from a generator seeded with (seed, rank, stage, n): no generator state is ever saved, and a run
that was stopped and resumed ends with the bits of one that was not.

Under torchrun every rank has the same generator and takes its own rows of what was drawn for the whole batch. The gradients are averaged
by one all-reduce rather than by DistributedDataParallel: the modules stay what the checkpoint, the EMA and a stage that calls its network
twice a step know, and no gradient is missing where a rank's rows happen not to use a parameter.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, ranks


def generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of (seed, key)."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in (seed, *key)]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


def batch_rows(num_rows: int, batch_size: int, step: int, seed: int, stage: str) -> Tensor:
    """Rows of batch `step`: every epoch is a fresh permutation cut into ceil(N / batch_size) nearly equal parts."""
    parts = batches_per_epoch(num_rows, batch_size)
    order = torch.randperm(num_rows, generator=generator(seed, stage, "epoch", step // parts))
    return torch.tensor_split(order, parts)[step % parts]


def batches_per_epoch(num_rows: int, batch_size: int) -> int:
    return -(-num_rows // batch_size)


class Stage:
    """One optimisation: what a method hands to `train`. Subclasses set these and define `loss`."""

    name: str
    steps: int
    modules: dict[str, nn.Module]  # saved with every checkpoint
    lr: dict[str, float]  # first learning rate of each module that the optimiser moves; `decay` says how it goes on
    cache: dict[str, Tensor]  # whatever else the next step depends on
    stream = ""  # key of its random numbers where it is not the name: stages to be compared draw the same ones

    def loss(self, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of step `step`, and 0-dim figures for the log."""
        raise NotImplementedError

    def optimiser(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups)

    def decay(self, step: int) -> float:
        """Learning rate of step `step` over the first one."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def clip_gradients(self, params: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(params, 1.0)

    def after_step(self, step: int) -> None:
        """What follows the optimiser's step: an average of the weights, a picture."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a checkpoint was written."""

    def __init__(self, signum: int, stage: str, step: int):
        super().__init__(f"stopped in stage {stage} after step {step}")
        self.signum = signum


def train(
    stage: Stage, folder: Path, *, seed: int, rank: int = 0, checkpoint_every: int = 200, progress: bool = True
) -> None:
    """Run `stage` to its last step from wherever its newest checkpoint in `folder` left it, or from the start."""
    groups = [{"params": list(stage.modules[name].parameters()), "lr": lr} for name, lr in stage.lr.items()]
    params = [p for group in groups for p in group["params"]]
    if stage.steps == 0:
        return
    optimiser = stage.optimiser(groups)
    done = checkpoint.restore(folder, stage.name, stage.modules, optimiser, stage.cache)
    log = Log(folder / "log.jsonl", stage.name, done, write=ranks.rank() == 0)
    device = params[0].device

    quiet = not progress or ranks.rank() > 0

    with noted_signals() as received, tqdm(total=stage.steps, initial=done, desc=stage.name, disable=quiet) as bar:
        for step in range(done, stage.steps):
            for group, lr in zip(optimiser.param_groups, stage.lr.values(), strict=True):
                group["lr"] = lr * stage.decay(step)
            loss, figures = stage.loss(step, generator(seed, rank, stage.stream or stage.name, step, device=device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            figures = {name: value.detach() for name, value in {"loss": loss, **figures}.items()}
            figures = averaged(params, figures) if ranks.size() > 1 else figures
            stage.clip_gradients(params)
            optimiser.step()
            stage.after_step(step)
            log.add(step, figures)
            bar.update()

            last, stop = step + 1 == stage.steps, ranks.first_signal(received)
            if last or stop or (step + 1) % checkpoint_every == 0:
                log.flush()
                if ranks.rank() == 0:
                    checkpoint.save(folder, stage.name, step + 1, stage.modules, optimiser, stage.cache)
                ranks.wait()  # nobody leaves before the checkpoint is whole
            if stop and not last:
                raise Interrupted(stop, stage.name, step + 1)
    if stop := ranks.first_signal(received):  # came during the last step: the stage is complete, the run is not
        raise Interrupted(stop, stage.name, stage.steps)


def averaged(params: list[nn.Parameter], figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients, in place, and figures become the means over the ranks."""
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    figures = {name: value.to(params[0].grad, copy=True) for name, value in figures.items()}
    ranks.average([*(param.grad for param in params), *figures.values()])
    return figures


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM instead of the process; a second one of the same kind acts as it always does."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Log:
    """log.jsonl, one line a step. Figures stay tensors until `flush`, so that a step never waits for the device."""

    def __init__(self, path: Path, stage: str, done: int, write: bool = True):
        self.path, self.stage, self.write, self.pending = path, stage, write, []
        if not write:
            return
        rows = [row for row in read_log(path) if row["stage"] != stage or row["step"] < done]  # the rest will be run again
        with checkpoint.replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def add(self, step: int, figures: dict[str, Tensor]) -> None:
        self.pending.append((step, {name: value.detach() for name, value in figures.items()}))

    def flush(self) -> None:
        lines = []
        try:
            for step, figures in self.pending:
                values = torch.stack([value.double() for value in figures.values()]).tolist()
                row = {"stage": self.stage, "step": step, **dict(zip(figures, values, strict=True))}
                if not np.isfinite(row["loss"]):
                    raise FloatingPointError(f"train: the loss of stage {self.stage} is {row['loss']} in step {step}")
                lines.append(json.dumps(row) + "\n")
        finally:
            if self.write:
                with open(self.path, "a") as file:
                    file.writelines(lines)
        self.pending.clear()


def read_log(path: Path) -> list[dict]:
    """The lines of a log; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
