import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import assert_neighbours, clusters, gaussian, hard_cases

import ltkernels
from ltkernels import Bank, knn, knn_bandwidth, knn_kde_grad, reference


def test_prepares_what_the_filters_read(backend, device):
    points = gaussian(7, 200, 1)[1] + 1e6
    points[3, 2] = math.nan
    bank = Bank(points.to(device))
    torch.testing.assert_close(bank.centre.cpu(), torch.full((7,), 1e6), rtol=0, atol=0.5)
    torch.testing.assert_close(bank.centred.cpu()[4:], points[4:] - bank.centre.cpu())
    assert bank.sqnorm[3] == math.inf and (bank.centred[3] == 0).all()
    assert len(bank) == 200 and "200 points" in repr(bank)


def test_one_far_row_does_not_move_the_centre(backend, device):
    points = gaussian(7, 2000, 1)[1]
    points[1000] = 1e6
    assert Bank(points.to(device)).centre.abs().max() < 1


def test_shares_memory():
    array = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    bank = Bank(array)
    assert bank.points.data_ptr() == array.ctypes.data


def test_rows_are_centred_alike_by_the_compiled_part_and_the_reference():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        points = 3 + gaussian(37, 500, 1)[1].to(dtype)
        points[3, 2], points[4, 36], points[5] = math.nan, -math.inf, 3e4
        if dtype == torch.float64:
            points[6, 0] = 1e300  # finite, but its square is not, and it is none in float32
        bank = Bank(points)
        centred, sqnorm = reference.bank_rows(points, bank.centre, copy=True)
        assert torch.equal(bank.centred, centred) and (bank.centred[3:5] == 0).all()
        torch.testing.assert_close(bank.sqnorm, sqnorm, rtol=3e-7, atol=0)
        empty, alone = torch.ops.ltkernels.bank_prepare(points, copy=False)[1:]
        assert empty.shape == (0, 37) and torch.equal(alone, bank.sqnorm)


def memmap(tmp_path, points):
    np.save(tmp_path / "points.npy", points.numpy())
    return np.load(tmp_path / "points.npy", mmap_mode="r")


FILES = hard_cases(1500, 60)
on_the_cpu = pytest.mark.parametrize("backend", ["cpu", "reference"] if ltkernels.build_info()["cpp"] else ["reference"], indirect=True)


@on_the_cpu
@pytest.mark.parametrize("name", FILES)
def test_a_bank_in_a_file_answers_as_one_in_memory(name, tmp_path, backend):
    queries, points, k = FILES[name]
    if backend == "reference":
        queries = queries[:3]
    file, memory = Bank(memmap(tmp_path, points)), Bank(points)
    assert len(file.centred) == 0 and len(memory.centred) == len(points)
    assert torch.equal(file.sqnorm, memory.sqnorm)
    for some in (queries, queries[:1]):
        for a, b in zip(knn_kde_grad(some, file, k, bandwidth=2.0), knn_kde_grad(some, memory, k, bandwidth=2.0), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_file_of_clusters_searched_in_itself(dtype, tmp_path, backend):
    _, points = clusters(20, 10.0, 0.1, 12, 5000 if backend == "cpu" else 500, 1)
    points = points.to(dtype)
    file = Bank(memmap(tmp_path, points))
    a, b = knn(file.points, file, 9, self_index=True), knn(points, points, 9, self_index=True)
    assert torch.equal(a.index, b.index) and torch.equal(a.sqdist, b.sqdist)
    for rule in ("knn-median", "scott"):
        assert torch.equal(knn_bandwidth(file, 9, rule), knn_bandwidth(points, 9, rule))


def test_a_memmap_is_a_bank_wherever_one_is_expected(tmp_path):
    queries, points = gaussian(6, 300, 5)
    mapped = memmap(tmp_path, points)
    assert torch.equal(knn(queries, mapped, 4).index, knn(queries, points, 4).index)
    for part in (mapped, mapped[10:], np.asarray(mapped)):
        assert len(Bank(part).centred) == 0, "a slice of a file is in the file"
    for copy in (mapped[:, ::2], mapped[::-1], mapped * 1, mapped.copy(), mapped.astype(np.float64)):
        assert len(Bank(copy).centred) == 300, "a copy is in memory"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_path_is_a_bank_wherever_one_is_expected(dtype, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    queries, points = (x.to(dtype) for x in gaussian(6, 300, 5))
    path, weight = tmp_path / "bank.safetensors", torch.linspace(-1, 1, 300)
    safetensors.save_file({"odd": torch.ones(3, dtype=torch.uint8), "points": points, "log_weight": weight}, path, {"made": "here"})
    bank = Bank(path)
    assert torch.equal(bank.points, points) and torch.equal(bank.log_weight, weight.to(bank.log_weight.dtype)) and len(bank.centred) == 0
    assert torch.equal(knn(queries, path, 4).index, knn(queries, points, 4).index)
    assert torch.equal(knn_bandwidth(str(path), 4), knn_bandwidth(points, 4))
    safetensors.save_file({"points": points + 1}, path)
    assert torch.equal(bank.update(path).points, points + 1) and len(bank.centred) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n, step", [(5000, 4), (1, 1), (7, 3), (0, 1)])
def test_a_sample_of_a_file(n, step, dtype):
    points = torch.randn(n, 3).to(dtype)
    assert torch.equal(torch.ops.ltkernels_native.bank_sample(points, step), points[::step])


def test_a_broken_file_is_named(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "bank.safetensors"
    safetensors.save_file({"points": torch.ones(30, 4)}, path)
    whole = path.read_bytes()
    other = whole.replace(b"[30,4]", b"[31,4]"), whole.replace(b'"F32"', b'"F16"')
    for content in (b"", b"12", whole[:30], whole[:-1], b"\xff" * 50, *other):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a .safetensors file; .*bank.safetensors is"):
            Bank(path)
    safetensors.save_file({"points": torch.ones(30, 4, dtype=torch.int64)}, path)
    with pytest.raises(TypeError, match="expected points in float16, bfloat16, float32 or float64; .* has it in I64"):
        Bank(path)
    safetensors.save_file({"points": torch.ones(0, 4)}, path)
    with pytest.raises(ValueError, match="at least one point"):
        Bank(path)


def test_a_file_may_have_changed_before_an_update(tmp_path):
    _, points = gaussian(6, 300, 5)
    mapped = np.lib.format.open_memmap(tmp_path / "points.npy", "w+", np.float32, tuple(points.shape))
    mapped[:] = points.numpy()
    bank = Bank(mapped)
    knn(bank.points, bank, 5, self_index=True)
    mapped[:] = 100 * torch.randn(300, 6).numpy()
    bank.update(bank.points)
    assert len(bank.centred) == 0, "still in its file"
    cold = knn(bank.points.clone(), bank.points.clone(), 5, self_index=True)
    assert torch.equal(knn(bank.points, bank, 5, self_index=True).index, cold.index)
    bank.update(points)
    assert torch.equal(knn(points, bank, 5, self_index=True).index, knn(points, points, 5, self_index=True).index)


LITTLE_MEMORY = """
import resource, sys
import numpy as np, torch, ltkernels

def data():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))

queries = torch.randn(100, 64)
ltkernels.knn_kde_grad(queries, torch.randn(5000, 64), 64, bandwidth=1.0)  # threads and their stacks
mapped = np.load(sys.argv[1], mmap_mode="r") if sys.argv[1].endswith("npy") else sys.argv[1]
resource.setrlimit(resource.RLIMIT_DATA, (data() + 2**26,) * 2)  # what is a process's own: not a file's pages
sqdist, index = ltkernels.knn(queries, mapped, 64)
points = ltkernels.Bank(mapped).points
torch.testing.assert_close(sqdist[:, 0], (points[index[:, 0]] - queries).square().sum(1))
try:
    ltkernels.knn(queries, points, 64)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(not ltkernels.build_info()["cpp"], reason="the promise is the cpu backend's; there is no compiled part")
@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_a_file_of_a_quarter_of_a_gigabyte_is_searched_with_64_megabytes(kind, tmp_path):
    path, points = tmp_path / f"points.{kind}", torch.randn(1_000_000, 64)
    if kind == "npy":
        np.save(path, points.numpy())
    else:
        pytest.importorskip("safetensors.torch").save_file({"points": points}, path)
    run = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not enough memory for an answer of 64000000 numbers" in run.stdout, "in memory it needs more: the limit works"


@pytest.mark.parametrize("weighted", [False, True])
def test_save_and_load(tmp_path, weighted):
    pytest.importorskip("safetensors")
    queries, points = gaussian(6, 100, 8)
    bank = Bank(points, log_weight=torch.linspace(-1, 1, 100) if weighted else None)
    bank.save(tmp_path / "bank.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]
    for again in (Bank.load(tmp_path / "bank.safetensors"), Bank(tmp_path / "bank.safetensors")):
        for a, b in zip(knn_kde_grad(queries, bank, 9, bandwidth=1.0), knn_kde_grad(queries, again, 9, bandwidth=1.0), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("step", [0.0, 1e-3, 0.5, 100.0])
def test_warm_thresholds_are_bounds_and_change_no_answer(step, backend, device):
    g = torch.Generator().manual_seed(3)
    points = torch.randn(900, 20, generator=g)
    bank = Bank(points.to(device))
    knn(bank.points, bank, 12, self_index=True)
    assert bank._bound(bank.points, 12) is not None and bank._bound(bank.points, 13) is None
    moved = points + step * torch.randn(900, 20, generator=g) + 7 * step
    bank.update(moved.to(device))
    bound = bank._bound(bank.points, 12)
    cold = knn(moved.to(device), Bank(moved.to(device)), 12, self_index=True)
    assert (bound >= cold.sqdist[:, -1]).all()
    if step < 0.01:
        assert (bound < 4 * cold.sqdist[:, -1]).all(), "a bound that says nothing"
    warm = knn(bank.points, bank, 12, self_index=True)
    assert torch.equal(warm.index, cold.index) and torch.equal(warm.sqdist, cold.sqdist)
    assert_neighbours(moved, moved, warm.sqdist.cpu(), warm.index.cpu(), torch.arange(900))


def test_warm_thresholds_survive_broken_rows(backend, device):
    points = gaussian(5, 300, 1)[1]
    points[7] = math.nan
    bank = Bank(points.to(device))
    knn(bank.points, bank, 6, self_index=True)
    healed = points.clone()
    healed[7] = 0
    healed[9] = math.inf
    warm = knn(bank.update(healed.to(device)).points, bank, 6, self_index=True)
    cold = knn(healed.to(device), Bank(healed.to(device)), 6, self_index=True)
    assert torch.equal(warm.index, cold.index)


def test_weights_take_a_gradient_again_and_again():
    queries, points = gaussian(5, 60, 4)
    log_weight = torch.zeros(60, requires_grad=True)
    bank = Bank(points, log_weight=log_weight)
    for _ in range(2):
        knn_kde_grad(queries, bank, 10, bandwidth=1.0).log_density.sum().backward()
    assert log_weight.grad.abs().sum() > 0
