"""Runs the variants of planted.cuh and says how each layer took them.

`python planted.py FLAVOUR LIBRARY` prints {layer: {bug: verdict}} as JSON; an empty verdict is a bug that went unnoticed. Every run is
a process of its own, since a bug may take its process along.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import tempfile

import numpy as np
import simt_host

ENTRY = "host_entry_planted.cpp"
BUGS = re.findall(r"^  k(\w+),", (simt_host.HERE / "planted.cuh").read_text(), re.MULTILINE)
LAYERS = {  # flavour -> layer -> schedules
    "plain": {
        "forward": [("forward", 0)],
        "reverse": [("reverse", 0)],
        "random": [("random", seed) for seed in range(3)],
    },
    "asan": {"ASan + UBSan": [("forward", 0)]},
    "tsan": {"TSan": [("forward", 0)]},
}
ROWS, COLUMNS, BLOCKS = 37, 16, 2  # three tiles, the last one ragged, for two blocks


def arrays() -> list[np.ndarray]:
    """x, bias, and room for sums, total, positive, done. Small integers: every order of summation gives the same bits."""
    x = np.random.default_rng(0).integers(-9, 10, size=(ROWS, COLUMNS)).astype(np.float32)
    x[5, 3] = 0  # which one of the bugs writes again
    bias = np.array([1, 2, 3, 4, 5], np.float32)
    return [x, bias, np.zeros((BLOCKS, COLUMNS), np.float32), np.zeros(COLUMNS, np.float32), np.zeros(1, np.int32), np.zeros(1, np.int32)]


def launch(library: ctypes.CDLL, bug: int, given: list[np.ndarray]) -> str:
    """The error of the launch; empty if there was none."""
    x, bias, *rest = (ctypes.c_void_p(a.ctypes.data) for a in given)
    return library.simt_error().decode() if library.planted_run(bug, BLOCKS, x, bias, ROWS, *rest) else ""


def wrong(given: list[np.ndarray]) -> str:
    x, bias, sums, total, positive, done = given
    tile = np.arange(ROWS) // 16
    right = (
        np.array_equal(sums, [x[tile % BLOCKS == b].sum(0) for b in range(BLOCKS)])
        and np.array_equal(total, x.sum(0) + bias[:4].sum())
        and positive[0] == (x > 0).sum()
        and done[0] == BLOCKS
    )
    return "" if right else "wrong numbers"


def verdict(library: ctypes.CDLL, bug: int, schedule: tuple[str, int]) -> str:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            simt_host.schedule(library, *schedule)
            given = arrays()
            said = launch(library, bug, given) or wrong(given)
            os.write(1, f"\nverdict: {said}\n".encode())
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        text = output.read().decode(errors="replace")
    said = re.search(r"^verdict: (.*)$", text, re.MULTILINE)[1] if status == 0 else f"signal {os.WTERMSIG(status)}"
    if status == 0 and said not in ("", "wrong numbers"):
        return said  # the runtime's own words: a launch that it ended is none to look for races in
    for pattern in (r"ThreadSanitizer: (data race)", r"ERROR: AddressSanitizer: ([\w-]+)", r"runtime error: (.*?)(?:,| for|$)"):
        if found := re.search(pattern, text, re.MULTILINE):
            return found[1]
    return said


def verdicts(flavour: str, library: ctypes.CDLL) -> dict[str, dict[str, str]]:
    return {
        layer: {bug: next(filter(None, (verdict(library, i, s) for s in schedules)), "") for i, bug in enumerate(BUGS)}
        for layer, schedules in LAYERS[flavour].items()
    }


def every_layer() -> dict[str, dict[str, str]]:
    """{layer: {bug: verdict}} of all flavours."""
    found = {}
    for flavour in LAYERS:
        done = simt_host.python(flavour, "planted.py", flavour, simt_host.build(ENTRY, flavour))
        if done.returncode:
            raise RuntimeError(done.stderr)
        found |= json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(verdicts(sys.argv[1], simt_host.load(sys.argv[2]))))
