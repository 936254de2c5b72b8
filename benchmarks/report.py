"""The tables, pictures and growth fits of README's section "Measured on a CPU", from one run of the benchmarks.

    pytest benchmarks --benchmark-only --benchmark-json runs/benchmarks.json
    python benchmarks/report.py runs/benchmarks.json

What stands between the two marks in README.md is replaced; growth.png and arithmetic.png beside this file, too. Times are medians, as
ratios to the first column of the row, which is the bare matrix product where the group has one.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MARKS = "<!-- benchmarks/report.py -->", "<!-- end of benchmarks/report.py -->"
PRODUCT = "product only"
TABLES = {  # start of the groups' names -> heading; which of ours the last columns are about; what its error is of
    "knn_kde_grad ": ("density and score, k = 64", "ltkernels", "log p"),
    "batch ": ("selection in a batch", "score_select", "the log-normaliser"),
    "set ": ("selection in a set", "posterior_mean", "the mean"),
    "pcl ": ("loss with gradient, distances", "pcl_loss", "the gradient, relative"),
}


def results(path: Path) -> tuple[dict[str, dict[str, dict]], str]:
    """group -> name -> {"time" in ms, "error", "memory" in MB}, and what the machine is."""
    run = json.loads(path.read_text())
    groups: dict[str, dict[str, dict]] = {}
    for entry in run["benchmarks"]:
        name = entry["params"]["name"]
        info = entry["extra_info"]
        found = {"time": 1e3 * entry["stats"]["median"], "memory": info.get("peak_mb"), "error": info.get("max_error", info.get("error"))}
        groups.setdefault(entry["group"], {})[name] = found
    threads = re.search(r"(\d+) threads", entry["group"])[1]
    return groups, f"{run['machine_info']['cpu']['brand_raw']}, {threads} threads"


def number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 2 else f"{x:.2f}"


def table(groups: dict[str, dict[str, dict]], prefix: str, heading: str, ours: str, what: str) -> list[str]:
    chosen = {group.removeprefix(prefix): entries for group, entries in groups.items() if group.startswith(prefix)}
    names = list(dict.fromkeys(name for entries in chosen.values() for name in entries if name != PRODUCT))
    lines = [f"| {heading} | {PRODUCT}, ms | {' | '.join(names)} | {ours}: MB | error of {what} |", "|---" * (len(names) + 4) + "|"]
    for group, entries in chosen.items():
        base = entries.get(PRODUCT)
        unit = (base or entries[ours])["time"]
        cells = [number(entries[name]["time"] / unit) if name in entries else "" for name in names]
        if base is None:
            cells[names.index(ours)] = f"1 ({unit:.2g} ms)"
        label = re.sub(r",? float32|,? k=64|,? cpu.*", "", group)
        memory, error = entries[ours]["memory"], entries[ours]["error"]
        lines.append(f"| {label} | {number(base and unit)} | {' | '.join(cells)} | {number(memory)} | {error:.0e} |")
    return lines


def series(groups: dict[str, dict[str, dict]], name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """N, and time or memory of one implementation."""
    points = [(int(re.search(r"N=(\d+)", group)[1]), entries[name][key]) for group, entries in groups.items() if name in entries]
    n, values = zip(*sorted(points), strict=True)
    return np.array(n, float), np.array(values, float)


def growth(groups: dict[str, dict[str, dict]]) -> list[str]:
    """Draws growth.png; the fits."""
    chosen = {group: entries for group, entries in groups.items() if group.startswith("growth ")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    names = dict.fromkeys(name for entries in chosen.values() for name in entries)
    for name in names:
        n, time = series(chosen, name, "time")
        axes[0].loglog(n, time, "--" if name == PRODUCT else "o-", color="grey" if name == PRODUCT else None, label=name)
        if name != PRODUCT:
            axes[1].loglog(*series(chosen, name, "memory"), "o-", label=name)
    n, time = series(chosen, "ltkernels", "time")
    _, product = series(chosen, PRODUCT, "time")
    rate = product[-1] / series(chosen, PRODUCT, "time")[0][-1] ** 2
    axes[0].loglog(n, rate * n**2 / 2, ":", color="grey", label="half the product")
    for axis, label in zip(axes, ("time of leave-one-out density and score, ms", "memory beyond the inputs, MB"), strict=True):
        axis.set(xlabel="points of 64 dimensions, k = 64", ylabel=label)
        axis.set_xticks(n, [f"{size / 1000:g}k" for size in n])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "benchmarks/growth.png", dpi=110)
    plt.close(figure)
    _, memory = series(chosen, "ltkernels", "memory")
    slope, extra = np.polyfit(n, memory, 1)
    exponent = np.polyfit(np.log(n), np.log(time), 1)[0]
    steps = ", ".join(f"{x:.2f}" for x in np.diff(np.log(time)) / np.diff(np.log(n)))
    return [
        f"From {n[0]:.0f} to {n[-1]:.0f} points of 64 dimensions time grows as N^{exponent:.2f} (from one size to the next {steps}),",
        f"memory by {slope * 2**20:.0f} bytes a point and {extra:.0f} MB; the bank is 260 of these bytes, the answer 1032.",
    ]


def arithmetic(groups: dict[str, dict[str, dict]]) -> None:
    """Draws arithmetic.png."""
    (entries,) = (entries for group, entries in groups.items() if group.startswith("arithmetic "))
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name, entry in entries.items():
        axis.loglog(entry["time"], entry["error"], "o")
        axis.annotate(name, (entry["time"], entry["error"]), (7, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set(xlabel="time, ms", ylabel="largest error of log p", title="1000 queries in 10000 points, tight clusters")
    axis.set_xlim(right=1e3)
    figure.savefig(ROOT / "benchmarks/arithmetic.png", dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default: %(default)s")
    args = parser.parse_args(arguments)
    groups, machine = results(args.json)
    lines = [f"{machine}; ratios of medians of one run:", ""]
    for prefix, columns in TABLES.items():
        lines += [*table(groups, prefix, *columns), ""]
    lines += growth(groups) + ["", "![Time and memory against the number of points](benchmarks/growth.png)", ""]
    arithmetic(groups)
    lines += ["![Error against time on tight clusters](benchmarks/arithmetic.png)"]
    text = args.readme.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    args.readme.write_text(text[: begin + len(MARKS[0])] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
