"""Arrays of other libraries in, and answers of the same kind out."""

import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

REAL = (float, int, Real)  # the usual ones first: to ask an abstract class takes .3 us
INTEGRAL = (int, Integral, torch.SymInt)
LIMITS = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}  # of positive numbers
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(op: str, name: str, value) -> Tensor:
    """A tensor over the same memory as a torch, NumPy (memmap too) or, through DLPack, CuPy array."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub" or not value.dtype.isnative:
            raise TypeError(f"{op}: expected {name} as a numeric array in native byte order; got dtype {value.dtype}")
        if any(stride < 0 for stride in value.strides):
            value = np.ascontiguousarray(value)  # torch has no negative strides
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing here writes to its inputs
            return torch.from_numpy(value)
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    raise TypeError(f"{op}: expected {name} as a torch tensor or an array (NumPy, or DLPack such as CuPy); got {type(value).__name__}")


def matrix(op: str, name: str, value) -> Tensor:
    """The same for a floating-point matrix."""
    value = tensor(op, name, value)
    if value.dim() != 2:
        raise ValueError(f"{op}: expected {name} with 2 dimensions (rows, columns); got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: expected {name} in float16, bfloat16, float32 or float64; got {value.dtype}")
    if value.shape[1] == 0:
        raise ValueError(f"{op}: expected {name} with at least one column; got shape {tuple(value.shape)}")
    return value


def in_kind(like) -> Callable[[Tensor], object]:
    """What turns a tensor into the kind of array that `like` is."""
    if isinstance(like, Tensor):
        return lambda answer: answer
    if isinstance(like, np.ndarray):
        return lambda answer: answer.detach().numpy()
    namespace = __import__(type(like).__module__.split(".")[0])
    return lambda answer: namespace.from_dlpack(answer.detach())


class Doubt(NamedTuple):
    """Of values: whether all lie in [low, high], where NaN does not."""

    values: Tensor
    low: float
    high: float
    error: Callable[[], Exception]


def settle(doubts: list[Doubt]) -> None:
    """Raise the error of the first doubt that is justified. Each look at a tensor on a card waits for all that the card has to do, so there
    is one for all of them; none in torch.compile."""
    if not doubts or torch.compiler.is_compiling():
        return
    doubts = [doubt for doubt in doubts if doubt.values.numel()]
    ends = [end for doubt in doubts for end in doubt.values.detach().aminmax()]
    if ends and not ends[0].is_cpu:
        ends = torch.stack([end.double() for end in ends]).cpu()  # float64 moves no integer across a limit below 2^53
    looked = iter([end.item() for end in ends])
    for doubt, least, most in zip(doubts, looked, looked, strict=True):
        if not doubt.low <= least <= most <= doubt.high:
            raise doubt.error()
