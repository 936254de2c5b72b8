import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import ltkernels
from ltkernels import Bank, denoising_target, p_sel, posterior_mean, reference, score_select

OPS = torch.ops.ltkernels
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def schedules() -> tuple[torch.Tensor, torch.Tensor]:
    """scale and std at the ends and in the middle of DDPM (linear beta), EDM, flow matching and a zero-terminal-SNR schedule."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[[0, 1, 9, 99, 499, 999]]
    sigma, t = torch.tensor([0.002, 0.01, 0.1, 1, 10, 80]).double(), torch.tensor([0.001, 0.3, 0.9, 1]).double()
    scale = torch.cat([abar.sqrt(), torch.ones(6), 1 - t, torch.zeros(1)])
    return scale, torch.cat([(1 - abar).sqrt(), sigma, t, torch.ones(1)])


def noisy(k: int, d: int, dtype=torch.float32, copies: int = 1):
    """x_t, clean, scale, std: every row is made from a row of clean."""
    g = torch.Generator().manual_seed(1000 * d + k)
    scale, std = (value.repeat(copies) for value in schedules())
    clean = torch.randn(k, d, generator=g).clamp(-1, 1)
    own, noise = torch.randint(k, (len(scale),), generator=g), torch.randn(len(scale), d, generator=g)
    x = (scale[:, None] * clean[own] + std[:, None] * noise).to(dtype)
    return x, clean.to(dtype), *(value.to(torch.float64 if dtype == torch.float64 else torch.float32) for value in (scale, std))


def exact_logits(x, clean, scale, std, log_prior=None):
    """(B, K) in float64 from the formula, by the rules for what is not finite."""
    x, clean = x.double().flatten(1), clean.double().flatten(1)
    scale, std = (torch.as_tensor(value).double().expand(len(x)) for value in (scale, std))
    logits = torch.stack([-(row - s * clean).square().sum(1) / 2 / h**2 for row, s, h in zip(x, scale, std, strict=True)])
    if log_prior is not None:
        logits = logits + log_prior.double()
    logits = logits.masked_fill(~torch.isfinite(clean).all(1), -math.inf)
    return logits.masked_fill(~torch.isfinite(x).all(1, keepdim=True), math.nan)


def assert_selection(x, clean, scale, std, p, log_normalizer, log_prior=None):
    logits = exact_logits(x, clean, scale, std, log_prior)
    expected = logits.logsumexp(1)
    torch.testing.assert_close(log_normalizer.double().cpu(), expected, rtol=3e-7, atol=1e-3, equal_nan=True)
    torch.testing.assert_close(p.double().cpu(), torch.softmax(logits, 1), rtol=2e-3, atol=1e-6, equal_nan=True)
    defined = torch.isfinite(expected)
    torch.testing.assert_close(p.cpu()[defined].double().sum(1), torch.ones(int(defined.sum())).double(), rtol=0, atol=1e-5)


def to(device, *tensors):
    return [value.to(device) for value in tensors]


def skip_double_on_the_card(dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on cpu and reference")


@pytest.mark.parametrize("k, d", [(1, 5), (3, 1), (40, 2), (300, 31), (600, 48), (50, 784), (30, 3072)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_schedule_and_dtype(dtype, k, d, backend, device):
    skip_double_on_the_card(dtype, device)
    x, clean, scale, std = noisy(k, d, dtype)
    log_prior = torch.linspace(-1, 1, k)
    log_prior[1::7] = -math.inf
    for prior in (None, log_prior):
        args = to(device, x, clean, scale, std)
        p = p_sel(*args, log_prior=None if prior is None else prior.to(device))
        chosen = score_select(*args, log_prior=None if prior is None else prior.to(device), self_index=None, seed=1)
        assert p.dtype == chosen.log_normalizer.dtype == scale.dtype and p.shape == (len(x), k)
        assert_selection(x, clean, scale, std, p, chosen.log_normalizer, prior)
        assert (chosen.index >= 0).all() and (chosen.index < k).all()
        if prior is not None:
            assert (p[:, 1::7] == 0).all() and torch.isfinite(log_prior[chosen.index.cpu()]).all()
        mean = posterior_mean(*args, log_prior=None if prior is None else prior.to(device))
        assert mean.dtype == dtype and mean.shape == x.shape
        expected = torch.softmax(exact_logits(x, clean, scale, std, prior), 1) @ clean.double()
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-3)
        torch.testing.assert_close(mean.double().cpu(), expected, rtol=rounding, atol=1e-3)


@pytest.mark.parametrize("d", [3072, 12288])
def test_small_noise_in_many_dimensions(d, backend, device):
    """The expanded square has no digit left here: |x|^2 / 2 std^2 is 1e7 and more."""
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(16, d, generator=g) * 2 - 1
    for scale, std in ((1.0, 0.01), (0.99995, 0.01), (1.0, 0.002)):
        x = scale * clean + std * torch.randn(16, d, generator=g)
        answer = score_select(*to(device, x, clean), scale, std, seed=0)
        error = (answer.log_normalizer.double().cpu() - exact_logits(x, clean, scale, std).logsumexp(1)).abs().max()
        assert error <= 1e-3, f"log_normalizer is off by {error:.1e}"
        assert not answer.moved.any()


def test_p_and_the_draws_of_no_noise_at_all_and_of_nothing_else(backend, device):
    """A sample far from all others is its own; where scale is 0 every sample has its prior."""
    clean = torch.eye(8).to(device)
    assert torch.equal(p_sel(clean, clean, 1.0, 1e-3), clean)
    torch.testing.assert_close(p_sel(clean, clean, 0.0, 1.0), torch.full((8, 8), 1 / 8, device=device))
    prior = torch.arange(1, 9, device=device).float().log()
    torch.testing.assert_close(p_sel(clean, clean, 0.0, 1.0, log_prior=prior), (torch.arange(1, 9, device=device) / 36).expand(8, 8))


def test_duplicates_share(backend, device):
    clean = torch.randn(1, 7).repeat(10, 1).to(device)
    torch.testing.assert_close(p_sel(clean[:3] + 1, clean, 1.0, 0.5), torch.full((3, 10), 0.1, device=device))
    drawn = score_select(clean[:1].expand(500, 7), clean, 1.0, 0.5, seed=0).index
    assert drawn.unique().numel() == 10


@pytest.mark.parametrize("rows, k", [(5, 9), (9, 5), (0, 4), (1, 1), (70, 300)])
def test_shapes(rows, k, backend, device):
    x, clean = torch.randn(rows, 2, 3, 4, device=device), torch.randn(k, 2, 3, 4, device=device)
    p = p_sel(x, clean, 0.9, 0.5)
    chosen = score_select(x, clean, 0.9, 0.5, seed=0)
    assert p.shape == (rows, k) and posterior_mean(x, clean, 0.9, 0.5).shape == x.shape
    assert chosen.index.shape == chosen.moved.shape == chosen.log_normalizer.shape == (rows,)
    assert (chosen.index.dtype, chosen.moved.dtype, chosen.log_normalizer.dtype) == (torch.int64, torch.bool, torch.float32)
    flat = p_sel(x.flatten(1), clean.flatten(1), torch.tensor(0.9), torch.full((rows,), 0.5, device=device))
    assert torch.equal(p, flat)


def test_strides(backend, device):
    x, clean, scale, std = to(device, *noisy(20, 12))
    expected = p_sel(x, clean, scale, std), score_select(x, clean, scale, std, seed=3), posterior_mean(x, clean, scale, std)
    wide = torch.zeros(len(x), 24, device=device)
    wide[:, ::2] = x
    for strided in (x.t().contiguous().t(), wide[:, ::2], torch.cat([x, x])[: len(x)]):
        args = strided, clean.t().contiguous().t(), scale.repeat_interleave(2)[::2], std
        assert torch.equal(p_sel(*args), expected[0]) and torch.equal(posterior_mean(*args), expected[2])
        for a, b in zip(score_select(*args, seed=3), expected[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("strided", ["labels", "self_labels", "self_index", "class_counts"])
def test_strides_of_classes(strided, backend, device):
    x, clean, scale, std = to(device, *noisy(20, 12))
    rows = torch.arange(len(x))
    classes = {"labels": torch.arange(len(clean)) % 3, "self_labels": rows % 2, "self_index": rows + 1}
    classes = {name: value.to(device) for name, value in classes.items()} | {"class_counts": torch.tensor([9, 5, 1], device=device)}
    expected = score_select(x, clean, scale, std, gate="t2h", seed=3, **classes)
    classes[strided] = torch.stack([classes[strided]] * 2, 1)[:, 0]
    assert not classes[strided].is_contiguous()
    for a, b in zip(score_select(x, clean, scale, std, gate="t2h", seed=3, **classes), expected, strict=True):
        assert torch.equal(a, b)


def test_bank_as_clean(backend, device):
    x, clean, scale, std = to(device, *noisy(20, 12))
    log_weight = torch.linspace(-2, 2, 20, device=device)
    weighted, plain = Bank(clean, log_weight=log_weight), Bank(clean)
    assert torch.equal(p_sel(x, plain, scale, std), p_sel(x, clean, scale, std))
    prior = weighted.log_weight
    assert torch.equal(p_sel(x, weighted, scale, std), p_sel(x, clean, scale, std, log_prior=prior))
    assert torch.equal(posterior_mean(x, weighted, scale, std), posterior_mean(x, clean, scale, std, log_prior=prior))
    drawn = score_select(x, clean, scale, std, log_prior=prior, seed=1).index
    assert torch.equal(score_select(x, weighted, scale, std, seed=1).index, drawn)


def test_what_is_not_finite(backend, device):
    x, clean = torch.randn(12, 9), torch.randn(12, 9)
    clean[2], clean[5, 3], x[1, 0], x[4] = math.nan, -math.inf, math.nan, math.inf
    for scale in (1.0, 0.0):
        args = *to(device, x, clean), scale, 1.0
        p, chosen, mean = p_sel(*args), score_select(*args, seed=0), posterior_mean(*args)
        assert_selection(x, clean, scale, 1.0, p, chosen.log_normalizer)
        good = torch.tensor([i for i in range(12) if i not in (1, 4)])
        assert (p.cpu()[good][:, [2, 5]] == 0).all() and p[[1, 4]].isnan().all() and chosen.log_normalizer[[1, 4]].isnan().all()
        assert torch.isfinite(mean.cpu()[good]).all() and mean[[1, 4]].isnan().all()
        assert chosen.index[[1, 4]].tolist() == [1, 4] and not chosen.moved[[1, 4]].any()
        assert not torch.isin(chosen.index.cpu()[good], torch.tensor([2, 5])).any()
    orphans = score_select(*to(device, x[:5], clean), 1.0, 1.0, seed=0)
    assert orphans.index[[1, 4]].tolist() == [-1, -1] and not orphans.moved[[1, 4]].any()


def test_no_finite_logit(backend, device):
    x, clean = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    nothing = torch.full((3,), -math.inf, device=device)
    for op in (p_sel, posterior_mean):
        assert op(x, clean, 1.0, 1.0, log_prior=nothing).isnan().all()
    chosen = score_select(x, clean, 1.0, 1.0, log_prior=nothing, seed=0)
    assert (chosen.log_normalizer == -math.inf).all() and chosen.index.tolist() == [0, 1, 2] and not chosen.moved.any()
    far = score_select(x * 1e30, clean, 1.0, 1.0, self_index=torch.full((3,), -1, device=device), seed=0)  # squares overflow
    assert (far.log_normalizer == -math.inf).all() and (far.index == -1).all()


def test_weights_of_zero_take_nothing(backend, device):
    clean = torch.randn(400, 70)
    clean[3, 5], clean[200], clean[399, 69] = math.nan, math.inf, -math.inf
    weight = torch.rand(30, 400)
    weight[:20, [3, 200, 399]] = 0
    mixed = OPS.psel_mix(*to(device, weight, clean)).cpu()
    expected = weight.double() @ clean.double().nan_to_num(nan=0, posinf=0, neginf=0)
    torch.testing.assert_close(mixed[:20].double(), expected[:20], rtol=1e-5, atol=1e-4)
    assert not torch.isfinite(mixed[20:]).any()
    weight[7, 0] = math.nan
    mixed = OPS.psel_mix(*to(device, weight, clean)).cpu()
    assert mixed[7].isnan().all() and torch.isfinite(mixed[:7]).all()


# ---- draws


def perturbed(x, clean, scale, std, seed, row_offset=0, log_prior=None):
    rows, columns = row_offset + torch.arange(len(x)), torch.arange(len(clean))
    return exact_logits(x, clean, scale, std, log_prior) + reference.gumbel(reference.philox(torch.tensor([seed]), rows, columns))


@pytest.mark.parametrize("k, d", [(1, 3), (7, 2), (300, 31), (1000, 48)])
@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 + 5])
def test_the_draw_is_the_largest_perturbed_logit(seed, k, d, backend, device):
    x, clean, scale, std = noisy(k, d, copies=3)
    signed = seed - 2**64 if seed >= 2**63 else seed
    offset = 2**33 + 7  # rows take both words
    log_prior = torch.linspace(-1, 1, k)
    chosen = score_select(*to(device, x, clean, scale, std), log_prior=log_prior.to(device), seed=seed, row_offset=offset)
    best = perturbed(x, clean, scale, std, signed, offset, log_prior).sort(1, descending=True)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-3 if k > 1 else torch.ones(len(x), dtype=torch.bool)
    assert clear.float().mean() > 0.9
    assert torch.equal(chosen.index.cpu()[clear], best.indices[clear, 0])


def test_philox_known_answers():
    """Of the authors' kat_vectors (Random123), as key words, counter words, answer."""
    known = [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for key, counter, words in known:
        assert philox_words(key, counter) == words
    drawn = reference.philox(torch.tensor([0]), torch.tensor([0]), torch.arange(4))
    assert drawn[0].tolist() == list(known[0][2])
    g = torch.Generator().manual_seed(0)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=g)
    rows, columns = torch.randint(2**40, (5,), generator=g), torch.randint(2**33, (9,), generator=g)
    key = seed.item() & 0xFFFFFFFF, seed.item() >> 32 & 0xFFFFFFFF
    for row, line in zip(rows.tolist(), reference.philox(seed, rows, columns).tolist(), strict=True):
        for column, word in zip(columns.tolist(), line, strict=True):
            assert word == philox_words(key, (column // 4, row & 0xFFFFFFFF, row >> 32, 0))[column % 4]


def philox_words(key, counter):
    (k0, k1), (a, b, c, d) = key, counter
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right & 0xFFFFFFFF, (left >> 32) ^ d ^ k1, left & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


@pytest.mark.parametrize("name", ["flat", "even", "peaked", "low noise", "weighted"])
def test_frequencies(name, backend, device):
    """40000 draws: every count within four standard deviations, and a chi-square test at 1e-3."""
    g = torch.Generator().manual_seed(5)
    x, clean = torch.randn(1, 2, generator=g), torch.randn(12, 2, generator=g)
    stds = {"flat": 20.0, "even": 3.0, "peaked": 0.7, "low noise": 0.4, "weighted": 1.5}
    std, log_prior = stds[name], torch.linspace(-2, 1, 12).to(device) if name == "weighted" else None
    n = 40_000
    p = p_sel(*to(device, x, clean), 1.0, std, log_prior=log_prior)[0].cpu().double()
    drawn = score_select(x.expand(n, 2).to(device), clean.to(device), 1.0, std, log_prior=log_prior, seed=2024).index.cpu()
    counts = torch.bincount(drawn, minlength=12).double()
    assert ((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt() + 1).all()
    often = n * p >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([n * p[often], n * p[~often].sum()[None]])
    observed, expected = observed[expected > 0.5], expected[expected > 0.5]
    assert stats.chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue > 1e-3


def test_seed_forms(backend, device):
    x, clean, scale, std = to(device, *noisy(20, 3, copies=4))
    call = lambda seed: score_select(x, clean, scale, std, seed=seed).index  # noqa: E731
    expected = call(7)
    for seed in (np.int64(7), torch.tensor(7), torch.tensor(7, device=device)):
        assert torch.equal(call(seed), expected)
    assert not torch.equal(call(8), expected) and torch.equal(call(2**64 - 1), call(-1))
    torch.manual_seed(3)
    first, second = call(None), call(None)
    torch.manual_seed(3)
    assert torch.equal(call(None), first) and not torch.equal(first, second)


@pytest.mark.parametrize("k, d", [(20, 3), (300, 50), (33, 784)])
def test_same_bits_for_any_thread_count_and_split(k, d, backend, device):
    x, clean, scale, std = to(device, *noisy(k, d, copies=3))
    scale[::5] = 1  # rows and tiles of scale 1 take a shorter way
    log_prior = torch.linspace(-1, 1, k, device=device)
    p, mean = p_sel(x, clean, scale, std, log_prior=log_prior), posterior_mean(x, clean, scale, std, log_prior=log_prior)
    whole = score_select(x, clean, scale, std, log_prior=log_prior, seed=9, row_offset=100)
    threads = torch.get_num_threads()
    try:
        for count, size in ((1, len(x)), (2, 30), (1, 1), (3, 7)):
            torch.set_num_threads(count)
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                args = x[rows], clean, scale[rows], std[rows]
                own = None if size == len(x) else torch.full((len(x[rows]),), -1, device=device)
                part = score_select(*args, log_prior=log_prior, seed=9, row_offset=100 + start, self_index=own)
                assert torch.equal(part.index, whole.index[rows]) and torch.equal(part.log_normalizer, whole.log_normalizer[rows])
                assert torch.equal(p_sel(*args, log_prior=log_prior), p[rows])
                assert torch.equal(posterior_mean(*args, log_prior=log_prior), mean[rows])
    finally:
        torch.set_num_threads(threads)


# ---- gates


def test_gates(backend, device):
    g = torch.Generator().manual_seed(0)
    n, counts = 200, torch.tensor([500, 100, 100, 20, 3])
    x, clean = to(device, torch.randn(n, 4, generator=g), torch.randn(n, 4, generator=g))
    labels, counts = torch.randint(5, (n,), generator=g).to(device), counts.to(device)
    z = score_select(x, clean, 0.1, 1.0, seed=4)
    own = torch.arange(n, device=device)
    assert z.moved.float().mean() > 0.9 and torch.equal(z.moved, z.index != own)
    here, there = counts[labels], counts[labels[z.index]]
    for gate, passes in (("t2h", there >= here), ("h2t", there <= here)):
        chosen = score_select(x, clean, 0.1, 1.0, gate=gate, labels=labels, class_counts=counts, seed=4)
        assert torch.equal(chosen.index, torch.where(passes, z.index, own)) and torch.equal(chosen.moved, chosen.index != own)
        assert torch.equal(chosen.log_normalizer, z.log_normalizer)
        tied = (there == here) & (z.index != own)
        assert tied.any() and chosen.moved[tied].all(), "equal counts pass both gates"
        assert 0 < chosen.moved.sum() < n
        for form in (counts.tolist(), counts.double(), tuple(counts.tolist())):
            again = score_select(x, clean, 0.1, 1.0, gate=gate, labels=labels, class_counts=form, seed=4)
            assert torch.equal(again.index, chosen.index)
    single = score_select(x, clean, 0.1, 1.0, gate="t2h", labels=torch.zeros_like(labels), class_counts=[9], seed=4)
    assert torch.equal(single.index, z.index)


def test_a_reference_set_that_is_not_the_batch(backend, device):
    g = torch.Generator().manual_seed(0)
    clean, labels, counts = torch.randn(300, 4, generator=g), torch.randint(5, (300,), generator=g), torch.tensor([500, 100, 99, 20, 3])
    own, strange = torch.randint(300, (40,), generator=g), torch.randint(5, (40,), generator=g)
    x, clean, labels, counts, own, strange = to(device, torch.randn(40, 4, generator=g), clean, labels, counts, own, strange)
    z = score_select(x, clean, 0.1, 1.0, self_index=own, seed=4)
    assert torch.equal(z.moved, z.index != own)
    kwargs = {"gate": "t2h", "labels": labels, "class_counts": counts, "self_index": own, "seed": 4}
    for self_labels in (None, strange):
        here = counts[labels[own] if self_labels is None else self_labels]
        chosen = score_select(x, clean, 0.1, 1.0, self_labels=self_labels, **kwargs)
        assert torch.equal(chosen.index, torch.where(counts[labels[z.index]] >= here, z.index, own))
    free = score_select(x, clean, 0.1, 1.0, seed=4)
    assert torch.equal(free.index, z.index) and free.moved.all()


# ---- derivatives and composition


def differentiable(rows=3, k=4, d=5):
    g = torch.Generator().manual_seed(1)
    x, clean, prior = (torch.randn(*shape, generator=g).double() for shape in ((rows, d), (k, d), (k,)))
    scale, std = torch.linspace(0.3, 1, rows).double(), torch.linspace(0.8, 2, rows).double()
    return [value.requires_grad_() for value in (x, clean, scale, std, prior)]


def by_position(op):
    return lambda x, clean, scale, std, prior: op(x, clean, scale, std, log_prior=prior)


@pytest.mark.parametrize("op", [p_sel, posterior_mean])
@pytest.mark.parametrize("backend_name", ["reference", *(["cpu"] if ltkernels.build_info()["cpp"] else [])])
def test_gradcheck(op, backend_name):
    with ltkernels.backend(backend_name):
        assert torch.autograd.gradcheck(by_position(op), differentiable())
        x, clean, scale, std, prior = differentiable()
        assert torch.autograd.gradcheck(lambda x: op(x, x, 0.8, 1.1), (clean,))  # one tensor in both places
        assert torch.autograd.gradcheck(lambda s, h: op(x.detach(), clean.detach(), s, h), (scale[0].detach().requires_grad_(), std))


@pytest.mark.parametrize("op", [p_sel, posterior_mean])
def test_gradients_beside_plain_torch(op, backend, device):
    x, clean, scale, std = to(device, *noisy(30, 40))
    keep = (std > 0.05) & (scale > 0)
    x, scale, std = x[keep], scale[keep], std[keep]
    prior = torch.linspace(-1, 1, 30, device=device)
    weight = torch.randn(len(x), 30 if op is p_sel else 40, device=device, generator=torch.Generator(device).manual_seed(0))

    def plain(x, clean, scale, std, prior):
        logits = -(x[:, None] - scale[:, None, None] * clean).square().sum(-1) / (2 * std[:, None] ** 2) + prior
        p = torch.softmax(logits, 1)
        return p if op is p_sel else p @ clean

    inputs = [value.clone().requires_grad_() for value in (x, clean, scale, std, prior)]
    ours = torch.autograd.grad((by_position(op)(*inputs) * weight).sum(), inputs)
    wide = [value.detach().double().requires_grad_() for value in inputs]
    theirs = torch.autograd.grad((plain(*wide) * weight.double()).sum(), wide)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_gradients_come_in_the_dtype_of_the_input(backend, device):
    x, clean, scale, std = to(device, *noisy(20, 6, torch.float16))
    x, clean = x.requires_grad_(), clean.requires_grad_()
    for op in (p_sel, posterior_mean):
        grads = torch.autograd.grad(op(x, clean, scale, std).square().sum(), (x, clean))
        assert all(grad.dtype == torch.float16 for grad in grads)


def test_broken_rows_of_clean_pass_nothing_on(backend, device):
    x, clean = torch.randn(6, 5, device=device).requires_grad_(), torch.randn(8, 5, device=device)
    clean[3] = math.nan
    clean.requires_grad_()
    for op in (p_sel, posterior_mean):
        for grad in torch.autograd.grad(op(x, clean, 0.9, 0.7).square().sum(), (x, clean)):
            assert torch.isfinite(grad).all()


def test_what_is_not_differentiable_raises():
    inputs = differentiable()
    for op in (p_sel, posterior_mean):
        (gradient,) = torch.autograd.grad(by_position(op)(*inputs).square().sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{op.__name__}: no second derivatives"):
            gradient.sum().backward()
    x, clean, scale, std, prior = inputs
    chosen = score_select(x, clean, scale, std, log_prior=prior, seed=0)
    assert not any(field.requires_grad for field in chosen)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("op", [p_sel, posterior_mean, score_select])
def test_forward_mode_raises_instead_of_answering_zeros(op, place):
    inputs = [value.detach() for value in differentiable()]

    def call(value):
        return by_position(op)(*(value if i == place else other for i, other in enumerate(inputs)))

    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"{op.__name__}: no forward-mode derivatives"):
            call(torch.autograd.forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place])))
        call(inputs[place])


@pytest.mark.parametrize("wrong", ["labels", "self_index"])
def test_a_compiled_call_with_an_index_beyond_fails(wrong):
    """Values are not checked there, but they are not bent to fit either."""
    options = {"labels": torch.tensor([0, 1, 2, 0, 1, 2]), "self_index": torch.arange(6), "class_counts": torch.tensor([9, 5, 1])}
    x, options[wrong] = torch.randn(6, 5), torch.tensor([0, 1, 2, 6, 1, 2])
    compiled = torch.compile(lambda x: score_select(x, x, 0.7, 0.7, gate="t2h", seed=1, **options).index, backend="eager", fullgraph=True)
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|must be in \["):
        compiled(x)


def test_levels_as_they_multiply_images(backend, device):
    x, clean = (torch.randn(rows, 3, 4, 4, device=device) for rows in (5, 7))
    scale, std = torch.rand(5, device=device), torch.rand(5, device=device) + 0.5
    tall = scale.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1).requires_grad_()
    assert torch.equal(p_sel(x, clean, *tall), p_sel(x, clean, scale, std))
    assert torch.equal(denoising_target(x, clean[:5], *tall), denoising_target(x, clean[:5], scale, std))
    (grad,) = torch.autograd.grad(posterior_mean(x, clean, *tall).square().sum(), tall[1])
    assert grad.shape == (5, 1, 1, 1) and grad.any()


@pytest.mark.parametrize("rows, k, requires_grad", [(5, 7, True), (0, 3, False)])
def test_opcheck(rows, k, requires_grad, backend, device):
    x, clean = (torch.randn(size, 6, device=device).requires_grad_(requires_grad) for size in (rows, k))
    scale, std, prior = (torch.ones(size, device=device) for size in (rows, rows, k))
    args, needed = (x, clean, scale, std, prior if requires_grad else None), [True, requires_grad, False, True, requires_grad]
    torch.library.opcheck(OPS.psel.default, args)
    torch.library.opcheck(OPS.psel_mean.default, args)
    args = [value if value is None else value.detach() for value in args]
    p, mean = OPS.psel(*args)[0], OPS.psel_mean(*args)[0]
    torch.library.opcheck(OPS.psel_sample.default, (*args, torch.tensor([1], device=device), 3))
    torch.library.opcheck(OPS.psel_mix.default, (p, clean.detach()))
    torch.library.opcheck(OPS.psel_backward.default, (torch.ones_like(p), p, *args[:4], needed))
    torch.library.opcheck(OPS.psel_mean_backward.default, (torch.ones_like(mean), *args, needed))


def test_compiles_into_one_graph(backend, device, monkeypatch):
    monkeypatch.setenv("LTKERNELS_BACKEND", backend)  # no block reaches the backward pass of a graph on a card
    x, clean, scale, std = to(device, *noisy(20, 6))
    prior = torch.linspace(-1, 1, 20, device=device)

    def loss(x, clean, scale, std, prior):
        p = p_sel(x, clean, scale, std, log_prior=prior)
        return p.square().sum() + posterior_mean(x, clean, scale, std, log_prior=prior).square().sum()

    inputs = [value.clone().requires_grad_() for value in (x, clean, scale, std, prior)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    eager, graph = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
    for a, b in zip(eager, graph, strict=True):
        torch.testing.assert_close(a, b)
    labels, counts = torch.arange(20, device=device) % 3, torch.tensor([9, 5, 1], device=device)
    own = torch.zeros(len(x), dtype=torch.int64, device=device)

    def select(x, clean, scale, std, offset):
        return score_select(x, clean, scale, std, gate="t2h", labels=labels, class_counts=counts, self_index=own, seed=5, row_offset=offset)

    graph = torch.compile(select, fullgraph=True, backend="aot_eager", dynamic=True)
    for offset in (0, 17):
        for a, b in zip(select(x, clean, scale, std, offset), graph(x, clean, scale, std, offset), strict=True):
            assert torch.equal(a, b)
    target = torch.compile(denoising_target, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(target(x, x, scale, std), denoising_target(x, x, scale, std))


def test_autocast_does_not_copy_clean(backend, device, monkeypatch):
    x, clean, scale, std = to(device, *noisy(20, 6))
    half = x.bfloat16()
    expected = p_sel(half.float(), clean, scale, std), posterior_mean(half.float(), clean, scale, std)
    chosen = score_select(half.float(), clean, scale, std, seed=0)
    seen = []
    original = ltkernels.backends.implementation

    def watched(*chosen):
        return lambda rows, points, *rest: seen.append(points) or original(*chosen)(rows, points, *rest)

    monkeypatch.setattr(ltkernels.backends, "implementation", watched)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(p_sel(half, clean, scale, std), expected[0])
        assert torch.equal(posterior_mean(half, clean, scale, std), expected[1].to(half.dtype))  # like x_t
        assert torch.equal(score_select(half, clean, scale, std, seed=0).index, chosen.index)
    assert len(seen) >= 3 and all(points.data_ptr() == clean.data_ptr() for points in seen)


def test_numpy_in_numpy_out(backend, device):
    if device != "cpu":
        pytest.skip("NumPy arrays live in host memory")
    x, clean, scale, std = noisy(20, 6)
    arrays = [value.numpy() for value in (x, clean, scale, std)]
    for op in (p_sel, posterior_mean):
        answer = op(*arrays)
        assert isinstance(answer, np.ndarray) and np.array_equal(answer, op(x, clean, scale, std).numpy())
    labels = np.arange(20) % 3
    own = np.arange(len(x))
    gate = {"gate": "t2h", "class_counts": np.array([9, 5, 1])[::-1], "seed": 0}
    chosen = score_select(*arrays, labels=labels, self_index=own, **gate)
    expected = score_select(x, clean, scale, std, labels=torch.from_numpy(labels), self_index=torch.from_numpy(own), **gate)
    for a, b in zip(chosen, expected, strict=True):
        assert isinstance(a, np.ndarray) and np.array_equal(a, b.numpy())
    target = denoising_target(arrays[0], arrays[0], *arrays[2:])
    assert isinstance(target, np.ndarray)


def test_denoising_targets():
    x0, noise = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 3).double()
    scale, std = torch.linspace(0.1, 0.9, 5).double(), torch.linspace(0.9, 0.1, 5).double()
    s, h = scale[:, None, None], std[:, None, None]
    x = s * x0 + h * noise
    expected = {"epsilon": noise, "v": s * noise - h * x0, "x0": x0, "flow": noise - x0}
    for prediction, value in expected.items():
        torch.testing.assert_close(denoising_target(x, x0, scale, std, prediction=prediction), value)
        half = denoising_target(x.half(), x0.half(), scale.half(), std.half(), prediction=prediction)
        assert half.dtype == torch.float16 and half.shape == x.shape
    x, x0 = x.clone().requires_grad_(), x0.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: denoising_target(a, b, scale, std).square(), (x, x0))
    other = x0.detach().flip(0)
    torch.testing.assert_close(denoising_target(x, other, scale, std), (x - s * other) / h)


MEMORY = """
import torch, ltkernels
from pathlib import Path

def mb(field):
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

x, clean = torch.randn(2048, 8), torch.randn(16384, 8)
ltkernels.score_select(x[:100], clean, 1.0, 1.0, seed=0), ltkernels.posterior_mean(x[:100], clean, 1.0, 1.0)
for op in (ltkernels.score_select, ltkernels.posterior_mean):
    Path("/proc/self/clear_refs").write_text("5")
    before = mb("VmRSS")
    op(x, clean, 1.0, 1.0)
    print(mb("VmHWM") - before)
"""


@pytest.mark.skipif(not ltkernels.build_info()["cpp"], reason="the promise is the cpu backend's; there is no compiled part")
def test_memory_is_never_rows_times_samples():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    for peak in map(float, run.stdout.split()):
        assert peak < 48, f"{peak:.0f} MB beyond the inputs; a B x K matrix of float32 would be 128 MB"


ISA_NEEDS = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
X86_FLAGS = set(re.search(r"^flags\s*:(.*)$|\Z", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group().split())


@pytest.mark.skipif(not ltkernels.build_info()["cpp"], reason="the instruction sets are the cpu backend's; there is no compiled part")
@pytest.mark.parametrize("isa", [isa for isa, needs in ISA_NEEDS.items() if needs <= X86_FLAGS])
def test_every_instruction_set_of_this_processor(isa):
    """In a process of its own, on each path that the library can choose at run time."""
    cases = "cpu and (far_from or small_noise or 600-48 or 30-3072 or 300-50 or 300-31 or weights) and not 12288"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", cases]
    run = subprocess.run(command, env={**os.environ, "LTKERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]


# ---- far from the origin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_gradients_far_from_the_origin(offset, backend, device):
    """The squares of the derivatives in scale and std must not be expanded about the origin."""
    g = torch.Generator().manual_seed(0)
    clean = torch.randn(32, 64, generator=g) + offset
    scale, std = torch.full((32,), 0.75), torch.full((32,), 4.0)
    x = (scale[:, None] * clean + 4 * torch.randn(32, 64, generator=g)).float()
    pull = torch.randn(32, 64, generator=g)
    for op, weight in ((p_sel, pull[:, :32]), (posterior_mean, pull)):
        given = [t.detach().clone().to(device).requires_grad_() for t in (x, clean, scale, std)]
        (op(*given) * weight.to(device)).sum().backward()
        exact = [t.detach().double().requires_grad_() for t in (x, clean, scale, std)]
        logits = -(exact[0][:, None] - exact[2][:, None, None] * exact[1]).square().sum(-1) / (2 * exact[3][:, None] ** 2)
        p = logits.softmax(1)
        ((p if op is p_sel else p @ (exact[1] - offset)) * weight.double()).sum().backward()
        for name, mine, true in zip(("x", "clean", "scale", "std"), given, exact, strict=True):
            error = (mine.grad.cpu().double() - true.grad).norm() / true.grad.norm()
            assert error < 1e-4, (op.__name__, name, error)


def test_one_row_far_away_spoils_no_gradient(backend, device):
    x, clean, scale, std = noisy(8, 5, copies=2)
    x, scale, std = (t[scale > 0] for t in (x, scale, std))  # at scale 0 it is as near as any other row
    clean[3] = 3e20  # its square is beyond float32
    given = [t.detach().clone().to(device).requires_grad_() for t in (x, clean, scale, std)]
    posterior_mean(*given).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in given)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_log_normalizer_far_from_the_origin(offset, backend, device):
    """scale * clean, rounded by itself, would be off by more than the noise allows."""
    g = torch.Generator().manual_seed(0)
    clean = torch.randn(3, 3072, generator=g) + offset
    scale, std = 0.9999**0.5, 0.01
    x = (torch.tensor(scale) * clean.double() + std * torch.randn(3, 3072, generator=g).double()).float()
    found = score_select(x.to(device), clean.to(device), scale, std, seed=0).log_normalizer.cpu().double()
    s, h = (torch.tensor(value).double() for value in (scale, std))  # as float32 has them
    true = torch.logsumexp(-(x.double()[:, None] - s * clean.double()).square().sum(-1) / (2 * h**2), 1)
    assert (found - true).abs().max() < 1e-3


def test_std_beyond_all_logits(backend, device):
    """Logits beyond float32 are no logits: every row keeps its own."""
    x, clean = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)
    chosen = score_select(x, clean, 1.0, 1e-25, seed=0)
    assert chosen.log_normalizer.isneginf().all() and not chosen.moved.any()
    assert p_sel(x, clean, 1.0, 1e-25).isnan().all()
