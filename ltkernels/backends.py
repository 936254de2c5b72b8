"""The ops' schemas, which backend answers a call, and why.

Every op exists twice in the dispatcher, with one schema: `ltkernels::op` is what the public functions call, with autograd and fake
kernels registered beside them, and routes at run time; `ltkernels_native::op` holds the C++ and CUDA kernels of the compiled part.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library, reference

_PREPARED = "Tensor queries, Tensor points, Tensor centre, Tensor centred, Tensor sqnorm, Tensor? self_index, Tensor? bound, int k"
SCHEMAS = (  # with a C++ counterpart; the reason why no schema stands in C++ is that a build without a compiler needs them too
    f"knn({_PREPARED}) -> (Tensor sqdist, Tensor index)",
    f"knn_kde({_PREPARED}, Tensor bandwidth, Tensor? log_weight)"
    " -> (Tensor log_density, Tensor score, Tensor sqdist, Tensor index)",
)
TORCH_SCHEMAS = (  # torch ops on every backend: preparation and the bilinear pieces of the derivatives
    "bank_prepare(Tensor points) -> (Tensor centre, Tensor centred, Tensor sqnorm)",
    "diff_sum(Tensor queries, Tensor points, Tensor index, Tensor coefficient) -> Tensor",
    "diff_dot(Tensor queries, Tensor points, Tensor index, Tensor vector) -> Tensor",
    "diff_scatter(Tensor queries, Tensor points, Tensor index, Tensor coefficient) -> Tensor",
)

BACKENDS = ("cpu", "cuda", "triton", "reference")
MAX_K, MAX_D = 256, 4096  # cuda and triton keep a query's k best in registers and shared memory
MAX_N = 2**31 - 129  # and number the rows of the bank, padded to whole tiles, in 32 bits

_library_public = torch.library.Library("ltkernels", "DEF")
_library_native = torch.library.Library("ltkernels_native", "DEF")
for _schema in SCHEMAS + TORCH_SCHEMAS:
    _library_public.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _schema in SCHEMAS:
    _library_native.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_library.load()

_requested: ContextVar[str | None] = ContextVar("ltkernels_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one backend: "cpu", "cuda", "triton" or "reference".

    A backend that cannot take the tensors at hand raises; nothing falls back. LTKERNELS_BACKEND sets the same for a whole process.
    The choice is made when an op runs, so it also governs a function compiled by torch.compile before.

    Example:
        >>> with ltkernels.backend("reference"):
        ...     exact = ltkernels.knn_kde_grad(queries.double(), points.double(), 64, bandwidth=0.5)
    """
    token = _requested.set(_valid(name, "backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def _valid(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return name


class Route(NamedTuple):
    """One row of the table: the first row that fits a CUDA tensor decides."""

    arch: range  # compute capability as major * 10 + minor
    op: str  # "*": every op
    dtypes: tuple[torch.dtype, ...]
    d: range
    k: range
    backend: str
    reason: str


_ANY = range(1, MAX_D + 1), range(1, MAX_K + 1)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ROUTES = [
    Route(range(90, 1000), "*", _FLOATS, *_ANY, "triton", "unmeasured: wgmma/tcgen05 and TMA are reached through Triton only"),
    Route(range(80, 90), "*", _FLOATS, *_ANY, "cuda", "unmeasured: mma.sync and cp.async are all that the card has"),
]


def choose(op: str, like: Tensor, n: int, k: int) -> str:
    """The backend for k neighbours of each row of `like` among n points; raises when there is none."""
    d = like.shape[1]
    requested = _requested.get()
    if requested is None and os.environ.get("LTKERNELS_BACKEND"):
        requested = _valid(os.environ["LTKERNELS_BACKEND"], "LTKERNELS_BACKEND")
    if requested is not None:
        _demand(op, requested, like, n, k)
        return requested
    if like.device.type == "cpu":
        if _library.HAS_CPP:
            return "cpu"
        _warn_reference()
        return "reference"
    if like.device.type != "cuda":
        raise RuntimeError(f'{op}: no kernels for {like.device.type} tensors; use ltkernels.backend("reference") or move them')
    capability = torch.cuda.get_device_capability(like.device)
    arch = capability[0] * 10 + capability[1]
    fitting = [r.backend for r in ROUTES if arch in r.arch and r.op in ("*", op) and like.dtype in r.dtypes and d in r.d and k in r.k]
    preferred = fitting[0] if fitting else "cuda"
    other = "triton" if preferred == "cuda" else "cuda"
    chosen = other if _missing(preferred, like) and not _missing(other, like) else preferred
    _demand(op, chosen, like, n, k)
    return chosen


def _missing(name: str, like: Tensor) -> str | None:
    """Why a backend cannot run on this tensor's device, or None."""
    device = like.device.type
    if name == "reference":
        return None
    if name == "cpu":
        if device != "cpu":
            return f"it runs on CPU tensors; got {device}"
        return None if _library.HAS_CPP else f"ltkernels was built without C++ kernels ({_library.build_info()['cpp_reason']})"
    if name == "cuda":
        if device != "cuda":
            return f"it runs on CUDA tensors; got {device}"
        return None if _library.HAS_CUDA else f"ltkernels was built without CUDA kernels ({_library.build_info()['cuda_reason']})"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA tensors, and on CPU tensors only when TRITON_INTERPRET=1 is set before the start; got {device}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton is not installed"
    return None


def _demand(op: str, name: str, like: Tensor, n: int, k: int) -> None:
    reason = _missing(name, like)
    if reason:
        raise RuntimeError(f"{op}: backend {name!r} is not available here: {reason}")
    if name in ("cuda", "triton"):
        way_round = 'use ltkernels.backend("reference") or CPU tensors'
        if like.dtype not in _FLOATS:
            raise TypeError(f"{op}: backend {name!r} takes float16, bfloat16 and float32; got {like.dtype}; {way_round}")
        if k > MAX_K:
            raise ValueError(f"{op}: k must be at most {MAX_K} on backend {name!r}; got k={k}; {way_round}")
        if like.shape[1] > MAX_D:
            raise ValueError(f"{op}: rows may have at most {MAX_D} columns on backend {name!r}; got d={like.shape[1]}; {way_round}")
        if n > MAX_N:
            raise ValueError(f"{op}: a bank may have at most {MAX_N} rows on backend {name!r}; got N={n}; {way_round}")


def _warn_reference() -> None:
    warnings.warn(
        f"ltkernels was built without C++ kernels ({_library.build_info()['cpp_reason']}): CPU tensors run on the slow reference backend",
        RuntimeWarning,
        stacklevel=2,
    )


def implementation(op: str, name: str):
    """The function that runs an op on a backend; all of them take the op's arguments in the schema's order."""
    if name in ("cpu", "cuda"):
        return getattr(torch.ops.ltkernels_native, op)
    if name == "triton":
        from .triton import knn_kde as module

        return getattr(module, op)
    return {"knn": _reference_knn, "knn_kde": _reference_knn_kde}[op]


def _reference_knn(queries, points, centre, centred, sqnorm, self_index, bound, k):
    return reference.knn(queries, points, k, self_index)


def _reference_knn_kde(queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight):
    return reference.knn_kde(queries, points, k, bandwidth, self_index, log_weight)


def _routed(op: str):
    public_name = {"knn_kde": "knn_kde_grad"}.get(op, op)

    def kernel(queries, points, *rest):
        k = rest[5]
        run = implementation(op, choose(public_name, queries, len(points), k))
        return run(queries.contiguous(), points.contiguous(), *rest)

    return kernel


for _op in ("knn", "knn_kde"):
    for _key in ("CPU", "CUDA"):
        _library_public.impl(_op, _routed(_op), _key)
for _op, _function in (
    ("bank_prepare", reference.prepare),
    ("diff_sum", reference.diff_sum),
    ("diff_dot", reference.diff_dot),
    ("diff_scatter", reference.diff_scatter),
):
    _library_public.impl(_op, _function, "CompositeExplicitAutograd")
