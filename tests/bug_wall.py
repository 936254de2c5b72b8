"""Draws tests/bug_wall.png: which layer notices which of the bugs planted in tests/simt/planted.cuh. `python tests/bug_wall.py`"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "simt"), str(HERE / "ptx")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import nvcc_ptx  # noqa: E402
import planted  # noqa: E402
import simt_host  # noqa: E402
from test_ptx_kernels import verdict  # noqa: E402

SHORT = {  # the verdict's words -> a cell's
    "wrong numbers": "numbers", "data race": "race", "overflow": "bounds", "out of bounds": "bounds", "misaligned": "alignment",
    "signal": "crash", "shared struct": "launch", "barrier": "barrier", "bar.": "barrier", "deadlock": "barrier", "mask": "mask",
    "exited": "barrier", "under way": "copy",
}  # fmt: skip


def verdicts() -> dict[str, dict[str, str]]:
    """layer -> bug -> what it said, empty for a bug that went unnoticed."""
    found = planted.every_layer()
    module, library = nvcc_ptx.module(planted.ENTRY, 80), simt_host.load(simt_host.build(planted.ENTRY))
    found["nvcc's PTX"] = {bug: verdict(module, library, bug) for bug in planted.BUGS}
    return found


def words(bug: str) -> str:
    return "".join(f" {c.lower()}" if c.isupper() else c for c in bug).strip()


def draw(found: dict[str, dict[str, str]], path: Path) -> None:
    bugs = planted.BUGS
    figure, axes = plt.subplots(figsize=(8.5, 0.36 * len(bugs) + 1.1), layout="constrained")
    for column, said in enumerate(found.values()):
        for row, bug in enumerate(bugs):
            short = next((short for key, short in SHORT.items() if key in said[bug]), said[bug])
            caught = bool(said[bug])
            axes.add_patch(plt.Rectangle((column, row), 0.94, 0.9, color="#2a7f62" if caught else "#eceff1"))
            axes.text(column + 0.47, row + 0.47, short, color="white" if caught else "#90a4ae", ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, len(found)), ylim=(len(bugs), 0))
    axes.set_xticks([i + 0.47 for i in range(len(found))], found, fontsize=9)
    axes.set_yticks([i + 0.45 for i in range(len(bugs))], ["no bug" if bug == "None" else words(bug) for bug in bugs], fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(verdicts(), HERE / "bug_wall.png")
