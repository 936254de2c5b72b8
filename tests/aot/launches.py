"""What a Triton backend would launch, compiled for a card that is not there.

`recorded` runs a backend on meta tensors with the launches intercepted, so what is compiled is what would run: the same constants,
argument types and divisibility."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import triton
from expected import EXPECTED
from sass import ARCHS, Image, Kernel, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    fn: JITFunction
    signature: tuple  # (name, type) in order
    constants: tuple  # (name, value)
    divisible: tuple  # names of arguments that are multiples of 16
    options: tuple

    @property
    def name(self) -> str:
        return self.fn.fn.__name__

    @property
    def label(self) -> str:
        """With what the launch chose of the code: _filter<TMA, ALIGNED, tf32>, _select<bank>."""
        chosen = [name if value is True else value for name, value in self.constants if value is True or isinstance(value, str)]
        return f"{self.name}<{', '.join(chosen)}>" if chosen else self.name


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


class DoesNotCompile(Exception):
    pass


@functools.cache
def image(launch: Launch, arch: int) -> Image:
    names = launch.fn.arg_names
    source = ASTSource(
        fn=launch.fn, signature=dict(launch.signature), constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )  # fmt: skip
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    except Exception as error:
        raise DoesNotCompile(f"triton {launch.label} sm_{arch} does not compile: {' '.join(str(error).split())[:400]}") from error
    return Image(kernel.asm["cubin"], kernel.asm["ptx"], {launch.name: launch.label}, {launch.name: kernel.metadata.shared})


def compiled(op: str, variant: str, arch: int, launches: Sequence[Launch]) -> tuple[list[Kernel], list[DoesNotCompile]]:
    images, failed = [], []
    for launch in launches:
        try:
            images.append(image(launch, arch))
        except DoesNotCompile as error:
            failed.append(error)
    return kernels("triton", op, variant, arch, images), failed


def launches_of(op: str, variant: str, arch: int) -> list[Launch]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return recorded(monkeypatch, EXPECTED[op].call(monkeypatch, arch, *EXPECTED[op].variants[variant]))


@functools.cache
def triton_kernels(op: str, variant: str) -> dict[int, tuple[list[Kernel], list[DoesNotCompile]]]:
    """arch -> kernels, and what went wrong with others."""
    launches = {arch: launches_of(op, variant, arch) for arch in ARCHS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the time is MLIR's, ptxas's and nvdisasm's, which run beside Python
        return dict(zip(ARCHS, pool.map(lambda arch: compiled(op, variant, arch, launches[arch]), ARCHS), strict=True))
