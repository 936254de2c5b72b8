"""python -m tests.aot: one table of all kernels as compiled; exit status 1 if one breaks a rule."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # modules go by their bare names, as pytest has them
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cubins
from expected import EXPECTED
from rules import Needs, faults, unmatched, violations
from sass import COPIES, MATRIX, SHARED_KIB, Kernel, count, missing_triton


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Triton prints the whole program, from C++ too, when a kernel does not compile; the exception says enough."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        saved = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class Part(NamedTuple):
    tools: str
    kernels: list[Kernel]
    faults: list[str]  # other than those of a kernel


def cuda() -> Part:
    if reason := cubins.missing():
        return Part(f"no CUDA: {reason}", [], [])
    part = Part(f"nvcc {cubins.toolkit().version}, {cubins.toolkit().reason}", [], [])
    for op in EXPECTED:
        kernels = [kernel for compiled in cubins.cuda_kernels(op).values() for kernel in compiled]
        part.kernels.extend(kernels)
        part.faults.extend(f"cuda {op}: no kernel {name}" for name in unmatched(kernels, EXPECTED[op].cuda))
    return part


def triton() -> Part:
    if reason := missing_triton():
        return Part(f"no Triton: {reason}", [], [])
    import launches

    part = Part(f"Triton {launches.triton.__version__}", [], [])
    for op in EXPECTED:
        kernels = {}
        for variant in EXPECTED[op].variants:
            with quiet():
                compiled = launches.triton_kernels(op, variant)
            for arch, (found, failed) in compiled.items():
                for kernel in found:
                    kernels.setdefault((kernel.cubin, arch), kernel)  # what two variants launch is listed once
                part.faults.extend(f"{error} ({variant})" for error in failed)
        part.kernels.extend(kernels.values())
        part.faults.extend(f"triton {op}: no kernel {name}" for name in unmatched(kernels.values(), EXPECTED[op].triton))
    return part


PARTS = {"cuda": cuda, "triton": triton}


def table_of(kernel: Kernel) -> Mapping[str, Needs]:
    return getattr(EXPECTED[kernel.op], kernel.source)


def row(kernel: Kernel) -> dict[str, object]:
    return {
        "source": kernel.source,
        "op": kernel.op,
        "kernel": kernel.name,
        "variant": kernel.variant,
        "arch": f"sm_{kernel.arch}",
        "registers": kernel.registers,
        "stack": kernel.stack,
        "spills": kernel.spills,
        "shared KiB": f"{kernel.shared / 1024:.1f} of {SHARED_KIB[kernel.arch]}",
        "blocks": kernel.blocks,
        "matrix": count(kernel.looped, MATRIX),
        "copies": count(kernel.looped, COPIES),
        "verdict": ", ".join(violations(kernel, table_of(kernel))) or "ok",
    }


def printed(rows: list[dict[str, object]]) -> None:
    lines = [list(rows[0]), *([str(value) for value in line.values()] for line in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def with_version(version: str, folder: str | None, arguments: list[str]) -> int:
    """The Triton part in a process that finds this version of Triton first."""
    with tempfile.TemporaryDirectory() as temporary:
        target = folder or temporary
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", target, f"triton=={version}"]
        if not list(Path(target).glob(f"triton-{version}*.dist-info")):
            subprocess.run(command, check=True)
        path = os.pathsep.join(filter(None, [target, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "tests.aot", "--only", "triton", *arguments]
        return subprocess.run(command, cwd=cubins.ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table there, too")
    parser.add_argument("--only", choices=PARTS, help="one part only")
    parser.add_argument("--triton", metavar="VERSION", help="the Triton part with another version of Triton, installed by pip")
    parser.add_argument("--folder", help="with --triton: where to install it and keep it; a temporary folder otherwise")
    options = parser.parse_args(arguments)
    if options.triton:
        return with_version(options.triton, options.folder, ["--json", str(options.json.resolve())] if options.json else [])
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):  # empty: see conftest.py
        parts = [part() for name, part in PARTS.items() if options.only in (None, name)]
    kernels = [kernel for part in parts for kernel in part.kernels]
    wrong = [fault for kernel in kernels for fault in faults([kernel], table_of(kernel))]
    wrong += [fault for part in parts for fault in part.faults]
    rows = [row(kernel) for kernel in kernels]
    tools = "; ".join(part.tools for part in parts)
    print(tools)
    if rows:
        printed(rows)
    print(f"{len(rows)} kernels, {len(wrong)} faults. matrix, copies: tensor-core instructions and cp.async or TMA in loops")
    for fault in wrong:
        print(fault)
    if options.json:
        options.json.write_text(json.dumps({"tools": tools, "kernels": rows, "faults": wrong}, indent=1))
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
