"""What only a card can show of the ops on cuda and triton: streams, CUDA graphs, no waiting, and more numbers than 32 bits count.

    pytest -m gpu tests/test_on_a_card.py
"""

import warnings

import pytest
import torch
from ops import OPS as STEMS

from ltkernels import backends, knn, score_select

pytestmark = pytest.mark.gpu
OPS, D = torch.ops.ltkernels, 96


def of_levels(x, y):
    scale = torch.full((len(x),), 0.7, device="cuda")
    return x, y, scale, scale + 5, None


def of_labels(x):
    labels = torch.arange(len(x), device="cuda") % 3
    weight = torch.ones(len(x), device="cuda")
    return (x, labels, None, weight, None, None, None, None, 0, 1 / D, True, False)


CALLS = {  # schema's name -> of x (B, D), y (N, D) and what OPS.bank_prepare says of y
    "knn": lambda x, y, bank: OPS.knn(x, y, *bank, None, None, 16),
    "knn_kde": lambda x, y, bank: OPS.knn_kde(x, y, *bank, None, None, 16, torch.full((len(x),), 9.0, device="cuda"), None),
    "psel": lambda x, y, _: OPS.psel(*of_levels(x, y)),
    "psel_sample": lambda x, y, _: OPS.psel_sample(*of_levels(x, y), torch.full((1,), 7, device="cuda"), 0),
    "psel_mix": lambda x, y, _: (OPS.psel_mix(torch.softmax(x @ y.T, 1), y),),
    "pair_sqdist": lambda x, y, _: (OPS.pair_sqdist(x, y),),
    "pcl_rows": lambda x, y, _: OPS.pcl_rows(*of_labels(x)),
}


@pytest.fixture(params=["cuda", "triton"])
def card(request):
    with backends.backend(request.param):
        yield request.param


def rows(seed, count):
    return torch.randn(count, D, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def same_bits(answers, expected):
    return all(torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1)) for a, b in zip(answers, expected, strict=True) if a.numel())


def test_every_op_is_here():
    assert set(CALLS) == set(backends._STEMS) and set(backends._STEMS.values()) == set(STEMS)


@pytest.fixture
def inputs():
    x, y = rows(1, 300), rows(2, 5000)
    return x, y, OPS.bank_prepare(y)


@pytest.mark.parametrize("op", CALLS)
def test_on_another_stream(op, card, inputs):
    """The answer waits for what its own stream does before it, a long sleep and the making of x, and for nothing else."""
    expected, x, stream = CALLS[op](*inputs), torch.zeros(300, D, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(inputs[0])
        answer = CALLS[op](x, *inputs[1:])
    stream.synchronize()
    assert same_bits(answer, expected)


@pytest.mark.parametrize("op", CALLS)
def test_in_a_cuda_graph(op, card, inputs):
    """Captured with one x, replayed with another: the bits of an ordinary call."""
    x, y, bank = inputs
    CALLS[op](x, y, bank)  # compiles; a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = CALLS[op](x, y, bank)
    x.copy_(rows(3, 300))
    for _ in range(2):
        graph.replay()
    assert same_bits(answer, CALLS[op](rows(3, 300), y, bank))


@pytest.mark.parametrize("op", CALLS)
def test_nothing_waits_for_the_card(op, card, inputs):
    CALLS[op](*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[op](*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_training_waits_once(card):
    """For what has to be known of the values of all its arguments."""
    x, level = rows(1, 64), torch.full((64,), 0.7, device="cuda")
    labels, counts = torch.arange(64, device="cuda") % 3, torch.tensor([9, 5, 1], device="cuda")
    own = torch.arange(64, device="cuda")
    options = {"gate": "t2h", "labels": labels, "class_counts": counts, "self_index": own, "seed": 3}
    score_select(x, x, level, level, **options)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score_select(x, x, level, level, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1


@pytest.mark.large
def test_a_bank_of_more_numbers_than_32_bits_count(card):
    """2^31 of them and 2^26 more; the nearest rows are planted on both sides of the limit and at the end."""
    n, d = 2**24 + 2**19, 128
    points = torch.randn(n, d, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    queries = points[torch.tensor([0, 2**23, 2**24 - 1, 2**24, 2**24 + 1, n - 1], device="cuda")] + 0.01
    answer = knn(queries, points, 8)
    exact, index = torch.full((len(queries), 8), torch.inf, dtype=torch.float64, device="cuda"), torch.zeros_like(answer.index)
    for start in range(0, n, 2**20):
        part = points[start : start + 2**20].double()
        sqdist = torch.stack([(part - query).square().sum(1) for query in queries.double()])
        near = sqdist.topk(8, largest=False)
        exact, order = torch.cat([exact, near.values], 1).sort(1)
        index = torch.cat([index, start + near.indices], 1).gather(1, order)[:, :8]
        exact = exact[:, :8]
    assert torch.equal(answer.index, index)
    torch.testing.assert_close(answer.sqdist.double(), exact, rtol=1e-6, atol=0)
