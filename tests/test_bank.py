import math

import numpy as np
import pytest
import torch
from cases import assert_neighbours, gaussian

from ltkernels import Bank, knn, knn_kde_grad


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


def test_memmap(tmp_path):
    array = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "points.npy", array)
    bank = Bank(np.load(tmp_path / "points.npy", mmap_mode="r"))
    assert torch.equal(knn(torch.zeros(1, 4), bank, 5).index, knn(torch.zeros(1, 4), torch.from_numpy(array), 5).index)


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
