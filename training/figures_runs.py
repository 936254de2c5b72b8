"""What the figures of image methods share: parts that leave files, and rows of tables that are runs of their own.

A finished run is not made again, one that was cut short goes on, one made with other settings is refused: parts share rows, and several
processes may make a seed each before a last one with all seeds collects them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from . import checkpoint, config, evaluate, plots, run_images
from .config import ImageConfig
from .figures import heading, row

SHOWN = ("fid", "fid_head", "fid_med", "fid_tail", "memorisation")  # of a table's picture


def write_parts(
    parts: Sequence[str], make: Mapping[str, Callable[[], dict]], texts: Mapping[str, Callable[[dict], str]], folder: Path
) -> str:
    """PART.json of each of `parts`, and figures.md of all that are there; the text of `parts` as markdown."""
    for part in parts:
        checkpoint.write_json(folder / f"{part}.json", make[part]())
    written = {part: text(json.loads(file.read_text())) for part, text in texts.items() if (file := folder / f"{part}.json").exists()}
    with checkpoint.replacing(folder / "figures.md") as temporary:
        temporary.write_text("\n".join(written.values()))
    return "\n".join(text for part, text in written.items() if part in parts)


def configured(method: str, settings: ImageConfig, **changes) -> ImageConfig:
    """The settings of a run of `method`: what `settings` says and the method knows, with `changes`."""
    kind = config.IMAGE_CONFIGS[method]
    known = [item.name for item in dataclasses.fields(kind) if hasattr(settings, item.name)]
    return kind(**{**{name: getattr(settings, name) for name in known}, **changes})


@dataclass(frozen=True, eq=False)
class Rows:
    """Runs in `folder`, one for each row and seed."""

    command: str  # figures METHOD
    methods: Mapping[str, tuple[str, dict]]  # row: method, what makes it that row
    names: Mapping[str, str]  # of the rows in tables and pictures
    settings: ImageConfig
    preset: ImageConfig
    folder: Path

    def path(self, name: str, seed: int, suffix: str = "") -> Path:
        return self.folder / f"{name}-{seed}{suffix}"

    def run(self, name: str, seed: int, suffix: str = "", evaluate: bool = True, **changes) -> dict:
        """metrics.json of the run of one row, from the disk if it is there."""
        method, own = self.methods[name]
        out = self.path(name, seed, suffix)
        here = {"seed": seed, "out": str(out), "resume": (out / "config.json").exists(), "overwrite": False, "evaluate": evaluate}
        one = configured(method, self.settings, **{**own, **changes}, **here)
        finished = out / "metrics.json"
        if not finished.exists():
            return run_images.images(method, one, configured(method, self.preset))
        changed = config.differences(config.read(out / "config.json", type(one)), one)
        if changed:
            raise ValueError(f"{self.command}: {out} was made with other settings ({'; '.join(changed)}); give another --out")
        return json.loads(finished.read_text())

    def table(self, part: str, names: Sequence[str], seeds: Sequence[int], title: str) -> dict:
        """The summary of rows `names`, and their picture."""
        jobs = [(name, seed, lambda name=name, seed=seed: self.run(name, seed)) for seed in seeds for name in names]
        results = run_all(self.command, part, jobs, self.settings.progress)
        runs = {name: list(own.values()) for name, own in results.items()}
        summary = {
            "command": f"python -m training {self.command} --parts {part}", **about(results, self.settings, seeds),
            "table": {name: {figure: [one[figure] for one in own] for figure in evaluate.SCORES} for name, own in runs.items()},
            "class_fid": {name: [one["class_fid"] for one in own] for name, own in runs.items()},
            "seconds": {name: [one["seconds"] for one in own] for name, own in runs.items()},
        }  # fmt: skip
        rows = {self.names[name]: {figure: own[figure] for figure in SHOWN} for name, own in summary["table"].items()}
        plots.comparison(self.folder / f"{part}.png", rows, title=f"{title}, features: {summary['features']}")
        return summary

    def table_text(self, summary: dict) -> str:
        lines = [note(summary), *heading(summary["settings"]["dataset"], *evaluate.SCORES)]
        table = summary["table"].items()
        return "\n".join([*lines, *(row(self.names[name], [own[figure] for figure in evaluate.SCORES]) for name, own in table)]) + "\n"


def run_all(command: str, part: str, jobs: Sequence[tuple[str, int, Callable[[], dict]]], progress: bool) -> dict[str, dict[int, dict]]:
    """results[name][seed] of jobs (name, seed, what answers a result); refuses figures of different features in one table."""
    results: dict[str, dict[int, dict]] = {}
    with tqdm(jobs, desc=part, disable=not progress) as bar:
        for name, seed, run in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            results.setdefault(name, {})[seed] = run()
    features = {result["features"] for own in results.values() for result in own.values()}
    if len(features) > 1:
        raise ValueError(f"{command}: the runs of part {part} were evaluated with different features ({', '.join(sorted(features))})")
    return results


def panels(
    results: Mapping[str, Mapping[int, dict]], points: Mapping[str, Sequence], seeds: Sequence[int], figures: Sequence[str]
) -> dict[str, dict[str, dict]]:
    """panels[figure][line][x] = one value a seed, of results["line, x"] and points[line] = all x."""
    return {
        figure: {line: {x: [results[f"{line}, {x}"][seed][figure] for seed in seeds] for x in own} for line, own in points.items()}
        for figure in figures
    }


def about(results: Mapping[str, Mapping[int, dict]], settings: ImageConfig, seeds: Sequence[int]) -> dict:
    """What figures can only be read with."""
    some = next(iter(next(iter(results.values())).values()))
    shared = {key: some[key] for key in ("features", "n", "reference", "guidance")}
    return {"seeds": list(seeds), "settings": config.identity(settings), **shared}


def note(summary: dict) -> str:
    seeds = ", ".join(map(str, summary["seeds"]))
    return (
        f"Mean ± standard deviation over seeds {seeds}; {summary['n']} samples, guidance {summary['guidance']:g}, "
        f"features: {summary['features']}, reference: {summary['reference']}.\n"
    )


def panels_text(summary: dict, title: str) -> str:
    """A table for each figure of a summary's panels."""
    lines = []
    for figure, panel in summary["panels"].items():
        lines += heading(f"{figure}, {title}", *map(str, next(iter(panel.values()))))
        lines += [row(name, list(own.values())) for name, own in panel.items()] + [""]
    return "\n".join(lines)
