"""pair_sqdist and pcl_rows in Triton's interpreter: against float64, rows that are no numbers, and what an answer depends on."""

import math

import pytest
import torch

import ltkernels
from ltkernels.reference import PCL_FORMS
from ltkernels.triton import pairwise_pcl as backend
from ltkernels.triton import score_select

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns of the inf and NaN that the hard cases are made of


@pytest.fixture(autouse=True)
def garbage(monkeypatch):
    """New memory holds the worst: what is read has to be written before. And a tile has many rows, since the interpreter pays for each
    operation, whatever its size."""

    def filled(like, *shape, dtype=torch.float32):
        return torch.full(shape, NAN if dtype.is_floating_point else -(2**30), dtype=dtype)

    monkeypatch.setattr(score_select, "_empty", filled)
    monkeypatch.setattr(backend, "_empty", filled)
    monkeypatch.setattr(backend, "_tile_rows", lambda *_: 128)


# ---- what is right


def pair_terms(form, d, margin):
    """phi and phi' in float64."""
    if form == "exponential":
        return (-d).exp(), -(-d).exp()
    if form == "reciprocal":
        return 1 / (1 + d), -1 / (1 + d) ** 2
    if form == "hinge":
        return (margin[:, None].double() - d).clamp(min=0), -(d < margin[:, None].double()).double()
    return -d, -torch.ones_like(d)


def counting(case):
    _, labels, group, _, _, other, other_labels, other_group, *_ = case
    theirs = (labels, group) if other is None else (other_labels, other_group)
    counts = labels[:, None] != theirs[0]
    return counts if group is None else counts & (group[:, None] == theirs[1])


def truth(case):
    """row, its tolerance, pairs, active, mu_grad, partner_grad. The gradients are autograd's."""
    mu, _, _, weight, margin, other, _, _, form, scale = case
    mu = mu.double().requires_grad_()
    theirs = mu if other is None else other.double().requires_grad_()
    d = scale * (mu[:, None] - theirs).square().sum(2)
    counts = counting(case)
    phi, slope = pair_terms(PCL_FORMS[form], d, margin)
    row = torch.where(counts, phi, 0).sum(1)
    grads = torch.autograd.grad((weight.double() * row).sum(), [mu] if other is None else [mu, theirs])
    allowed = 1e-6 * torch.where(counts, torch.maximum(phi.abs() * d.clamp(min=1), slope.abs() * d), 0).sum(1).detach()
    active = torch.where(counts, d < margin[:, None].double(), False).sum(1) if margin is not None else torch.zeros(0)
    return row.detach(), allowed, counts.sum(1), active.double(), grads[0], *grads[1:]


# ---- cases


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def some_of(n, size, seed):
    return torch.randint(n, (size,), generator=torch.Generator().manual_seed(seed))


def clustered(n, d, seed=0):
    """Two rows of each pair of neighbours 1e-3 apart, at norm 10."""
    centres = torch.nn.functional.normalize(gauss(-(-n // 2), d, seed=seed), dim=1)
    return 10 * centres.repeat_interleave(2, 0)[:n] + 1e-3 * torch.nn.functional.normalize(gauss(n, d, seed=seed + 1), dim=1)


def batch(n, d, form, rows=gauss, n_other=None, groups=None, classes=3, scale=None, dtype=torch.float32):
    """(mu, labels, group, weight, margin, other, other_labels, other_group, form, scale)"""
    labels = torch.arange(n) % classes  # neighbours differ
    margin = 0.5 + 2 * uniform(n, seed=4) if form == "hinge" else None
    group = None if groups is None else some_of(groups, n, 5)
    theirs = (None, None, None)
    if n_other is not None:
        theirs = rows(n_other, d, seed=6).to(dtype), some_of(classes, n_other, 7), None if groups is None else some_of(groups, n_other, 8)
    mu = rows(n, d, seed=1).to(dtype)
    return mu, labels, group, 0.1 + uniform(n, seed=3), margin, *theirs, PCL_FORMS.index(form), 1 / d if scale is None else scale


CASES = {
    **{f"{form}, {n} of {d}": batch(n, d, form) for form in PCL_FORMS for n, d in ((2, 64), (5, 13), (33, 2), (70, 1))},
    **{f"{form}, groups": batch(33, 13, form, groups=2) for form in PCL_FORMS},
    **{f"{form}, 33 against 70": batch(33, 13, form, n_other=70) for form in PCL_FORMS},
    **{f"{form}, clusters": batch(33, 64, form, rows=clustered) for form in PCL_FORMS},
    "sum of squares": batch(33, 13, "exponential", scale=1.0),
    "clusters, sum of squares": batch(33, 13, "reciprocal", rows=clustered, scale=1.0),
    "ragged tiles": batch(150, 13, "exponential", groups=3),
    "200 coordinates": batch(70, 200, "hinge"),
    "against many, groups": batch(5, 13, "hinge", n_other=260, groups=2),
    "clusters against others": batch(33, 13, "exponential", rows=clustered, n_other=20),
    "single class": batch(33, 13, "exponential", classes=1),
    "each its own class": batch(70, 2, "reciprocal", classes=70),
    "no row": batch(0, 13, "hinge"),
    "one row": batch(1, 13, "hinge"),
    "one row, one partner": batch(1, 2, "negative_l2", n_other=1, classes=2),
    "no row, some partners": batch(0, 13, "exponential", n_other=5),
    "no partner": batch(5, 13, "hinge", n_other=0),
    "float16": batch(33, 64, "exponential", dtype=torch.float16),
    "bfloat16": batch(33, 64, "hinge", dtype=torch.bfloat16),
    "bfloat16 against others": batch(5, 13, "reciprocal", n_other=33, dtype=torch.bfloat16),
}


def same(a, b):
    """To the bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7e37), b.nan_to_num(nan=7e37))


def solved(case, grad=True, other_grad=None):
    return backend.pcl_rows(*case, grad, case[5] is not None if other_grad is None else other_grad)


def term_sizes(case):
    """What each row's gradient is a sum of, in norms: where the terms cancel, the norm of the sum is no measure."""
    mu, _, _, weight, margin, other, _, _, form, scale = case
    x, y = mu.double(), (mu if other is None else other).double()
    d = scale * (x[:, None] - y).square().sum(2)
    _, slope = pair_terms(PCL_FORMS[form], d, margin)
    terms = torch.where(counting(case), weight.double()[:, None] * slope.abs() * 2 * (scale * d).sqrt(), 0)
    return [(terms + terms.T).sum(1)] if other is None else [terms.sum(1), terms.sum(0)]


def close_rows(found, true, terms=0):
    assert found.dtype == torch.float32 and found.shape == true.shape
    assert ((found - true).norm(dim=1) <= 1e-5 * true.norm(dim=1) + 2e-7 * terms).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    row, pairs, active, mu_grad, partner_grad = solved(case)
    true_row, allowed, true_pairs, true_active, *grads = truth(case)
    assert row.dtype == active.dtype == torch.float32 and row.shape == true_row.shape
    assert ((row - true_row).abs() <= allowed).all()
    assert torch.equal(pairs, true_pairs) and torch.equal(active.double(), true_active)
    terms = term_sizes(case)
    close_rows(mu_grad, grads[0], terms[0])
    if case[5] is None:
        assert partner_grad.shape == (0,)
    else:
        close_rows(partner_grad, grads[1], terms[1])


def test_cases_reach_their_paths():
    """Both sides of a margin, both answers of a group, close pairs that count."""
    for name, case in CASES.items():
        _, _, pairs, active, *_ = truth(case)
        if "hinge" in name and len(pairs) > 2:
            assert 0 < active.sum() < pairs.sum()
        if "groups" in name:
            assert 0 < pairs.sum() < counting((*case[:2], None, *case[3:])).sum()
        if "clusters" in name and case[5] is None:
            d = (case[0][:, None].double() - case[0].double()).norm(dim=2)
            assert (d[counting(case)] < 3e-3).sum() >= 32 and case[0].norm(dim=1).min() > 9


@pytest.mark.parametrize("name", ["hinge, 33 against 70", "exponential, groups"])
def test_what_is_not_asked_for_is_empty(name):
    case = CASES[name]
    whole = solved(case)
    for grad, other_grad in ((False, False), (True, False), (False, case[5] is not None)):
        row, pairs, active, *grads = solved(case, grad, other_grad)
        assert same(row, whole[0]) and torch.equal(pairs, whole[1]) and same(active, whole[2])
        for asked, found, wanted in zip((grad, other_grad), grads, whole[3:], strict=True):
            assert same(found, wanted) if asked else found.shape == (0,) and found.dtype == torch.float32


# ---- rows that are no numbers


def spoiled(case, rows=None, partners=None):
    """The case with one coordinate of some rows replaced, and with all of these rows zeros."""
    answers = []
    for broken in (True, False):
        pieces = list(case)
        for place, spoil in ((0, rows), (5, partners)):
            if spoil:
                pieces[place] = pieces[place].clone()
                for row, value in spoil.items():
                    pieces[place][row] = 0
                    if broken:
                        pieces[place][row, -1] = value
        answers.append(tuple(pieces))
    return answers


@pytest.mark.parametrize("form", PCL_FORMS)
@pytest.mark.parametrize("n_other", [None, 20])
def test_nan_and_inf(form, n_other):
    """They spoil both rows of the pairs that count, whatever the weight, and nothing else."""
    case = batch(33, 13, form, n_other=n_other, groups=6)
    case[3][:4] = 0.0
    rows, partners = {1: NAN, 9: INF, 20: -INF}, {3: NAN, 8: INF} if n_other else None
    case, clean = spoiled(case, rows, partners)
    counts = counting(case)
    broken = torch.zeros(33, dtype=torch.bool)
    broken[list(rows)] = True
    theirs = broken if n_other is None else torch.isin(torch.arange(n_other), torch.tensor(list(partners)))
    nan = counts & (broken[:, None] | theirs)
    row, pairs, active, mu_grad, partner_grad = solved(case)
    true_row, allowed, true_pairs, true_active, *grads = truth(clean)
    assert torch.equal(pairs, true_pairs)
    fine = ~nan.any(1)
    assert 0 < fine.sum() < 33
    assert row[~fine].isnan().all() and ((row - true_row).abs() <= allowed)[fine].all()
    if form == "hinge":
        assert active[~fine].isnan().all() and torch.equal(active[fine].double(), true_active[fine])
    assert mu_grad[~fine].isnan().all()
    close_rows(mu_grad[fine], grads[0][fine])
    if n_other:
        fine = ~nan.any(0)
        assert 0 < fine.sum() < n_other and partner_grad[~fine].isnan().all()
        close_rows(partner_grad[fine], grads[1][fine])


@pytest.mark.parametrize("form", PCL_FORMS[:3])
def test_distances_beyond_float32(form):
    """Infinitely far, though no row is infinite: no loss and no gradient, not even where a difference overflows."""
    case = batch(6, 3, form)
    case[0][:4] = torch.tensor([3e38, -3e38, 1e25, -1e25])[:, None]
    row, _, active, mu_grad, _ = solved(case)
    true_row, allowed, _, true_active, grad = truth(case)
    assert ((row - true_row).abs() <= allowed + 1e-30).all() and torch.equal(active.double(), true_active)
    assert (mu_grad[:4] == 0).all()
    close_rows(mu_grad[4:], grad[4:])
    assert (row[:4] == 0).all() and (row[4:] > 0).all()


# ---- distances


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (5, 33, 2), (2, 70, 64), (150, 5, 13), (0, 5, 3), (5, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sqdist(n, m, d, dtype):
    x, y = gauss(n, d, seed=1).to(dtype), gauss(m, d, seed=2).to(dtype)
    out = backend.pair_sqdist(x, y)
    true = (x.double()[:, None] - y.double()).square().sum(2)
    assert out.dtype == torch.float32 and out.shape == true.shape
    assert ((out - true).abs() <= 1e-6 * true).all()


@pytest.mark.parametrize("rows", [gauss, clustered])
def test_sqdist_of_itself(rows):
    x = rows(70, 40)
    out = backend.pair_sqdist(x, x)
    true = (x.double()[:, None] - x.double()).square().sum(2)
    assert ((out - true).abs() <= 1e-6 * true).all()
    assert torch.equal(out, out.T) and (out.diagonal() == 0).all()


def test_sqdist_of_many_coordinates(monkeypatch):
    """Equal squares, so what is rounded adds up: sums that are not compensated are off by 32 units of 2^-24 for the first value."""
    monkeypatch.setattr(backend, "_tile_rows", lambda *_: 8)
    x = torch.stack([torch.full((4096,), value) for value in (1.3675975799560547, 0.3, 1.1)])
    out = backend.pair_sqdist(x, torch.zeros(1, 4096))
    true = x.double().square().sum(1, keepdim=True)
    assert ((out - true).abs() <= 15 * 2.0**-24 * true).all()


def test_sqdist_of_what_is_no_number():
    x = gauss(6, 40)
    x[0, 3], x[1, 3], x[2, 3], x[3] = NAN, INF, -INF, 1e25
    out = backend.pair_sqdist(x, x)
    true = (x.double()[:, None] - x.double()).square().sum(2).float()  # 1e25: inf in float32
    assert out[3, 4] == INF and out[1, 4] == INF and out[1, 1].isnan()
    assert torch.equal(out.isnan(), true.isnan()) and torch.equal(out == INF, true == INF)


# ---- what an answer depends on


AMONG, OTHERS = batch(150, 3, "hinge", groups=2), batch(9, 3, "exponential", n_other=150)
AMONG[0][140] = INF  # in the second panel; it spoils a third of the rows


@pytest.mark.parametrize(
    "case, name, value, launches",
    [
        (AMONG, "_tile_rows", lambda *_: 32, [(10,)]),
        (AMONG, "COEFFICIENTS", 0, [(2,)] * 2),
        (AMONG, "SLAB", 0, [(2,)] * 2),
        (OTHERS, "_tile_rows", lambda *_: 2, [(10,)]),
        (OTHERS, "COEFFICIENTS", 0, [(1,)] * 2),
    ],
)
def test_bits_do_not_depend_on_how_the_work_is_split(monkeypatch, case, name, value, launches):
    monkeypatch.setattr(backend, "COEFFICIENTS", 2**20)  # one panel
    grids = []
    whole = solved(case)
    monkeypatch.setattr(backend, name, value)
    pairs = backend._pairs
    monkeypatch.setattr(backend, "_pairs", type("Counted", (), {"__getitem__": lambda _, grid: grids.append(grid) or pairs[grid]})())
    assert all(same(a, b) for a, b in zip(solved(case), whole, strict=True))
    assert grids == launches


def test_sqdist_bits_do_not_depend_on_how_the_work_is_split(monkeypatch):
    x, y = gauss(37, 13), gauss(150, 13, seed=1)
    whole = backend.pair_sqdist(x, y)
    for name, value in (("_tile_rows", lambda *_: 8), ("SLAB", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(backend, name, value)
            assert same(backend.pair_sqdist(x, y), whole)
    assert same(backend.pair_sqdist(x[5:6], y[7:9]), whole[5:6, 7:9])
    assert same(backend.pair_sqdist(y, x), whole.T)


def test_memory(monkeypatch):
    """No B x B, and no more than a transposed copy, a panel and what is left of each tile."""
    sizes, empty = [], backend._empty
    for module in (backend, score_select):
        monkeypatch.setattr(module, "_empty", lambda *a, **kw: sizes.append(math.prod(a[1:])) or empty(*a, **kw))
    solved(batch(300, 2, "hinge"))
    assert sizes and max(sizes) == 128 * 384 < 300 * 300


@pytest.mark.parametrize("d", [1, 3072, 10**6])
def test_panels(d):
    for n in (0, 1, 7, 64, 512, 4096, 10**5):
        for coefficients in (False, True):
            width = backend._width(n, d, coefficients)
            assert width % 128 == 0 and width * d * 4 <= max(backend.SLAB, 128 * d * 4)
            if coefficients:
                assert width == 128 or width * n <= backend.COEFFICIENTS


# ---- of the package


@pytest.mark.parametrize("against", ["itself", "others"])
def test_public_functions(against):
    mu, labels, _, weight, margin, other, other_labels, *_ = batch(33, 13, "hinge", n_other=None if against == "itself" else 20)
    answers = {}
    for name in ("triton", "reference"):
        with ltkernels.backend(name):
            inputs = [x.clone().requires_grad_() for x in (mu, weight, margin, *(() if other is None else (other,)))]
            given = dict(zip(("sample_weight", "margin", "other"), inputs[1:], strict=False))
            loss = ltkernels.pcl_loss(inputs[0], labels, form="hinge", other_labels=other_labels, **given)
            loss.backward()
            answers[name] = loss.detach(), ltkernels.pairwise_sqdist(mu, other), *(x.grad for x in inputs)
    for a, b in zip(*answers.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
