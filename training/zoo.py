"""`zoo`: the job of every method on digits, a folder each, and a line each of what came out; what is there is not done again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __main__, card, config

FIGURES = ("acc", "nmi", "ari", "acc_tail", "top1", "top1_few", "fid", "fid_tail", "is", "memorisation")


def main(arguments: Sequence[str]) -> int:
    text = f"Run {', '.join(config.PRESETS)} on digits, each in a folder of its own: what is finished is kept, what was stopped goes on."
    parser = argparse.ArgumentParser(prog="python -m training zoo", description=text)
    parser.add_argument("--preset", choices=("default", "short"), default="default")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="a run folder a method is made in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    shared = ["--preset", options.preset, "--seed", str(options.seed), "--device", options.device]
    shared += ["--no-progress"] * options.no_progress
    calls = {method: [method, *shared, "--out", str(options.out / method)] for method in config.PRESETS}
    for call in calls.values():
        check(call)  # of all, before the first one is run
    for method, call in calls.items():
        if (options.out / method / "metrics.json").is_file():
            continue
        print(f"---- {method}", flush=True)
        started = ["--resume"] if (options.out / method / "config.json").is_file() else []
        if code := __main__.main([*call, *started]):
            print(f"zoo: stopped in {method}; the same command goes on with it", file=sys.stderr)
            return code
    print("\n".join(["", *(told(method, options.out / method) for method in calls)]))
    return 0


def check(call: Sequence[str]) -> None:
    """A run of other settings is neither passed off as this one nor gone on with."""
    method, *rest = call
    settings, _ = __main__.parse(rest, method, type(config.PRESETS[method]["default"]), config.PRESETS[method])
    stored = Path(settings.out) / "config.json"
    if stored.is_file() and (changed := config.differences(config.read(stored, type(settings)), settings)):
        raise ValueError(f"zoo: {settings.out} is a run of other settings ({'; '.join(changed)}); give another --out")


def told(method: str, folder: Path) -> str:
    report = json.loads((folder / "metrics.json").read_text())
    figures = [f"{name} {report[name]:.3g}" for name in FIGURES if isinstance(report.get(name), float)]
    return f"{method:<9}{', '.join(figures)}; {'; '.join(card.facts(report))}; {report['seconds']:.0f} s; {folder / 'card.md'}"
