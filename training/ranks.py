"""Several processes that train one network, as torchrun starts them: what one of them has to tell the others.

Every rank knows the whole batch, since whatever is random in a step is drawn from a generator that all of them have; it computes its own
rows. With one process all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, this process is one of the WORLD_SIZE that torchrun started; cuda means the GPU of its LOCAL_RANK."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")  # gloo for flags: they never wait for a GPU
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def part(count: int) -> slice:
    """This rank's rows of a batch of `count`, which `size()` divides."""
    own = count // size()
    return slice(rank() * own, (rank() + 1) * own)


def average(tensors: Sequence[Tensor]) -> None:
    """Every tensor becomes its mean over the ranks, in place. One message: the tensors of a step are many and small."""
    if size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[part(len(grad))]


def gathered(rows: Tensor) -> Tensor:
    """The whole batch of which `rows` are this rank's `part`.

    Differentiable: a row's gradient is the sum over the losses of all ranks, which have to derive theirs together; `average` then divides
    it by their number, like every gradient.
    """
    return _Gather.apply(rows) if size() > 1 else rows


def total(counts: Tensor) -> Tensor:
    """The sum over the ranks."""
    if size() > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def first_signal(received: Sequence[int]) -> int:
    """The signal that some rank has received, 0 for none: all ranks stop after the same step."""
    signum = received[0] if received else 0
    if size() > 1:
        word = torch.tensor([signum])
        dist.all_reduce(word, dist.ReduceOp.MAX)
        signum = int(word)
    return signum


def wait() -> None:
    """Until every rank is here."""
    first_signal(())


def on_the_first(job: Callable[[], object]) -> None:
    """`job()` on the first rank, while the others wait. Where it fails, the others end as well, and leave the words to the first."""
    error = None
    if rank() == 0:
        try:
            job()
        except Exception as caught:  # raised below, once the others know
            error = caught
    if first_signal([1] if error else []):
        raise error or SystemExit(2)
