"""What a cubin says of its kernels.

The machine code decides: only it shows what the assembler made of a kernel. The PTX is asked for what it promises (launch bounds), which no
cubin keeps in full. Instructions are looked for in loops, since a matrix product that runs once before the loop would be no use."""

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import NamedTuple

ARCHS = (80, 90, 100, 120)
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}  # of a block; a multiprocessor has 1 KiB more, and each of its blocks costs 1
THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}  # of a multiprocessor
REGISTERS = 65536  # of a multiprocessor, and of a block
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
COPIES = ("LDGSTS", "UTMALDG")  # cp.async, TMA


class Image(NamedTuple):
    """One compilation."""

    cubin: bytes
    ptx: str
    labels: Mapping[str, str] = {}  # symbol -> how to call the kernel
    dynamic: Mapping[str, int] = {}  # symbol -> bytes of shared memory that its launch asks for on top of the static ones


class Kernel(NamedTuple):
    source: str  # cuda, triton
    op: str
    name: str
    variant: str
    arch: int
    registers: int
    stack: int  # bytes
    shared: int  # bytes of a block, as launched
    unknown_shared: bool  # dynamic shared memory of which nobody has said how much
    threads: int  # of a block
    promised: int  # blocks of a multiprocessor that the launch bounds ask for
    opcodes: Counter
    looped: Counter  # those in loops
    cubin: str  # digest

    @property
    def spills(self) -> int:
        return count(self.opcodes, ("STL", "LDL"))

    @property
    def blocks(self) -> int:
        """Blocks that fit a multiprocessor."""
        warps = -(-self.threads // 32)
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // 4 * 4 // warps  # given 8 a thread, to 4 warps at once
        by_shared = (SHARED_KIB[self.arch] + 1) * 1024 // (self.shared + 1024)
        return min(by_registers, by_shared, THREADS[self.arch] // (32 * warps))


def count(opcodes: Counter, kinds: Iterable[str]) -> int:
    return sum(number for opcode, number in opcodes.items() if opcode.split(".")[0] in kinds)


# ---- tools


def tool(name: str, toolkit: Path | None = None) -> str | None:
    """nvdisasm or cuobjdump: Triton brings them, not every CUDA toolkit does."""
    triton = find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    folders += [toolkit / "bin"] if toolkit else []
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), shutil.which(name))


def missing_tool(toolkit: Path | None = None) -> str | None:
    absent = [name for name in ("nvdisasm", "cuobjdump") if tool(name, toolkit) is None]
    return f"needs {' and '.join(absent)}, of a CUDA toolkit or of Triton" if absent else None


def missing_triton() -> str | None:
    """Why no Triton kernel can be inspected here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    return "needs a process without TRITON_INTERPRET=1" if os.environ.get("TRITON_INTERPRET") == "1" else missing_tool()


def ask(*command: object) -> str:
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{(run.stderr or run.stdout)[-4000:]}")
    return run.stdout


# ---- machine code


class Instruction(NamedTuple):
    address: int
    guarded: bool  # a predicate decides whether it runs
    opcode: str
    operands: str


def code_of(cubin: bytes) -> dict[str, bytes]:
    """Symbol -> machine code, by the section headers of the ELF file."""
    (table,), (sections, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(sections)]  # name, type, flags, address, offset, size
    strings = headers[names][4]
    code = {}
    for name, *_, offset, size in headers:
        section = cubin[strings + name : cubin.index(b"\0", strings + name)].decode()
        if section.startswith(".text."):
            code[section.removeprefix(".text.")] = cubin[offset : offset + size]
    return code


def parsed(text: str) -> list[Instruction]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*) *([^;]*?)(?:\s{2,}[^;]*|\s*);", text)  # some add remarks
    return [Instruction(int(address, 16), bool(guard), opcode, operands) for address, guard, opcode, operands in lines]


def disassembled(codes: Sequence[bytes], arch: int, nvdisasm: str) -> list[list[Instruction]]:
    """All in one go: nvdisasm takes a third of a second to start. As raw code, since one version reads not every version's cubins."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = ask(nvdisasm, "-c", "-b", f"SM{arch}" + ("a" if arch >= 90 else ""), file.name)
    starts = [sum(map(len, codes[:i])) for i in range(len(codes))]
    found: list[list[Instruction]] = [[] for _ in codes]
    for instruction in parsed(text):
        found[bisect(starts, instruction.address) - 1].append(instruction)
    if [16 * len(listing) for listing in found] != [len(code) for code in codes]:  # 16 bytes an instruction
        raise RuntimeError(f"instructions for sm_{arch} that nvdisasm did not print as expected:\n{text[:2000]}")
    return found


def looped(code: Sequence[Instruction]) -> set[int]:
    """Addresses of the instructions in loops.

    A loop has a branch backwards, and consists of what its target reaches and what reaches the branch. A branch backwards alone makes none:
    rare paths lie behind the kernel's end and return from there."""
    after: dict[int, list[int]] = {}
    before: dict[int, list[int]] = {instruction.address: [] for instruction in code}
    backwards = []
    for instruction, following in zip(code, [*code[1:], None], strict=True):
        kind = instruction.opcode.split(".")[0]
        leaves = kind in ("EXIT", "RET", "BRA") and not instruction.guarded and "," not in instruction.operands
        steps = [following.address] if following and not leaves else []
        if kind == "BRA":
            steps.append(int(instruction.operands.split(", ")[-1], 16))
            if steps[-1] <= instruction.address:
                backwards.append((instruction.address, steps[-1]))
        after[instruction.address] = steps
        for step in steps:
            before[step].append(instruction.address)

    def reached(start: int, edges: Mapping[int, list[int]]) -> set[int]:
        seen, pending = {start}, [start]
        while pending:
            new = [step for step in edges[pending.pop()] if step not in seen]
            seen.update(new)
            pending += new
        return seen

    loops: set[int] = set()
    for branch, target in backwards:
        body = reached(target, after)
        if branch in body:
            loops |= body & reached(branch, before)
    return loops


# ---- kernels


def entries(ptx: str) -> dict[str, tuple[dict[str, int], str]]:
    """Symbol -> directives (the product of their numbers) and body."""
    found = {}
    for symbol, directives, body in re.findall(r"\.entry (\S+?)\s*\([^)]*\)(.*?)^\{(.*?)^\}", ptx, re.DOTALL | re.MULTILINE):
        numbers = re.findall(r"\.(\w+) ([\d, ]+)", directives)
        found[symbol] = {name: prod(map(int, values.split(","))) for name, values in numbers}, body
    return found


def resources(cubin: bytes, cuobjdump: str) -> dict[str, tuple[int, ...]]:
    """Symbol -> registers, bytes of stack, bytes of static shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = ask(cuobjdump, "-res-usage", file.name)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {symbol: tuple(map(int, numbers)) for symbol, *numbers in found}


def kernels(source: str, op: str, variant: str, arch: int, images: Sequence[Image], toolkit: Path | None = None) -> list[Kernel]:
    codes = [code_of(image.cubin) for image in images]
    listings = iter(disassembled([code for symbols in codes for code in symbols.values()], arch, tool("nvdisasm", toolkit)))
    found = []
    for image, symbols in zip(images, codes, strict=True):
        usage, promises = resources(image.cubin, tool("cuobjdump", toolkit)), entries(image.ptx)
        unsized = re.findall(r"\.extern \.shared .* (\w+)\[\]", image.ptx)
        for symbol, listing in zip(symbols, listings, strict=False):
            (registers, stack, static), (directives, body) = usage[symbol], promises[symbol]
            static = max(0, static - 1024) if arch >= 90 else static  # there the driver's KiB is counted, too
            threads = directives.get("reqntid") or directives.get("maxntid") or 1024
            capped = REGISTERS // (directives.get("maxnreg", REGISTERS) * threads)  # what a cap on registers is for
            inside = looped(listing)
            kernel = Kernel(
                source, op, image.labels.get(symbol, symbol), variant, arch, registers, stack,
                shared=static + image.dynamic.get(symbol, 0),
                unknown_shared=symbol not in image.dynamic and any(name in body for name in unsized),
                threads=threads,
                promised=directives.get("minnctapersm") or max(1, capped),
                opcodes=Counter(instruction.opcode for instruction in listing),
                looped=Counter(instruction.opcode for instruction in listing if instruction.address in inside),
                cubin=hashlib.sha256(image.cubin).hexdigest()[:16],
            )  # fmt: skip
            found.append(kernel)
    return found
