"""Compiles what a Triton backend would launch, to cubins, for a card that is not there.

`recorded` runs a backend on meta tensors with the launches intercepted, so what is compiled is what would run: the same constants,
argument types and divisibility. `compiled` makes the cubin and reads its resources."""
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "maxnreg")
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}  # a program's limit


class Launch(NamedTuple):
    fn: JITFunction
    signature: tuple  # (name, type) in order
    constants: tuple  # (name, value)
    divisible: tuple  # names of arguments that are multiples of 16
    options: tuple

    @property
    def name(self):
        return self.fn.fn.__name__


class Compiled(NamedTuple):
    ptx: str
    sass: str
    shared: int  # bytes of a program
    registers: int
    stack: int
    spills: int  # loads and stores of local memory


def recorded(monkeypatch, run) -> list[Launch]:
    """The distinct launches of run()."""
    launches = {}

    def record(self, *args, grid, warmup, **kwargs):
        options = tuple((name, kwargs.pop(name)) for name in OPTIONS if kwargs.get(name) is not None)
        kwargs = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = [], [], []
        for parameter in self.params:
            name, value = parameter.name, values[parameter.name]
            free = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
                signature.append((name, "constexpr"))
                constants.append((name, value))
                continue
            signature.append((name, mangle_type(value)))
            if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and free):
                divisible.append(name)
        launch = Launch(self, tuple(signature), tuple(constants), tuple(divisible), options)
        launches[(launch.name, *launch[1:])] = launch

    monkeypatch.setattr(JITFunction, "run", record)
    run()
    monkeypatch.undo()
    return list(launches.values())


def compiled(launch: Launch, arch: int) -> Compiled:
    names = launch.fn.arg_names
    source = ASTSource(
        fn=launch.fn, signature=dict(launch.signature), constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )  # fmt: skip
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Compiled(kernel.asm["ptx"], sass, kernel.metadata.shared, registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", sass)))
