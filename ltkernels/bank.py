"""A set of points prepared once for many searches."""

import json
import math
import mmap
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import _arrays
from .backends import _FLOATS


class Bank:
    r"""Points to search in, prepared once: a centre, the centred float32 copy and its norms that the filters of the kernels read.

    Points in a file (a memmap, a path) stay there: a search streams it, once for each block of its queries, and then reads the rows of the
    candidates, asking for all of a query's at once: of a file that memory cannot hold it takes what the disk takes. A search of a bank in
    itself keeps up to 8 max(3 k, 192) bytes a row, in a file or not.

    Args:
        points: (N, d) floating-point tensor, NumPy array or memmap, DLPack array, or the path of a .safetensors file with a tensor
            `points` (and optionally `log_weight`). The memory is shared if contiguous, else copied once; call `update` after changing
            it in place.
        log_weight: (N,) logarithm of non-negative weights, -inf to leave a row out of densities. Only ratios matter: densities
            use weights of mean 1, so that equal weights change nothing.

    Attributes:
        points (N, d), log_weight (N,) as given or None, centre (d,), centred (N, d) or, for a file, (0, d), sqnorm (N,).

    A search of the bank in itself (`self_index=True`) leaves its k-th distances here. After `update` they are still upper bounds, by
    the triangle inequality, once the way each row has moved is added; the next search starts from them. They never change an answer. A
    bank in a file has no copy to tell how far rows have moved, and forgets them.

    Memory beyond the points: N * (d + 1) * 4 bytes; for a file N * 4. Preparing reads the points once or twice; it takes no gradient.

    Raises:
        TypeError, ValueError: not a floating-point matrix, log_weight of another length, NaN or +inf in log_weight.

    Example:
        >>> bank = Bank(torch.randn(10_000, 64))
        >>> knn_kde_grad(torch.randn(5, 64), bank, k=64, bandwidth=1.0).log_density.shape
        torch.Size([5])
    """

    def __init__(self, points, *, log_weight=None):
        source = points
        if isinstance(points, (str, os.PathLike)):
            points, stored = _read(Path(points))
            log_weight = stored if log_weight is None else log_weight
        points = _arrays.matrix("Bank", "points", points)
        if len(points) == 0:
            raise ValueError(f"Bank: expected at least one point; got shape {tuple(points.shape)}")
        self.log_weight = None if log_weight is None else _checked_weight(log_weight, points)
        self._prepare(points, _in_file(source, points))
        self._warm: tuple[int, Tensor] | None = None  # k, and (N,) upper bounds of the distance to each row's k-th neighbour but itself

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        n, d = self.points.shape
        weighted = "" if self.log_weight is None else ", weighted"
        return f"Bank({n} points, {d} dimensions, {self.points.dtype}, {self.points.device}{weighted})"

    def update(self, points) -> "Bank":
        """Replace the points by others of the same shape, dtype and device: a refresh of the same rows. Returns self."""
        source = points
        if isinstance(points, (str, os.PathLike)):
            points, _ = _read(Path(points))
        points = _arrays.matrix("Bank.update", "points", points)
        for name in ("shape", "dtype", "device"):
            old, new = (tuple(x.shape) if name == "shape" else getattr(x, name) for x in (self.points, points))
            if old != new:
                raise ValueError(f"Bank.update: expected points of the same {name} as before, {old}; got {new}")
        previous_centre, previous = self.centre, self.centred
        unknown = ~torch.isfinite(self.sqnorm)
        self._prepare(points, _in_file(source, points) or (len(previous) < len(points) and _same_memory(points, self.points)))
        if len(previous) < len(points) or len(self.centred) < len(points):
            self._warm = None
        if self._warm is not None:
            k, radius = self._warm
            unknown |= ~torch.isfinite(self.sqnorm)
            self._warm = k, _moved_bound(radius, previous, self.centred, previous_centre - self.centre, unknown)
        return self

    def save(self, path) -> None:
        """Write points and log_weight to a .safetensors file: a temporary file first, then renamed."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {"points": self.points.detach()}
        if self.log_weight is not None:
            tensors["log_weight"] = self.log_weight.detach().contiguous()
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path) -> "Bank":
        """Read what `save` wrote."""
        return cls(Path(path))

    def _prepare(self, points: Tensor, in_file: bool) -> None:
        self.points = points.contiguous()  # once here instead of in every search
        self.centre, self.centred, self.sqnorm = torch.ops.ltkernels.bank_prepare(self.points.detach(), not in_file)

    def _mean_one_log_weight(self) -> Tensor | None:
        if self.log_weight is None:
            return None
        return self.log_weight - (self.log_weight.logsumexp(0) - math.log(len(self)))

    def _bound(self, queries: Tensor, k: int) -> Tensor | None:
        warm = self._warm
        if warm is None or k > warm[0] or not _same_memory(queries, self.points):
            return None
        # f and the radius carry relative errors of about 1e-6, and squares underflow; a bound below the true value would lose neighbours
        return (warm[1] * (1 + 1e-5)).square() + torch.finfo(warm[1].dtype).tiny

    def _remember(self, queries: Tensor, k: int, sqdist: Tensor) -> None:
        if torch.compiler.is_compiling() or not _same_memory(queries, self.points):
            return
        if self._warm is None or k >= self._warm[0]:
            self._warm = k, sqdist.detach()[:, -1].sqrt().nan_to_num_(nan=math.inf, posinf=math.inf)


def as_bank(op: str, bank) -> Bank:
    if isinstance(bank, Bank):
        return bank
    if not isinstance(bank, (str, os.PathLike)):
        points = _arrays.matrix(op, "bank", bank)  # its errors name the op
        if len(points) == 0:
            raise ValueError(f"{op}: expected a bank of at least one point; got shape {tuple(points.shape)}")
    return Bank(bank)


def _moved_bound(radius: Tensor, old: Tensor, new: Tensor, centre_shift: Tensor, unknown: Tensor) -> Tensor:
    """radius_i + |move of row i| + largest move of any row; inf as soon as one row's way is unknown.

    The way is taken from the centred copies. They are rounded to float32, which the last term pays for.
    """
    way = torch.empty_like(radius)
    for rows in torch.arange(len(radius), device=radius.device).split(1 << 16):
        step = new[rows].double() - old[rows].double() - centre_shift.double()
        way[rows] = step.norm(dim=1).to(way.dtype)
    rounding = 2.0**-22 * (old.abs().amax() + new.abs().amax() + centre_shift.abs().amax()) * math.sqrt(new.shape[1])
    way = (way + rounding).masked_fill(unknown, math.inf)
    return radius + way + way.max()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b or torch.compiler.is_compiling():  # a traced graph cannot compare addresses
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _checked_weight(log_weight, points: Tensor) -> Tensor:
    log_weight = _arrays.tensor("Bank", "log_weight", log_weight)
    if log_weight.shape != points.shape[:1]:
        expected = f"one entry per point, shape ({len(points)},)"
        raise ValueError(f"Bank: expected log_weight with {expected}; got {tuple(log_weight.shape)}")
    if not log_weight.is_floating_point():
        raise TypeError(f"Bank: expected log_weight in a floating-point dtype; got {log_weight.dtype}")
    if log_weight.device != points.device:
        raise ValueError(f"Bank: expected log_weight on the device of the points, {points.device}; got {log_weight.device}")
    log_weight = log_weight.to(torch.float32 if points.dtype in _FLOATS else torch.float64)
    if not torch.compiler.is_compiling():
        total = log_weight.detach().logsumexp(0).item()
        if not math.isfinite(total):
            raise ValueError(f"Bank: expected log_weight below infinity with at least one finite entry; its logsumexp is {total}")
    return log_weight


_SAFETENSORS = {  # what NumPy reads, and what that is
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
    "F32": (np.float32, torch.float32),
    "F64": (np.float64, torch.float64),
}


def _read(path: Path) -> tuple[Tensor, Tensor | None]:
    """`points`, left in the file, and `log_weight`. The package safetensors maps files so that they could be written to, which the system
    refuses beyond the size of its memory."""
    if path.suffix != ".safetensors":
        raise ValueError(f"Bank: expected a .safetensors file; got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"Bank: no such file: {path}")
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:  # 8 bytes: the length of the JSON text that follows; then the data
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(length) if length < size else b"")
        keys = sorted(key for key in tensors if key != "__metadata__")
        places = {key: (tensors[key]["dtype"], tuple(tensors[key]["shape"]), *tensors[key]["data_offsets"]) for key in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Bank: expected a .safetensors file; {path} is none: {error}") from error
    if "points" not in keys:
        raise ValueError(f"Bank: expected a tensor named 'points' in {path}; it has {keys}")

    def tensor(key: str) -> Tensor:
        name, shape, begin, end = places[key]
        if name not in _SAFETENSORS:
            raise TypeError(f"Bank: expected {key} in float16, bfloat16, float32 or float64; {path} has it in {name}")
        stored, dtype = _SAFETENSORS[name]
        if end - begin != math.prod(shape) * np.dtype(stored).itemsize or 8 + length + end > size:
            raise ValueError(f"Bank: expected a .safetensors file; {path} is cut off or broken: {key} of shape {shape} at {begin} .. {end}")
        if end == begin:
            return torch.empty(shape, dtype=dtype)
        return _arrays.tensor("Bank", key, np.memmap(path, stored, "r", 8 + length + begin, shape)).view(dtype)

    return tensor("points"), tensor("log_weight").clone() if "log_weight" in keys else None


def _in_file(source, points: Tensor) -> bool:
    """Whether the tensor made of `source` is the file that it was."""
    if isinstance(source, (str, os.PathLike)):
        return points.is_contiguous()
    base = source
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap) and points.is_contiguous() and points.data_ptr() == source.ctypes.data
