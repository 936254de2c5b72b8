"""`cite`: BibTeX of what a run should cite. `claims`: what the papers say and what is so, from the table in claims.py."""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from collections.abc import Sequence

from .claims import CLAIMS, VERDICTS, Claim

NUMBERS = {"dgd": "000", "t2h": "001", "diffrop": "002", "diffrc": "003", "cludi": "004"}
# method: kind of entry, key, fields; what the copy of a paper at hand does not state is left out, not guessed
CITATIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "dgd": ("misc", "dgd", {
        "title": "{DGD}: Density Gradient-guided Diffusion for Long-Tailed Clustering",
        "note": "Supplementary material",
    }),
    "t2h": ("misc", "zhang-t2h", {
        "title": "Long-Tailed Diffusion Models with Oriented Calibration",
        "author": "Tianjiao Zhang and Huangjie Zheng and Jiangchao Yao and Xiangfeng Wang and Mingyuan Zhou and Ya Zhang and Yanfeng Wang",
        "howpublished": "Code: \\url{https://github.com/MediaBrain-SJTU/OC_LT}",
    }),
    "diffrop": ("misc", "yan-diffrop", {
        "title": "Training Class-Imbalanced Diffusion Model Via Overlap Optimization",
        "author": "Divin Yan and Lu Qi and Vincent Tao Hu and Ming-Hsuan Yang and Meng Tang",
    }),
    "diffrc": ("article", "fu-diffrc", {
        "title": "Unlocking the Power of Diffusion Probabilistic Models for Long-tailed Recognition via Data Synthesis",
        "author": "Siming Fu and Xiaoxuan He and Haoji Hu",
        "journal": "Pattern Recognition Letters",
        "year": "2023",
        "note": "Manuscript received 28 January 2023",
    }),
    "cludi": ("misc", "uziel-cludi", {
        "title": "Clustering via Self-Supervised Diffusion",
        "author": "Roy Uziel and Irit Chelly and Oren Freifeld and Ari Pakman",
    }),
    "cbdm": ("inproceedings", "qin2023cbdm", {
        "title": "Class-Balancing Diffusion Models",
        "author": "Yiming Qin and Huangjie Zheng and Jiangchao Yao and Mingyuan Zhou and Ya Zhang",
        "booktitle": "Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        "pages": "18434--18443",
        "year": "2023",
    }),
    "ccua": ("misc", "chen2025ccua", {
        "title": "Contrastive Conditional-Unconditional Alignment for Long-tailed Diffusion Model",
        "author": "Fang Chen and Alex Villa and Gongbo Liang and Xiaoyi Lu and Meng Tang",
        "year": "2025",
        "note": "arXiv:2507.09052",
    }),
    "ddpm": ("article", "ho2020ddpm", {
        "title": "Denoising Diffusion Probabilistic Models",
        "author": "Jonathan Ho and Ajay Jain and Pieter Abbeel",
        "journal": "Advances in Neural Information Processing Systems",
        "volume": "33",
        "pages": "6840--6851",
        "year": "2020",
    }),
    "ltkernels": ("misc", "ltkernels", {
        "title": "ltkernels: Kernels and training methods for learning on long-tailed data with diffusion models",
        "author": "{The ltkernels authors}",
        "year": "2026",
    }),
}  # fmt: skip
CITATIONS["analytic"] = CITATIONS["t2h"]  # whose Eq. 5 and 6 the ideal denoiser is


def cite(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training cite", description="BibTeX of what a run should cite.")
    parser.add_argument("method", nargs="+", help=", ".join(CITATIONS))
    methods = parser.parse_args(arguments).method
    if wrong := [name for name in methods if name not in CITATIONS]:
        raise ValueError(f"cite: expected one of {', '.join(CITATIONS)}; got {wrong[0]!r}")
    print("\n\n".join(bibtex(name) for name in methods))
    return 0


def bibtex(method: str) -> str:
    kind, key, fields = CITATIONS[method]
    lines = [f"  {name:<12} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def claims(arguments: Sequence[str]) -> int:
    text = "What the papers claim, and where they are wrong or silent."
    parser = argparse.ArgumentParser(prog="python -m training claims", description=text)
    parser.add_argument("method", nargs="*", help=f"{', '.join(NUMBERS)}; default: all")
    parser.add_argument("--verdict", choices=VERDICTS, action="append", help="these only")
    options = parser.parse_args(arguments)
    if wrong := [name for name in options.method if name not in NUMBERS]:
        raise ValueError(f"claims: expected one of {', '.join(NUMBERS)}; got {wrong[0]!r}")
    for method in options.method or NUMBERS:
        rows = [claim for claim in CLAIMS if claim.method == method and claim.verdict in (options.verdict or VERDICTS)]
        counts = Counter(claim.verdict for claim in rows)
        print(f"{NUMBERS[method]} {method}: {', '.join(f'{counts[name]} {name}' for name in VERDICTS if counts[name]) or 'nothing'}\n")
        print("".join(f"{told(claim)}\n" for claim in rows))
    return 0


def told(claim: Claim) -> str:
    """A few lines: the verdict, where, what is said and what is so, then the evidence, a line each."""
    text = f"{claim.where}: {claim.says}{'. Here: ' if claim.says and claim.here else ''}{claim.here}"
    lines = textwrap.wrap(text, 120, initial_indent=f"{claim.verdict:<9}", subsequent_indent=" " * 9, break_on_hyphens=False)
    return "\n".join([*lines, *(f"{'':<9}- {where}" for where in claim.evidence)])
