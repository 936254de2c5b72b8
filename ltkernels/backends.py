"""The ops' schemas, which backend answers a call, and why.

Every op exists twice in the dispatcher, with one schema: `ltkernels::op` is what the public functions mean, with autograd and fake kernels
registered beside it, and routes at run time (`call` leaves the dispatcher out where it can); `ltkernels_native::op` holds the C++ and CUDA
kernels of the compiled part.
"""

import functools
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _library, reference

_PREPARED = "Tensor queries, Tensor points, Tensor centre, Tensor centred, Tensor sqnorm, Tensor? self_index, Tensor? bound, int k"
_NOISY = "Tensor x, Tensor clean, Tensor scale, Tensor std, Tensor? log_prior"
_LABELLED = (
    "Tensor mu, Tensor labels, Tensor? group, Tensor weight, Tensor? margin, Tensor? other, Tensor? other_labels, Tensor? other_group,"
    " int form, float scale, bool grad, bool other_grad"
)
SCHEMAS = (  # with a C++ counterpart; the reason why no schema stands in C++ is that a build without a compiler needs them too
    f"knn({_PREPARED}) -> (Tensor sqdist, Tensor index)",
    f"knn_kde({_PREPARED}, Tensor bandwidth, Tensor? log_weight)"
    " -> (Tensor log_density, Tensor score, Tensor sqdist, Tensor index)",
    f"psel({_NOISY}) -> (Tensor p, Tensor log_normalizer)",
    f"psel_sample({_NOISY}, Tensor seed, int row_offset) -> (Tensor index, Tensor log_normalizer)",
    "psel_mix(Tensor weight, Tensor clean) -> Tensor",
    "pair_sqdist(Tensor x, Tensor y) -> Tensor",
    f"pcl_rows({_LABELLED}) -> (Tensor row, Tensor pairs, Tensor active, Tensor mu_grad, Tensor partner_grad)",
)
WHOLE_SCHEMAS = (  # made of those and of torch ops; C++ has all of it in one, as a dozen torch ops take longer than a few rows
    f"knn_kde_bounded({_PREPARED}, Tensor bandwidth, Tensor? log_weight)"
    " -> (Tensor log_density, Tensor score, Tensor sqdist, Tensor index, Tensor truncation)",
    f"score_select({_NOISY}, Tensor seed, int row_offset, Tensor? own, Tensor? counts, Tensor? labels, Tensor? self_labels, int gate)"
    " -> (Tensor index, Tensor moved, Tensor log_normalizer)",
    f"psel_mean({_NOISY}) -> (Tensor mean, Tensor log_normalizer)",
    f"pcl({_LABELLED}, bool mean) -> (Tensor loss, Tensor divisor, Tensor row, Tensor active, Tensor mu_grad, Tensor partner_grad)",
)
TORCH_SCHEMAS = (  # torch ops on every backend, but for preparing a bank on the CPU: that, and the bilinear pieces of the derivatives
    "bank_prepare(Tensor points, bool copy=True) -> (Tensor centre, Tensor centred, Tensor sqnorm)",
    "diff_sum(Tensor queries, Tensor points, Tensor index, Tensor coefficient) -> Tensor",
    "diff_dot(Tensor queries, Tensor points, Tensor index, Tensor vector) -> Tensor",
    "diff_scatter(Tensor queries, Tensor points, Tensor index, Tensor coefficient) -> Tensor",
    "psel_backward(Tensor grad, Tensor p, Tensor x, Tensor clean, Tensor scale, Tensor std, bool[] needed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"psel_mean_backward(Tensor grad, {_NOISY}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "pair_sqdist_backward(Tensor grad, Tensor x, Tensor y, bool[] needed) -> (Tensor, Tensor)",
    "pcl_scaled(Tensor grad, Tensor factor, Tensor source) -> Tensor",
)

_PUBLIC_NAMES = {  # what errors and routes call an op of SCHEMAS
    "knn": "knn", "knn_kde": "knn_kde_grad", "psel": "p_sel", "psel_sample": "score_select", "psel_mix": "posterior_mean",
    "pair_sqdist": "pairwise_sqdist", "pcl_rows": "pcl_loss",
}  # fmt: skip
BACKENDS = ("cpu", "cuda", "triton", "reference")
MAX_K, MAX_D = 256, 4096  # cuda and triton keep a query's k best in registers and shared memory
OLDEST_TRITON_SM_100 = (3, 8)  # 3.6.0 and 3.7.1 do not compile the filter (python -m tests.aot --triton 3.7.1)
MAX_N = 2**31 - 129  # and number the rows of the bank, padded to whole tiles, in 32 bits

_library_public = torch.library.Library("ltkernels", "DEF")
_library_native = torch.library.Library("ltkernels_native", "DEF")
for _schema in SCHEMAS + WHOLE_SCHEMAS + TORCH_SCHEMAS:
    _library_public.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_BANK_SCHEMAS = (
    "bank_sample(Tensor points, int step) -> Tensor",
    "bank_rows(Tensor points, Tensor centre, bool copy) -> (Tensor centred, Tensor sqnorm)",
)
for _schema in SCHEMAS + WHOLE_SCHEMAS + _BANK_SCHEMAS:
    _library_native.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_library.load()
_HAS_CPP = _library.HAS_CPP

_requested: ContextVar[str | None] = ContextVar("ltkernels_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one backend: "cpu", "cuda", "triton" or "reference".

    A backend that cannot take the tensors at hand raises; nothing falls back. LTKERNELS_BACKEND sets the same for a whole process.
    The choice is made when an op runs, so it also governs a function compiled by torch.compile before. Gradients are computed on the
    backend that a block chose for the op itself, wherever `backward` is called; those of a compiled function on what holds there, which
    for tensors on a card, in autograd's own thread, is the default or LTKERNELS_BACKEND.

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
    device: str | None = None  # the card's name in a measured row; None: any


_ANY = range(1, MAX_D + 1), range(1, MAX_K + 1)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_SEARCHES = ("knn", "knn_kde_grad")
_ON_H100 = "measured on an H100, 4096 queries of 65536 points: 0.58 to 0.85 of cuda's time (one query: 2.6 times)"
_BEYOND = "unmeasured: tcgen05 and TMA are reached through Triton only"
ROUTES = [  # measured by `python -m ltkernels.selftest --tune`, with Triton 3.8.0 and CUDA 13.0
    *(Route(range(90, 100), op, _FLOATS, *_ANY, "triton", _ON_H100) for op in _SEARCHES),
    *(Route(range(100, 1000), op, _FLOATS, *_ANY, "triton", _BEYOND) for op in _SEARCHES),
    Route(range(90, 100), "*", _FLOATS, *_ANY, "cuda", "measured on an H100: 0.41 to 0.98 of triton's time, up to 1.11 in 6 of 45 cells"),
    Route(range(80, 1000), "*", _FLOATS, *_ANY, "cuda", "unmeasured: only searches gain much by tensor cores, on sm_80 by mma.sync"),
]


def choose(op: str, like: Tensor, n: int, k: int) -> str:
    """The backend for each row of `like` and n points, of which k matter where the op is a search (else 1); raises when there is none, or
    when `routes_file()` is broken."""
    requested = _requested.get()
    if requested is None and (named := os.environ.get("LTKERNELS_BACKEND")):
        requested = _valid(named, "LTKERNELS_BACKEND")
    if requested is not None:
        _demand(op, requested, like, n, k)
        return requested
    if like.is_cpu:
        if _HAS_CPP:
            return "cpu"
        _warn_reference()
        return "reference"
    if like.device.type != "cuda":
        raise RuntimeError(f'{op}: no kernels for {like.device.type} tensors; use ltkernels.backend("reference") or move them')
    major, minor = torch.cuda.get_device_capability(like.device)
    preferred = _preferred(10 * major + minor, torch.cuda.get_device_name(like.device), op, like.dtype, like.shape[1], k)
    other = "triton" if preferred == "cuda" else "cuda"
    chosen = other if unavailable(preferred, "cuda") and not unavailable(other, "cuda") else preferred
    _demand(op, chosen, like, n, k)
    return chosen


@functools.lru_cache  # a tuned table has dozens of rows, and every call on a card asks
def _preferred(arch: int, device: str, op: str, dtype: torch.dtype, d: int, k: int) -> str:
    for row in (*_measured_routes(), *ROUTES):
        if row.device in (None, device) and arch in row.arch and row.op in ("*", op) and dtype in row.dtypes and d in row.d and k in row.k:
            return row.backend
    return "cuda"


def routes_file() -> Path:
    """Where `python -m ltkernels.selftest --tune` leaves the rows it measured; on cards of their name they go before ROUTES.

    LTKERNELS_ROUTES names the file; otherwise it is ltkernels/routes.json in XDG_CONFIG_HOME, or in ~/.config.
    """
    if named := os.environ.get("LTKERNELS_ROUTES"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "ltkernels", "routes.json")


def _measured_routes() -> list[Route]:
    path = routes_file()
    if os.path.isfile(path):  # Path.is_file raises where the home folder is closed to this user
        return read_routes(path)
    if os.environ.get("LTKERNELS_ROUTES"):
        raise ValueError(f"LTKERNELS_ROUTES: no such file: {path}; `python -m ltkernels.selftest --tune` writes it")
    return []


@functools.cache
def read_routes(path: Path) -> list[Route]:
    """The rows of a file written by `write_routes`, read once in a process.

    Raises:
        ValueError: names the file, the row and what is wrong with it.
    """
    row, routes = None, []
    try:
        content = json.loads(path.read_text())
        if not (isinstance(content, dict) and isinstance(content.get("rows"), list)):
            raise ValueError('expected {"rows": [...]}')
        for row in content["rows"]:
            routes.append(_parsed(row))
    except (OSError, ValueError) as error:
        where = f"{path}: " if row is None else f"{path}: in {json.dumps(row)}: "
        raise ValueError(f"{where}{error}; correct or remove the file") from error
    return routes


def _parsed(row: object) -> Route:
    def field(name: str, fits: Callable[[object], bool], expectation: str):
        value = row.get(name) if isinstance(row, dict) else None
        if not fits(value):
            raise ValueError(f"expected {name} as {expectation}; got {value!r}")
        return value

    def span(name: str) -> range:
        first, last = field(name, _is_span, "[first, last] with 1 <= first <= last")
        return range(first, last + 1)

    dtypes = [str(dtype).removeprefix("torch.") for dtype in _FLOATS]
    ops = list(_PUBLIC_NAMES.values())
    known = field("dtypes", lambda v: isinstance(v, list) and bool(v) and all(x in dtypes for x in v), f"a list out of {', '.join(dtypes)}")
    return Route(
        range(1000),
        field("op", lambda v: v in ops, f"one of {', '.join(ops)}"),
        tuple(getattr(torch, name) for name in known),
        span("d"),
        span("k"),
        field("backend", lambda v: v in ("cuda", "triton"), "cuda or triton"),
        field("reason", lambda v: isinstance(v, str), "text"),
        field("device", lambda v: isinstance(v, str), "the name of a card"),
    )


def _is_span(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, int) for x in value) and 1 <= value[0] <= value[1]


def write_routes(path: Path, routes: Iterable[Route]) -> None:
    """Write measured rows for `choose`, which obeys them from then on: a temporary file first, then renamed."""
    rows = [
        {
            "device": route.device,
            "op": route.op,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in route.dtypes],
            "d": [route.d.start, route.d.stop - 1],
            "k": [route.k.start, route.k.stop - 1],
            "backend": route.backend,
            "reason": route.reason,
        }
        for route in routes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    os.replace(temporary, path)
    read_routes.cache_clear()
    _preferred.cache_clear()


def unavailable(name: str, device: str) -> str | None:
    """Why a backend cannot run on tensors of a device type, or None."""
    if name == "reference":
        return None
    if name == "cpu":
        if device != "cpu":
            return f"it runs on CPU tensors; got {device}"
        return None if _HAS_CPP else f"ltkernels was built without C++ kernels ({_library.build_info()['cpp_reason']})"
    if name == "cuda":
        if device != "cuda":
            return f"it runs on CUDA tensors; got {device}"
        return None if _library.HAS_CUDA else f"ltkernels was built without CUDA kernels ({_library.build_info()['cuda_reason']})"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA tensors, and on CPU tensors only when TRITON_INTERPRET=1 is set before the start; got {device}"
    try:
        import triton
    except ImportError:
        return "the package triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON_SM_100 and device == "cuda" and torch.cuda.get_device_capability()[0] == 10:
        return f"Triton {triton.__version__} cannot compile its kernels for sm_100; install 3.8 or newer"
    return None


def _demand(op: str, name: str, like: Tensor, n: int, k: int) -> None:
    reason = unavailable(name, like.device.type)
    if reason:
        raise RuntimeError(f"{op}: backend {name!r} is not available here: {reason}")
    if name in ("cuda", "triton"):
        way_round = 'use ltkernels.backend("reference") or CPU tensors'
        if like.dtype not in _FLOATS:
            raise TypeError(f"{op}: backend {name!r} takes float16, bfloat16 and float32; got {like.dtype}; {way_round}")
        if k > MAX_K:
            raise ValueError(f"{op}: k must be at most {MAX_K} on backend {name!r}; got k={k}; {way_round}")
        if like.shape[1] > MAX_D and op in ("knn", "knn_kde_grad"):
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
        return getattr(importlib.import_module(f".triton.{_STEMS[op]}", __package__), op)
    return _REFERENCE[op]


def _reference_knn(queries, points, centre, centred, sqnorm, self_index, bound, k):
    return reference.knn(queries, points, k, self_index)


def _reference_knn_kde(queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight):
    return reference.knn_kde(queries, points, k, bandwidth, self_index, log_weight)


_REFERENCE = {
    "knn": _reference_knn,
    "knn_kde": _reference_knn_kde,
    "psel": reference.psel,
    "psel_sample": reference.psel_sample,
    "psel_mix": reference.psel_mix,
    "pair_sqdist": reference.pair_sqdist,
    "pcl_rows": reference.pcl_rows,
}
_STEMS = {
    "knn": "knn_kde", "knn_kde": "knn_kde", "psel": "score_select", "psel_sample": "score_select", "psel_mix": "score_select",
    "pair_sqdist": "pairwise_pcl", "pcl_rows": "pairwise_pcl",
}  # fmt: skip


class _Operands(NamedTuple):
    """Places in an op's arguments."""

    like: int  # whose device, dtype and columns are asked about
    among: int  # whose rows are many; where that is None, those of `like` are
    k: int | None = None  # neighbours that matter


_OPERANDS = {
    "knn": _Operands(0, 1, 7), "knn_kde": _Operands(0, 1, 7), "psel": _Operands(0, 1), "psel_sample": _Operands(0, 1),
    "psel_mix": _Operands(1, 1),  # the others are weights, in float32 whatever the points are in
    "pair_sqdist": _Operands(0, 1), "pcl_rows": _Operands(0, 5),
}  # fmt: skip


def _routed(op: str, whole: str | None = None, composed: Callable | None = None):
    """The kernel that asks the route of `op`, or of an op of which it is a part: `whole` in C++, elsewhere `composed`."""
    like, among, k = _OPERANDS[op]
    public, matrices = _PUBLIC_NAMES[op], (0, among)

    def kernel(*inputs):
        many = inputs[like] if inputs[among] is None else inputs[among]
        chosen = choose(public, inputs[like], many.shape[0], 1 if k is None else inputs[k])
        if whole and chosen != "cpu":
            return composed(*inputs)
        inputs = list(inputs)
        for place in matrices:
            if inputs[place] is not None:
                inputs[place] = inputs[place].contiguous()
        return implementation(whole or op, chosen)(*inputs)

    return kernel


def _bank_prepare(points, copy=True):
    """What each search reads of a bank, whichever backend it will be: routes have no say here."""
    native, points = torch.ops.ltkernels_native, points.contiguous()
    compiled = points.is_cpu and _HAS_CPP
    step = max(1, len(points) // 1024)
    centre = reference.centre(native.bank_sample(points, step) if compiled and not copy else points[::step])
    return centre, *(native.bank_rows if compiled else reference.bank_rows)(points, centre, copy)


_ROUTED = {_op: _routed(_op) for _op in _OPERANDS}
_COMPOSED = {
    "bank_prepare": _bank_prepare,
    "diff_sum": reference.diff_sum,
    "diff_dot": reference.diff_dot,
    "diff_scatter": reference.diff_scatter,
    "knn_kde_bounded": _routed("knn_kde", "knn_kde_bounded", reference.knn_kde_bounded),
    "score_select": _routed("psel_sample", "score_select", reference.score_select),
    "psel_mean": _routed("psel", "psel_mean", reference.psel_mean),
    "pcl": _routed("pcl_rows", "pcl", reference.pcl),
    "psel_backward": reference.psel_backward,
    "psel_mean_backward": reference.psel_mean_backward,
    "pair_sqdist_backward": reference.pair_sqdist_backward,
    "pcl_scaled": reference.pcl_scaled,
}
_KERNELS = _ROUTED | _COMPOSED
for _op, _kernel in _ROUTED.items():
    for _key in ("CPU", "CUDA"):
        _library_public.impl(_op, _kernel, _key)
for _op, _kernel in _COMPOSED.items():
    _library_public.impl(_op, _kernel, "CompositeExplicitAutograd")


class _Plain(NamedTuple):
    """How an op is called past the dispatcher."""

    tensors: tuple[int, ...]  # places of its tensors
    kernel: Callable
    function: type[torch.autograd.Function]


_PLAIN: dict[str, _Plain] = {}


def register_autograd(op: str, backward: Callable, *, setup_context: Callable) -> None:
    """As torch.library.register_autograd, in half of its time, and for `call`. The backward pass knows the `backend` block of the
    forward pass: for tensors on a card, autograd runs it in a thread of its own, which no block of the caller's reaches."""
    kernel, dispatched = _KERNELS[op], getattr(torch.ops.ltkernels, op).default
    tensors = tuple(place for place, argument in enumerate(dispatched._schema.arguments) if "Tensor" in str(argument.type))

    def below(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return dispatched(*inputs)

    def function(run: Callable) -> type[torch.autograd.Function]:
        def forward(ctx, *inputs):
            output = run(*inputs)
            ctx.backend = _requested.get()
            setup_context(ctx, inputs, output)
            return output

        def on_the_same_backend(ctx, *grads):
            if ctx.backend is None:
                return backward(ctx, *grads)
            with backend(ctx.backend):
                return backward(ctx, *grads)

        return type(op, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(on_the_same_backend)})

    through = function(below)

    def differentiable(*inputs):
        learns = torch.is_grad_enabled() and any(inputs[place] is not None and inputs[place].requires_grad for place in tensors)
        return through.apply(*inputs) if learns else below(*inputs)

    _library_public.impl(op, differentiable, "Autograd")
    _PLAIN[op] = _Plain(tensors, kernel, function(kernel))


def call(op: str, *inputs):
    """torch.ops.ltkernels.op(*inputs), past the dispatcher where nothing but the kernel would answer there: it takes 5 to 10 us to hand a
    dozen arguments to Python and back."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or is_in_torch_dispatch_mode()
        or inputs[0].is_meta
    ):
        return getattr(torch.ops.ltkernels, op)(*inputs)
    tensors, kernel, function = _PLAIN[op]
    learns = False
    for place in tensors:
        x = inputs[place]
        if type(x) is Tensor or type(x) is torch.nn.Parameter:
            learns = learns or x.requires_grad
        elif x is not None:
            return getattr(torch.ops.ltkernels, op)(*inputs)
    return function.apply(*inputs) if learns and torch.is_grad_enabled() else kernel(*inputs)


def register_no_second(op: str, name: str) -> None:
    """For an op that is part of a derivative, or of another op: no derivative of its own, which raises."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{name}: no second derivatives")

    register_autograd(op, backward, setup_context=lambda ctx, inputs, output: None)
