"""The tables, pictures and growth fits of README's section "Measured on a CPU", from one run of the benchmarks.

    pytest benchmarks --benchmark-only --benchmark-json runs/benchmarks.json
    python benchmarks/report.py runs/benchmarks.json

What stands between the two marks in README.md is replaced; growth.png and arithmetic.png beside this file, too. Times are medians, as
ratios to the bare matrix product where the group has one and else to ours.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SEARCHES = """self: leave-one-out, from points to answer, all that is prepared included. Q: other points are searched for, in an index made
before where there is one, as ltkernels' `Bank`; "plain tensor" is ltkernels without. Gaussian if not said otherwise; kd_tree and
ball_tree are scikit-learn's."""
MARKS = "<!-- benchmarks/report.py -->", "<!-- end of benchmarks/report.py -->"
PRODUCT = "product only"
TABLES = {  # start of the groups' names -> heading; which of ours the last columns are about; what its error is of
    "knn_kde_grad ": ("density and score, k = 64", "ltkernels", "log p"),
    "few dimensions ": ("density and score in few dimensions, k = 64", "ltkernels", "log p"),
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
        found = {
            "time": 1e3 * info.get("seconds", entry["stats"]["median"]),
            "memory": info.get("peak_mb"),
            "error": info.get("max_error", info.get("error")),
        }
        groups.setdefault(entry["group"], {})[name] = found
    threads = re.search(r"(\d+) threads", entry["group"])[1]
    return groups, f"{run['machine_info']['cpu']['brand_raw']}, {threads} threads"


def number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 2 else f"{x:.2f}"


def table(groups: dict[str, dict[str, dict]], prefix: str, heading: str, ours: str, what: str) -> list[str]:
    chosen = {group.removeprefix(prefix): entries for group, entries in groups.items() if group.startswith(prefix)}
    names = dict.fromkeys(name for entries in chosen.values() for name in entries if name != PRODUCT)
    names = sorted(names, key=lambda name: not name.startswith(ours))  # the others as they come
    first = [f"{PRODUCT}, ms"] if any(PRODUCT in entries for entries in chosen.values()) else []
    heads = [heading, *first, *names, f"{ours}: MB", f"error of {what}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for group, entries in chosen.items():
        base = entries.get(PRODUCT)
        unit = (base or entries[ours])["time"]
        cells = [number(entries[name]["time"] / unit) if name in entries else "" for name in names]
        if base is None:
            cells[names.index(ours)] = f"1 ({number(unit)} ms)"
        label = re.sub(r",? float32|,? k=64|,? cpu.*", "", group)
        memory, error = entries[ours]["memory"], entries[ours]["error"]
        cells = [label, *[number(base and unit) for _ in first], *cells, number(memory), f"{error:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def series(groups: dict[str, dict[str, dict]], name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """N, and time or memory of one implementation."""
    points = [(int(re.search(r"N=(\d+)", group)[1]), entries[name][key]) for group, entries in groups.items() if name in entries]
    n, values = zip(*sorted(points), strict=True)
    return np.array(n, float), np.array(values, float)


def growth(groups: dict[str, dict[str, dict]]) -> list[str]:
    """Draws growth.png, a row of panels for each number of dimensions; the fits."""
    self_joins = {}
    for group, entries in groups.items():
        if found := re.match(r"(?:growth|knn_kde_grad) self N=\d+ d=(\d+) k=", group):
            self_joins.setdefault(int(found[1]), {})[group] = entries
    figure, rows = plt.subplots(len(self_joins), 2, figsize=(10, 3.6 * len(self_joins)), layout="constrained", squeeze=False)
    lines = []
    for (d, chosen), axes in zip(sorted(self_joins.items()), rows, strict=True):
        draw_growth(chosen, d, axes)
        n, time = series(chosen, "ltkernels", "time")
        slope, extra = np.polyfit(n, series(chosen, "ltkernels", "memory")[1], 1)
        exponent = np.polyfit(np.log(n), np.log(time), 1)[0]
        steps = ", ".join(f"{x:.2f}" for x in np.diff(np.log(time)) / np.diff(np.log(n)))
        lines += [
            f"From {n[0]:.0f} to {n[-1]:.0f} points of {d} dimensions time grows as N^{exponent:.2f} (from one size to the next {steps}),",
            f"memory by {slope * 2**20:.0f} bytes a point and {extra:.0f} MB;",
            f"the bank is {4 * d + 4} of these bytes, the answer {4 * d + 776}.",
            "",
        ]
    figure.savefig(ROOT / "benchmarks/growth.png", dpi=110)
    plt.close(figure)
    return lines


def draw_growth(chosen: dict[str, dict[str, dict]], d: int, axes) -> None:
    """Time and memory of all that are timed at more than one size; half the product, continued."""
    names = [name for name, times in Counter(name for entries in chosen.values() for name in entries).items() if times > 1]
    for name in names:
        n, time = series(chosen, name, "time")
        if name == PRODUCT:
            sizes = series(chosen, "ltkernels", "time")[0]
            axes[0].loglog(n, time, "--", color="grey", label=name)
            axes[0].loglog(sizes, time[-1] / n[-1] ** 2 * sizes**2 / 2, ":", color="grey", label="half the product")
        else:
            axes[0].loglog(n, time, "o-", label=name)
            axes[1].loglog(*series(chosen, name, "memory"), "o-", label=name)
    for axis, label in zip(axes, ("time of leave-one-out density and score, ms", "memory beyond the inputs, MB"), strict=True):
        axis.set(xlabel=f"points of {d} dimensions, k = 64", ylabel=label)
        sizes = series(chosen, "ltkernels", "time")[0]
        axis.set_xticks(sizes, [f"{size / 1000:g}k" for size in sizes])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_yscale("log", base=2)
    axes[1].yaxis.set_major_formatter("{x:g}")


def tiny(groups: dict[str, dict[str, dict]]) -> list[str]:
    """Microseconds of every op on a few rows, and the import."""
    chosen = {group.split(" cpu")[0].removeprefix("tiny "): entries for group, entries in groups.items() if group.startswith("tiny ")}
    lines = [f"| forward of a tiny input, us | {' | '.join(chosen)} |", "|---" * (len(chosen) + 1) + "|"]
    for name in next(iter(chosen.values())):
        lines.append(f"| {name} | {' | '.join(number(1e3 * entries[name]['time']) for entries in chosen.values())} |")
    (imported,) = (entries["import"] for group, entries in groups.items() if group.startswith("import "))
    return [*lines, "", f"`import ltkernels` takes {imported['time']:.0f} ms more than `import torch`."]


def arithmetic(groups: dict[str, dict[str, dict]]) -> None:
    """Draws arithmetic.png."""
    (entries,) = (entries for group, entries in groups.items() if group.startswith("arithmetic "))
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name, entry in entries.items():
        axis.loglog(entry["time"], entry["error"], "o")
        axis.annotate(name, (entry["time"], entry["error"]), (7, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set(xlabel="time, ms", ylabel="largest error of log p", title="1000 queries in 10000 points, tight clusters")
    axis.set_xlim(10, 1e3)
    axis.set_xticks([10, 100, 1000], ["10", "100", "1000"])
    axis.tick_params(axis="x", which="minor", labelbottom=False)
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
        if prefix == "few dimensions ":
            lines += [SEARCHES, ""]
    lines += [*tiny(groups), ""]
    lines += [*growth(groups), "![Time and memory against the number of points](benchmarks/growth.png)", ""]
    arithmetic(groups)
    lines += ["![Error against time on tight clusters](benchmarks/arithmetic.png)"]
    text = args.readme.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    args.readme.write_text(text[: begin + len(MARKS[0])] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
