"""What is asked of a compiled kernel: of each the same, and of some what a table of Needs says."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sass import REGISTERS, SHARED_KIB, Kernel, count


class Needs(NamedTuple):
    looped: Mapping[int, Sequence[str]] = {}  # arch -> opcodes that must be in a loop
    dynamic: str = ""  # the struct in dynamic shared memory
    blocks: Mapping[int, int] = {}  # arch -> blocks a multiprocessor, where shared memory does not allow what the launch bounds promise


def pattern_of(name: str, table: Iterable[str]) -> str | None:
    """The first that the kernel's name starts with."""
    return next((pattern for pattern in table if name.startswith(pattern)), None)


def violations(kernel: Kernel, table: Mapping[str, Needs]) -> list[str]:
    pattern = pattern_of(kernel.name, table)
    needs = Needs() if pattern is None else table[pattern]
    limit, wanted = SHARED_KIB[kernel.arch], needs.blocks.get(kernel.arch, kernel.promised)
    rules = {
        "the table does not know it": pattern is None,
        f"{kernel.stack} B of stack": kernel.stack > 0,
        f"{kernel.spills} loads and stores of local memory": kernel.spills > 0,
        f"{kernel.shared} B of shared memory, more than {limit} KiB": kernel.shared > limit * 1024,
        "dynamic shared memory that the table says nothing of": kernel.unknown_shared,
        f"{kernel.registers} registers for {kernel.threads} threads": kernel.registers * kernel.threads > REGISTERS,
        f"{kernel.blocks} blocks a multiprocessor, not {wanted}": kernel.blocks < wanted,
    }
    missing = [f"no {opcode} in a loop" for opcode in needs.looped.get(kernel.arch, ()) if not count(kernel.looped, [opcode])]
    return [text for text, broken in rules.items() if broken] + missing


def faults(kernels: Iterable[Kernel], table: Mapping[str, Needs]) -> list[str]:
    """One a kernel that breaks a rule."""
    found = ((kernel, violations(kernel, table)) for kernel in kernels)
    return [f"{kernel.source} {kernel.name} {kernel.variant} sm_{kernel.arch}: {', '.join(texts)}" for kernel, texts in found if texts]


def unmatched(kernels: Iterable[Kernel], table: Iterable[str]) -> list[str]:
    """Patterns that belong to no kernel: it is gone, or is called otherwise now."""
    known = {pattern_of(kernel.name, table) for kernel in kernels}
    return [pattern for pattern in table if pattern not in known]
