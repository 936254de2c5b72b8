"""csrc/<op>/<op>_cuda.cu to cubins, by the toolkit and with the flags that setup.py would build with.

It is the file itself that is compiled, torch's headers and all, so that no list of template instances can fall behind it. What runs on the
host is left out."""

import functools
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expected import EXPECTED
from rules import Needs, pattern_of
from sass import ARCHS, Image, Kernel, ask, entries, kernels, missing_tool
from toolkit import ROOT, setup, toolkit


@functools.cache
def missing() -> str | None:
    """Why no CUDA source can be inspected here, or None."""
    return toolkit().reason if toolkit().home is None else missing_tool(toolkit().home)


def known_archs() -> list[int]:
    return [arch for arch in ARCHS if arch in [int(text.replace(".", "")) for text in toolkit().arch_list.removesuffix("+PTX").split(";")]]


@functools.cache
def flags() -> list[str]:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no card
    from torch.utils import cpp_extension

    includes = [f"-I{folder}" for folder in [ROOT, *cpp_extension.include_paths()]]
    return [*setup.NVCC_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS, *includes]


def compiled(text: str, arch: int, options: Sequence[str]) -> tuple[bytes, str]:
    """(cubin, PTX) of a CUDA source."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "unit.cu")
        source.write_text(text)
        keep = ["--keep", "--keep-dir", folder]  # for the PTX
        ask(toolkit().home / "bin/nvcc", "-cubin", f"-arch=sm_{arch}", *options, *keep, source, "-o", f"{folder}/unit.cubin")
        return Path(folder, "unit.cubin").read_bytes(), Path(folder, "unit.ptx").read_text()


def image(text: str, arch: int, options: Sequence[str], table: Mapping[str, Needs], namespace: str) -> Image:
    """The sizes of structs in shared memory are asked of the same compilation, as constants beside the kernels."""
    structs = sorted({needs.dynamic for needs in table.values() if needs.dynamic})
    sizes = [f'extern "C" {{ __constant__ unsigned sizeof_{struct} = sizeof({namespace}::{struct}); }}\n' for struct in structs]
    cubin, ptx = compiled(text + "".join(sizes), arch, options)
    labels = demangled(list(entries(ptx)))
    dynamic = {}
    for symbol, label in labels.items():
        pattern = pattern_of(label, table)
        if pattern is not None and (struct := table[pattern].dynamic):
            dynamic[symbol] = int(re.search(rf" sizeof_{struct} = (\d+);", ptx)[1])
    return Image(cubin, ptx, labels, dynamic)


def demangled(symbols: Sequence[str]) -> dict[str, str]:
    """Symbol -> name and template arguments, without namespaces, types of parameters and the return type that a template's symbol has."""
    texts = ask("c++filt", *symbols).splitlines()
    names = (re.sub(r"^void |\(anonymous namespace\)::|\w+::|\(\w+\)(?=\d)", "", text) for text in texts)
    return {symbol: re.sub(r"\(.*", "", name) for symbol, name in zip(symbols, names, strict=True)}


@functools.cache
def cuda_kernels(op: str) -> dict[int, list[Kernel]]:
    """arch -> kernels."""
    text = f'#include "csrc/{op}/{op}_cuda.cu"\n'

    def inspected(arch):
        return kernels("cuda", op, "", arch, [image(text, arch, options, EXPECTED[op].cuda, f"ltkernels::{op}")], toolkit().home)

    options, archs = flags(), known_archs()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(archs, pool.map(inspected, archs), strict=True))
