"""knn and knn_kde_grad beside what one would otherwise use: torch.cdist + topk, faiss, scikit-learn, scipy, KeOps, and the matrix product
as a floor.

    pytest benchmarks --benchmark-only                       # all sizes; benchmarks/report.py makes tables and pictures of it
    pytest benchmarks --benchmark-only -k "self and 20000"   # one group
    pytest benchmarks --benchmark-only -m gpu                # cuda and triton beside torch.cdist + topk on the card

Every implementation answers the same question on the same data, and its error against float64 on 64 rows is asserted before it is
timed; on a card the clock stops when the card has finished. Groups compare inside one run: quote ratios of medians. `peak_mb` is the
memory one call needs beyond its inputs.

Where points search themselves, every call starts from the points; where others search them, whoever has an index made it before, and
"plain tensor" is ltkernels without one.
"""

import ctypes
import gc
import math
import threading
import time

import numpy as np
import pytest
import torch

import ltkernels

K = 64
BRUTE = ("product only", "ltkernels", "cdist+topk", "faiss", "scikit-learn")
PLAIN, KEOPS, TREES = "ltkernels, plain tensor", "KeOps", ("cKDTree", "kd_tree", "ball_tree")
SIZES = {  # who is timed; queries (None: the bank itself, leave-one-out), points, dimensions, a shape of SHAPES instead of a Gaussian one
    "self N=20000 d=512": (BRUTE, None, 20_000, 512),
    "self N=20000 d=64": (BRUTE, None, 20_000, 64),  # without KeOps: 9 s, at d = 512 three minutes
    "self N=20000 d=512 in 200 clusters": (BRUTE[:2], None, 20_000, 512, "clusters"),
    "self N=20000 d=512 far to near": (BRUTE[:2], None, 20_000, 512, "far to near"),
    "self N=20000 d=512 of 50 values": (BRUTE[:2], None, 20_000, 512, "duplicates"),
    "Q=4096 N=50000 d=128": ((*BRUTE, PLAIN, KEOPS), 4_096, 50_000, 128),
    "Q=1 N=50000 d=128": ((*BRUTE[1:], PLAIN, KEOPS), 1, 50_000, 128),
}
FEW_DIMENSIONS = {  # without those that take minutes: trees at d = 16 look at most points; the product has 40 GB
    "Q=2000 N=100000 d=3": (("ltkernels", PLAIN, *TREES, "faiss", "cdist+topk", KEOPS), 2_000, 100_000, 3),
    "Q=2000 N=100000 d=16": (("ltkernels", PLAIN, *TREES, "faiss", "cdist+topk", KEOPS), 2_000, 100_000, 16),
    "self N=100000 d=3": (("ltkernels", "cKDTree", "kd_tree", "faiss"), None, 100_000, 3),
    "self N=100000 d=16": (("ltkernels", "faiss"), None, 100_000, 16),
}
BANDWIDTH = {3: 0.2, 16: 2.7}  # else sqrt(d): of the order of the k-th distance
GROWTH = (5_000, 10_000, 40_000, 80_000)  # Gaussian points, leave-one-out; SIZES has 20 000
MOST = {  # dimensions -> who -> points: minutes beyond, or 6 GB of products
    64: {"ltkernels": 80_000, "faiss": 40_000, "cdist+topk": 20_000, "product only": 20_000},
    512: {"ltkernels": 80_000, "faiss": 20_000, "cdist+topk": 20_000, "product only": 20_000},
}
GROWING = [(d, n, name) for d, most in MOST.items() for n in GROWTH for name in most if n <= most[name]]
GPU_SIZES = {
    "self N=20000 d=512": (None, 20_000, 512),
    "self N=20000 d=64": (None, 20_000, 64),
    "Q=2000 N=50000 d=128": (2_000, 50_000, 128),
    "Q=1 N=50000 d=128": (1, 50_000, 128),
    "Q=4096 N=500000 d=128": (4_096, 500_000, 128),
    "self N=20000 d=512 in 200 clusters": (None, 20_000, 512, "clusters"),
}


def clusters(points, generator):
    """200 of them, of a tenth of their distance."""
    centres = torch.randn(200, points.shape[1], generator=generator)
    return centres[torch.randint(200, (len(points),), generator=generator)] + 0.1 * points


SHAPES = {
    "clusters": clusters,
    "far to near": lambda points, _: points[points.norm(dim=1).argsort(descending=True)].contiguous(),
    "duplicates": lambda points, generator: points[:50][torch.randint(50, (len(points),), generator=generator)].contiguous(),
    "tight": lambda points, _: 10 * torch.nn.functional.normalize(points[:100], dim=1)[torch.arange(len(points)) % 100] + 1e-3 * points,
}


class Problem:
    def __init__(self, q, n, d, shape=None, device="cpu", h=None):
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(n, d, generator=generator)
        self.points = (SHAPES[shape](points, generator) if shape else points).to(device)
        self.bank = ltkernels.Bank(self.points)
        self.is_self, self.product, self.indices = q is None, None, {}
        self.queries = self.points if self.is_self else torch.randn(q, d, generator=generator).to(device)
        self.h = h or BANDWIDTH.get(d, math.sqrt(d))

    def index(self, name, build):
        """What a peer makes of the points: in every call where they search themselves, else once, as our bank."""
        if self.is_self:
            return build(self.points.numpy())
        if name not in self.indices:
            self.indices[name] = build(self.points.numpy())
        return self.indices[name]


def density(sqdist, h):
    return torch.logsumexp(-sqdist / (2 * h * h), 1) - math.log(sqdist.shape[1])


def ours(p: Problem):
    bank = ltkernels.Bank(p.points) if p.is_self else p.bank  # a new one: what a round before has left in it would help
    return ltkernels.knn_kde_grad(p.queries, bank, K, bandwidth=p.h, self_index=p.is_self or None)


def one_shot(p: Problem):
    return ltkernels.knn_kde_grad(p.queries, p.points, K, bandwidth=p.h)


def cdist_topk(p: Problem):
    """In chunks of the queries, as one has to at this size; density and score from the same neighbours."""
    out, chunk = [], 1024 if len(p.points) <= 50_000 else 256  # half a gigabyte of distances
    for start in range(0, len(p.queries), chunk):
        queries = p.queries[start : start + chunk]
        distance = torch.cdist(queries, p.points)
        if p.is_self:
            row = torch.arange(len(queries), device=queries.device)
            distance[row, start + row] = math.inf
        radius, index = distance.topk(K, largest=False)
        weight = torch.softmax(-radius.square() / (2 * p.h**2), 1)
        score = (torch.einsum("qk,qkd->qd", weight, p.points[index]) - queries) / p.h**2
        out.append((density(radius.square(), p.h), score))
    return torch.cat([log_density for log_density, _ in out])


def estimate(p: Problem, sqdist, rows):
    """Density of the neighbours that a peer found, and their score, which nobody reads."""
    weight = torch.softmax(-sqdist / (2 * p.h**2), 1)
    for start in range(0, len(rows), 1024):
        part = slice(start, start + 1024)
        torch.einsum("qk,qkd->qd", weight[part], p.points[rows[part]]).sub_(p.queries[part]).div_(p.h**2)
    return density(sqdist, p.h)


def faiss_flat(p: Problem):
    faiss = pytest.importorskip("faiss")

    def build(points):
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(points)
        return index

    sqdist, rows = p.index("faiss", build).search(p.queries.numpy(), K + p.is_self)
    return estimate(p, torch.from_numpy(sqdist[:, int(p.is_self) :]), torch.from_numpy(rows[:, int(p.is_self) :]))


def sklearn_search(algorithm):
    def run(p: Problem):
        search = pytest.importorskip("sklearn.neighbors").NearestNeighbors(n_neighbors=K, algorithm=algorithm, n_jobs=-1)
        distance, rows = p.index(algorithm, search.fit).kneighbors(None if p.is_self else p.queries.numpy())
        return estimate(p, torch.from_numpy(distance).square().float(), torch.from_numpy(rows))

    return run


def scipy_tree(p: Problem):
    tree = p.index("cKDTree", pytest.importorskip("scipy.spatial").cKDTree)
    distance, rows = tree.query(p.queries.numpy(), np.arange(1, K + 1) + p.is_self, workers=-1)
    return estimate(p, torch.from_numpy(distance).square().float(), torch.from_numpy(rows))


def keops(p: Problem):
    lazy = pytest.importorskip("pykeops.torch").LazyTensor
    sqdist = ((lazy(p.queries[:, None]) - lazy(p.points[None])) ** 2).sum(-1)
    return estimate(p, *(found[:, int(p.is_self) :] for found in sqdist.Kmin_argKmin(K + p.is_self, dim=1)))


def product_only(p: Problem):
    """No neighbours at all: the matrix product that a search by expansion starts from. Into memory that was touched: no page faults."""
    if p.product is None:
        p.product = torch.ones(len(p.queries), len(p.points))
    return torch.mm(p.queries, p.points.t(), out=p.product)


IMPLEMENTATIONS = {"ltkernels": ours, PLAIN: one_shot, "cdist+topk": cdist_topk, "faiss": faiss_flat, KEOPS: keops, "cKDTree": scipy_tree}
IMPLEMENTATIONS |= {"scikit-learn": sklearn_search("brute"), "kd_tree": sklearn_search("kd_tree"), "ball_tree": sklearn_search("ball_tree")}


def exact_density(p: Problem, rows):
    queries, points = p.queries[rows].double(), p.points.double()
    sqdist = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    if p.is_self:
        sqdist[torch.arange(len(rows)), rows] = math.inf
    return density(sqdist.topk(K, largest=False).values, p.h)


def peak_mb(call) -> float:
    """Highest resident memory during one call, above what was resident before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that malloc kept would hide what the call needs
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # resets the high-water mark
    before = status_mb("VmRSS")
    call()
    return status_mb("VmHWM") - before


def own_peak_mb(call) -> float:
    """The same without pages of files."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    seen, done = [status_mb("RssAnon")], threading.Event()

    def watch():
        while not done.wait(2e-3):
            seen.append(status_mb("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(seen) - seen[0]


def status_mb(field) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


@pytest.fixture(scope="module")
def problem(request):
    p = Problem(*(SIZES | FEW_DIMENSIONS)[request.param][1:])
    p.name = request.param
    return p


PAIRS = [(size, name) for size, (names, *_) in (SIZES | FEW_DIMENSIONS).items() for name in names]


@pytest.mark.parametrize("problem, name", PAIRS, indirect=["problem"])
def test_knn_kde(name, problem, benchmark):
    what = "few dimensions" if problem.name in FEW_DIMENSIONS else "knn_kde_grad"
    benchmark.group = f"{what} {problem.name} k={K} float32 cpu, {torch.get_num_threads()} threads"
    timed(name, problem, benchmark)


def timed(name, p: Problem, benchmark):
    """Four seconds of rounds, but at least three of them, two of what takes more than eight seconds. The first call, whose error is
    asserted, warms up."""
    run = {**IMPLEMENTATIONS, **ARITHMETIC, "product only": product_only}[name]
    start = time.perf_counter()
    answer = run(p)
    seconds = time.perf_counter() - start
    if name != "product only":
        rows = torch.linspace(0, len(p.queries) - 1, min(64, len(p.queries))).long()
        log_density = answer.log_density if name in ("ltkernels", PLAIN) else answer
        error = (log_density[rows].double() - exact_density(p, rows)).abs().max().item()
        assert error < 1e-3 or name in ARITHMETIC, f"{name} is off by {error}"
        benchmark.extra_info["max_error"] = error
        if name == "ltkernels" or seconds < 8:  # no peer that takes longer is in a picture of memory
            benchmark.extra_info["peak_mb"] = peak_mb(lambda: run(p))
    benchmark.pedantic(run, (p,), rounds=max(3 if seconds < 8 else 2, min(50, int(4 / seconds))))
    p.product = None


@pytest.mark.parametrize("name", ["ltkernels"])
def test_in_a_file(name, tmp_path, benchmark):
    """From a file of 2.6 GB, whose pages the system still has at hand, to the answer. Memory is the process's own, without those pages."""
    n, d = 10_000_000, 64
    benchmark.group = f"knn_kde_grad Q=1000 N={n} d={d} in a file k={K} float32 cpu, {torch.get_num_threads()} threads"
    file, generator = np.lib.format.open_memmap(tmp_path / "points.npy", "w+", np.float32, (n, d)), torch.Generator().manual_seed(0)
    parts = [file[start : start + 100_000] for start in range(0, n, 100_000)]
    for part in parts:
        part[:] = torch.randn(part.shape, generator=generator).numpy()
    file.flush()
    queries = torch.randn(1000, d, generator=generator)

    def search():
        return ltkernels.knn_kde_grad(queries, np.load(tmp_path / "points.npy", mmap_mode="r"), K, bandwidth=math.sqrt(d))

    some = queries[::125].double()
    exact = [torch.cdist(some, torch.from_numpy(part).double(), compute_mode="donot_use_mm_for_euclid_dist") for part in parts]
    exact = density(torch.cat(exact, 1).square().topk(K, largest=False).values, math.sqrt(d))
    error = (search().log_density[::125].double() - exact).abs().max().item()
    assert error < 1e-3, f"off by {error}"
    benchmark.extra_info |= {"max_error": error, "peak_mb": own_peak_mb(search)}
    benchmark.pedantic(search, rounds=3)


@pytest.mark.parametrize("d, n, name", GROWING)
def test_growth(d, n, name, benchmark):
    benchmark.group = f"growth self N={n} d={d} k={K} float32 cpu, {torch.get_num_threads()} threads"
    timed(name, Problem(None, n, d), benchmark)


def expanded(dtype):
    def run(p: Problem):
        queries, points = p.queries.to(dtype), p.points.to(dtype)
        sqdist = (queries.square().sum(1)[:, None] + points.square().sum(1) - 2 * queries @ points.T).float()
        return density(sqdist.topk(K, largest=False).values, p.h)

    return run


def direct(p: Problem):
    distance = torch.cdist(p.queries, p.points, compute_mode="donot_use_mm_for_euclid_dist")
    return density(distance.topk(K, largest=False).values.square(), p.h)


ARITHMETIC = {"expanded, float32": expanded(torch.float32), "expanded, bfloat16": expanded(torch.bfloat16), "direct differences": direct}


@pytest.mark.parametrize("name", ["ltkernels", *ARITHMETIC])
def test_arithmetic(name, benchmark):
    """A hundred clusters of norm 10 and spread 1e-3: an expanded square has no digit left of the distances in them."""
    p = Problem(None, 10_000, 64, "tight", h=1e-2)
    p.queries, p.is_self = p.points[:1000] + 1e-3 * torch.randn(1000, 64, generator=torch.Generator().manual_seed(1)), False
    benchmark.group = f"arithmetic Q=1000 N=10000 d=64 k={K}, clusters of spread 1e-3 and norm 10, cpu, {torch.get_num_threads()} threads"
    timed(name, p, benchmark)


@pytest.fixture(scope="module", params=GPU_SIZES)
def gpu_problem(request):
    p = Problem(*GPU_SIZES[request.param], device="cuda")
    p.name = request.param
    p.rows = torch.arange(len(p.queries), device="cuda") if p.is_self else None
    return p


def time_on_the_card(benchmark, call, rounds=7, calls=1):
    """`calls` of them, one after the other, from the first launch until the card has finished; and the memory that one needs."""

    def round_of_calls():
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    round_of_calls()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    benchmark.extra_info |= {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 2**20, "calls": calls}
    benchmark.pedantic(round_of_calls, rounds=rounds, warmup_rounds=2)


def product_on_the_card(name, p: Problem):
    """The matrix product that a search by expansion starts from: as the filters have it, and as torch.cdist does."""
    torch.backends.cuda.matmul.allow_tf32 = "tf32" in name
    try:
        return torch.mm(p.queries, p.points.T)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def on_the_card(name, p: Problem):
    """log_density of cuda, triton or torch's way. Rows instead of self_index=True: no round starts warm."""
    if name == "cdist+topk":
        log_density = cdist_topk(p)
    else:
        with ltkernels.backend(name):
            log_density = ltkernels.knn_kde_grad(p.queries, p.bank, K, bandwidth=p.h, self_index=p.rows).log_density
    return log_density


a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@a_card
@pytest.mark.parametrize("name", ["cuda", "triton", "cdist+topk", "product only, tf32", "product only, float32"])
def test_knn_kde_on_the_card(name, gpu_problem, benchmark):
    p = gpu_problem
    benchmark.group = f"knn_kde_grad {p.name} k={K} float32 {torch.cuda.get_device_name()}"
    if "product" in name:
        if len(p.points) > 100_000:
            pytest.skip("8 GB of products")
        time_on_the_card(benchmark, lambda: product_on_the_card(name, p), rounds=7)
        return
    rows = torch.linspace(0, len(p.queries) - 1, min(64, len(p.queries)), device="cuda").long()
    error = (on_the_card(name, p)[rows].double() - exact_density(p, rows)).abs().max().item()
    assert error < 1e-3, f"{name} is off by {error}"
    benchmark.extra_info["max_error"] = error
    time_on_the_card(benchmark, lambda: on_the_card(name, p), rounds=7)
