"""What the compiled kernels of each op must show, and the calls that bring its Triton kernels about. A new op is one entry of EXPECTED.

What is asked of every kernel is in rules.py: no stack, no spills, and room for what its launch asks for."""

import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from rules import Needs
from sass import ARCHS

from ltkernels.reference import PCL_FORMS

MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # the card's own; mma.sync is HMMA on all


class Op(NamedTuple):
    cuda: Mapping[str, Needs]  # start of the kernel's name -> needs; the first that fits counts
    triton: Mapping[str, Needs]
    variants: Mapping[str, tuple]  # name -> what `call` takes
    call: Callable  # (monkeypatch, arch, *variant) -> a function that runs the Triton backend as on that card


def knn_kde(monkeypatch, arch, d, k, dtype, n_queries, self_index, bound, log_weight, n=100_000):
    backend = importlib.import_module("ltkernels.triton.knn_kde")

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(backend, "_guard", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(backend, "_major", lambda *_: arch // 10)
    monkeypatch.setattr(backend, "_multiprocessors", lambda *_: 132)
    arguments = (
        meta(n_queries, d, dtype=dtype), meta(n, d, dtype=dtype), meta(d), meta(n, d), meta(n),
        meta(n_queries, dtype=torch.int64) if self_index else None, meta(n_queries) if bound else None,
        k, meta(n_queries), meta(n) if log_weight else None,
    )  # fmt: skip
    return lambda: backend.knn_kde(*arguments)


def score_select(monkeypatch, arch, n_rows, n_columns, d, dtype, log_prior):
    backend = importlib.import_module("ltkernels.triton.score_select")

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(backend, "_guard", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(backend, "_multiprocessors", lambda *_: 132)
    x, clean = meta(n_rows, d, dtype=dtype), meta(n_columns, d, dtype=dtype)
    noisy = (x, clean, meta(n_rows), meta(n_rows), meta(n_columns) if log_prior else None)

    def run():
        backend.psel(*noisy)
        backend.psel_sample(*noisy, meta(1, dtype=torch.int64), 2**40)
        backend.psel_mix(meta(n_rows, n_columns), clean)

    return run


def pairwise_pcl(monkeypatch, arch, n_rows, n_partners, d, dtype, form, group, other):
    backend = importlib.import_module("ltkernels.triton.pairwise_pcl")

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def row_of_integers(n):
        return meta(n, dtype=torch.int64)

    monkeypatch.setattr(backend, "_guard", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(backend, "_multiprocessors", lambda *_: 132)
    mu, partners = meta(n_rows, d, dtype=dtype), meta(n_partners, d, dtype=dtype)
    labelled = mu, row_of_integers(n_rows), row_of_integers(n_rows) if group else None
    theirs = partners, row_of_integers(n_partners), row_of_integers(n_partners) if group else None
    margin = meta(n_rows) if PCL_FORMS[form] == "hinge" else None

    def run():
        backend.pair_sqdist(mu, partners)
        for grad in (False, True):
            backend.pcl_rows(
                *labelled, meta(n_rows), margin, *(theirs if other else (None,) * 3), form, 1 / d, grad, grad and other
            )  # fmt: skip

    return run


EXPECTED = {
    "knn_kde": Op(
        cuda={
            # 99 KiB hold one pair of buffers, so sm_120 keeps one block where the registers are for two
            "filter_kernel<1>": Needs({arch: ("HMMA", "LDGSTS") for arch in ARCHS}, dynamic="FilterShared", blocks={120: 1}),
            "filter_kernel<3>": Needs({arch: ("HMMA", "LDGSTS") for arch in ARCHS}, dynamic="FilterShared"),
            "finish_kernel<": Needs(),
            "prepare_kernel<": Needs(),
            "collect_kernel": Needs(),
        },
        triton={
            "_filter<TMA": Needs({arch: (MMA[arch], "UTMALDG") for arch in ARCHS if arch >= 90}),
            "_filter<": Needs({arch: (MMA[arch], "LDGSTS") for arch in ARCHS}),
            **dict.fromkeys(("_rows", "_columns", "_merge", "_select<groups", "_select<bank>", "_select<parts>", "_density"), Needs()),
        },
        # d, k, dtype, queries, self_index, bound, log_weight, points. Rows of 16 bytes go by TMA where there is one, others by pointer; the
        # number of queries decides into how many parts the bank is split
        variants={
            "plain": (64, 16, torch.float32, 4000, False, False, False),
            "everything given": (1024, 64, torch.bfloat16, 4000, True, True, True),
            "few queries": (8, 100, torch.float16, 3, False, True, False),
            "a plane, many queries": (2, 5, torch.float32, 100_000, False, False, False),
            "odd rows, largest k": (39, 256, torch.float16, 4000, True, False, False),
            "odd rows, everything": (39, 256, torch.bfloat16, 4000, True, True, True),
            "so few points that groups are marked": (64, 16, torch.float32, 4000, True, True, False, 2000),
            "marked, largest k": (256, 256, torch.float16, 4000, False, False, True),
        },
        call=knn_kde,
    ),
    "score_select": Op(
        cuda=dict.fromkeys(("score_kernel<", "combine_kernel<", "normalise_kernel<", "mix_kernel<"), Needs()),
        triton={
            "_screen<": Needs({arch: (MMA[arch], "LDGSTS") for arch in ARCHS}),
            "_mix<": Needs({arch: (MMA[arch], "LDGSTS") for arch in ARCHS}),
            **dict.fromkeys(("_reach", "_pack", "_score", "_combine", "_normalise"), Needs()),
        },
        # rows, columns, d, dtype, log_prior. Small batches have tiles of 2 rows, others of 8; small problems are not screened; sizes that
        # 16 divides are read 16 bytes at a time
        variants={
            "a batch": (512, 512, 3072, torch.bfloat16, False),
            "a batch against all": (512, 50_000, 3072, torch.float32, True),
            "odd sizes": (5003, 5003, 13, torch.float16, False),
        },
        call=score_select,
    ),
    "pairwise_pcl": Op(
        cuda=dict.fromkeys(("sqdist_kernel<", "pair_kernel<", "rows_kernel", "pull_kernel<"), Needs()),
        triton={
            **{f"_pairs<{form}>": Needs() for form in PCL_FORMS},
            **dict.fromkeys(("_pack", "_sqdist", "_sums", "_pull"), Needs()),
        },
        # rows, partners, d, dtype, form, group, other. Small batches have tiles of 2 rows, others of 8
        variants={
            "a batch": (512, 512, 3072, torch.bfloat16, 0, False, False),
            "a batch, weighted by time": (128, 128, 12_288, torch.float32, 1, True, False),
            "against all ranks": (512, 4096, 3072, torch.float32, 2, True, True),
            "odd sizes, against others": (5003, 7001, 13, torch.float16, 3, False, True),
            "one coordinate": (5003, 5003, 1, torch.float32, 2, True, False),
        },
        call=pairwise_pcl,
    ),
}
