"""The PTX interpreter, opcode by opcode, against Python's integers and fractions, struct, and the tables of the PTX ISA.

Every kernel here goes through ptxas as well, where there is one: what is tested is PTX, not what the interpreter takes for it.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import shutil
import struct
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from interpreter import OPCODES, Fault, Module

HEADER = ".version 7.8\n.target sm_90\n.address_size 64\n"
KERNELS: dict[str, str] = {}
BITS = {f"{kind}{bits}": bits for kind in "bsuf" for bits in (8, 16, 32, 64)}


def kernel(name: str, pointers: str, body: str) -> None:
    KERNELS[name] = entry(name, pointers, body)


def entry(name: str, pointers: str, body: str) -> str:
    """A kernel whose pointers are in registers of their names, the thread in tid; h, r, x, f, g, p are there to be used."""
    parameters = ", ".join(f".param .u64 {name}_{pointer}" for pointer in pointers.split())
    loads = "\n".join(f".reg .b64 {p}; ld.param.u64 {p}, [{name}_{p}]; cvta.to.global.u64 {p}, {p};" for p in pointers.split())
    return f""".visible .entry {name}({parameters})
{{
.reg .b16 h<9>; .reg .b32 r<20>; .reg .b64 x<20>; .reg .f32 f<20>; .reg .f64 g<9>; .reg .pred p<9>;
.reg .b32 tid;
{loads}
mov.u32 tid, %tid.x;
{body}
ret;
}}
"""


@functools.cache
def module() -> Module:
    return Module(HEADER + "".join(KERNELS.values()))


def launch(name, *arrays, grid=(1, 1, 1), block=(32, 1, 1), shared=0, regions=None, on=None):
    pointers = [struct.pack("Q", a.ctypes.data) for a in arrays]
    regions = regions or [(a.ctypes.data, a.nbytes) for a in arrays]
    (on or module()).launch(name, grid, block, shared, pointers, regions)


def dtype_of(kind: str) -> np.dtype:
    return np.dtype(f"{'f' if kind[0] == 'f' else 'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}")


def opcode_kernel(name: str, types: str, instructions: str) -> None:
    """A kernel that applies instructions to inputs a, b, c, one element a thread, with result d (the first type)."""
    lines = ["mov.u32 r1, %ctaid.x; mad.lo.u32 r0, r1, 64, tid;"]
    for letter, kind in zip("dabc", types.split(), strict=False):
        size = BITS[kind] // 8
        lines.append(f".reg .b{max(8 * size, 16)} {letter}; mad.wide.u32 x{'dabc'.index(letter)}, r0, {size}, p{letter};")
        if letter != "d":
            lines.append(f"ld.global.{'u8' if size == 1 else f'b{8 * size}'} {letter}, [x{'dabc'.index(letter)}];")
    pointers = " ".join(f"p{letter}" for letter in "dabc"[: len(types.split())])
    bits = BITS[types.split()[0]]
    kernel(name, pointers, "\n".join([*lines, instructions, f"st.global.{'u8' if bits == 8 else f'b{bits}'} [x0], d;"]))


def apply(name: str, types: str, inputs: list[tuple]) -> np.ndarray:
    """-> what the kernel makes of the inputs, tuples of Python numbers."""
    kinds = types.split()
    count = len(inputs) + -len(inputs) % 64
    arrays = [np.resize(np.array(column, dtype_of(kind)), count) for kind, column in zip(kinds[1:], zip(*inputs, strict=True), strict=True)]
    out = np.zeros(count, dtype_of(kinds[0]))
    launch(name, out, *arrays, grid=(count // 64, 1, 1), block=(64, 1, 1))
    return out[: len(inputs)]


def check(name: str, types: str, inputs: list[tuple], expected: list) -> None:
    out = apply(name, types, inputs)
    wanted = np.array(expected, out.dtype)
    same = (out.view(f"u{out.itemsize}") == wanted.view(f"u{out.itemsize}")) | ((out != out) & (wanted != wanted))
    assert same.all(), [(inputs[i], out[i], wanted[i]) for i in np.flatnonzero(~same)[:5]]


# Integers -------------------------------------------------------------------------------------------------------------
def edges(kind: str, few: bool) -> list[int]:
    bits = BITS[kind]
    values = [0, 1, 5, bits - 1, bits, 130, 1 << bits - 1, (1 << bits) - 1] + (
        [] if few else [2, bits + 1, (1 << bits - 1) - 1, 0x12345678ABCDEF01, (1 << bits) - 7]
    )
    return sorted({signed(v, bits) if kind[0] == "s" else v % (1 << bits) for v in values})


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (value >> bits - 1 << bits)


def divide(a, b):
    return None if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return None if b == 0 else a - divide(a, b) * b


def bit_string(value: int, bits: int) -> str:
    return f"{value % (1 << bits):0{bits}b}"


def bit_field(value: int, start: int, length: int, bits: int, is_signed: bool) -> int:
    """As the ISA's pseudo code, bit by bit."""
    start, length, top, text = start & 255, length & 255, bits - 1, bit_string(value, bits)[::-1]
    fill = "0" if not is_signed or length == 0 else text[min(start + length - 1, top)]
    return int("".join(text[start + i] if i < length and start + i <= top else fill for i in range(bits))[::-1], 2)


def insert_field(a: int, b: int, start: int, length: int, bits: int) -> int:
    start, length, source, out = start & 255, length & 255, bit_string(a, bits)[::-1], list(bit_string(b, bits)[::-1])
    for i in range(length):
        if start + i < bits:
            out[start + i] = source[i]
    return int("".join(out)[::-1], 2)


def permute(a: int, b: int, selectors: int) -> int:
    pool = struct.pack("<II", a, b)
    chosen = [pool[n & 7] if not n & 8 else (255 if pool[n & 7] & 128 else 0) for n in (selectors >> 4 * i & 15 for i in range(4))]
    return int.from_bytes(bytes(chosen), "little")


def top_bit(value: int, bits: int) -> int:
    return (~value if value < 0 else value).bit_length() - 1


def table_lookup(table: int):
    return lambda a, b, c: sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


def saturated(low, high):
    return lambda a: min(max(a, low), high)


INTEGERS = {  # opcode (after a blank: what follows the registers) -> types of d, a, b, c; Python
    "add.u16": ("u16 u16 u16", lambda a, b: a + b),
    "add.s32": ("s32 s32 s32", lambda a, b: a + b),
    "add.s64": ("s64 s64 s64", lambda a, b: a + b),
    "sub.s16": ("s16 s16 s16", lambda a, b: a - b),
    "sub.u32": ("u32 u32 u32", lambda a, b: a - b),
    "sub.u64": ("u64 u64 u64", lambda a, b: a - b),
    "mul.lo.s16": ("s16 s16 s16", lambda a, b: a * b),
    "mul.lo.s32": ("s32 s32 s32", lambda a, b: a * b),
    "mul.lo.u64": ("u64 u64 u64", lambda a, b: a * b),
    "mul.hi.s32": ("s32 s32 s32", lambda a, b: a * b >> 32),
    "mul.hi.u32": ("u32 u32 u32", lambda a, b: a * b >> 32),
    "mul.hi.s64": ("s64 s64 s64", lambda a, b: a * b >> 64),
    "mul.hi.u64": ("u64 u64 u64", lambda a, b: a * b >> 64),
    "mul.wide.s16": ("s32 s16 s16", lambda a, b: a * b),
    "mul.wide.s32": ("s64 s32 s32", lambda a, b: a * b),
    "mul.wide.u32": ("u64 u32 u32", lambda a, b: a * b),
    "mad.lo.s32": ("s32 s32 s32 s32", lambda a, b, c: a * b + c),
    "mad.lo.u64": ("u64 u64 u64 u64", lambda a, b, c: a * b + c),
    "mad.hi.u32": ("u32 u32 u32 u32", lambda a, b, c: (a * b >> 32) + c),
    "mad.hi.s64": ("s64 s64 s64 s64", lambda a, b, c: (a * b >> 64) + c),
    "mad.wide.s32": ("s64 s32 s32 s64", lambda a, b, c: a * b + c),
    "mad.wide.u16": ("u32 u16 u16 u32", lambda a, b, c: a * b + c),
    "div.s32": ("s32 s32 s32", divide),
    "div.u16": ("u16 u16 u16", divide),
    "div.u32": ("u32 u32 u32", divide),
    "div.s64": ("s64 s64 s64", divide),
    "div.u64": ("u64 u64 u64", divide),
    "rem.s32": ("s32 s32 s32", remainder),
    "rem.u32": ("u32 u32 u32", remainder),
    "rem.s64": ("s64 s64 s64", remainder),
    "min.s32": ("s32 s32 s32", min),
    "min.u32": ("u32 u32 u32", min),
    "min.s64": ("s64 s64 s64", min),
    "max.u16": ("u16 u16 u16", max),
    "max.s32": ("s32 s32 s32", max),
    "max.u64": ("u64 u64 u64", max),
    "abs.s16": ("s16 s16", abs),
    "abs.s32": ("s32 s32", abs),
    "abs.s64": ("s64 s64", abs),
    "neg.s32": ("s32 s32", lambda a: -a),
    "neg.s64": ("s64 s64", lambda a: -a),
    "and.b32": ("b32 b32 b32", lambda a, b: a & b),
    "or.b64": ("b64 b64 b64", lambda a, b: a | b),
    "xor.b16": ("b16 b16 b16", lambda a, b: a ^ b),
    "not.b32": ("b32 b32", lambda a: ~a),
    "not.b64": ("b64 b64", lambda a: ~a),
    "shl.b16": ("b16 b16 u32", lambda a, n: a << min(n, 99)),
    "shl.b32": ("b32 b32 u32", lambda a, n: a << min(n, 99)),
    "shl.b64": ("b64 b64 u32", lambda a, n: a << min(n, 99)),
    "shr.u16": ("u16 u16 u32", lambda a, n: a >> n),
    "shr.u32": ("u32 u32 u32", lambda a, n: a >> n),
    "shr.s32": ("s32 s32 u32", lambda a, n: a >> n),
    "shr.s64": ("s64 s64 u32", lambda a, n: a >> n),
    "shr.b64": ("b64 b64 u32", lambda a, n: a >> n),
    "shf.l.wrap.b32": ("b32 b32 b32 u32", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    "shf.l.clamp.b32": ("b32 b32 b32 u32", lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32),
    "shf.r.wrap.b32": ("b32 b32 b32 u32", lambda a, b, n: (b << 32 | a) >> (n & 31)),
    "shf.r.clamp.b32": ("b32 b32 b32 u32", lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    "popc.b32": ("u32 b32", lambda a: bin(a).count("1")),
    "popc.b64": ("u32 b64", lambda a: bin(a).count("1")),
    "clz.b32": ("u32 b32", lambda a: 32 - a.bit_length()),
    "clz.b64": ("u32 b64", lambda a: 64 - a.bit_length()),
    "brev.b32": ("b32 b32", lambda a: int(bit_string(a, 32)[::-1], 2)),
    "brev.b64": ("b64 b64", lambda a: int(bit_string(a, 64)[::-1], 2)),
    "bfe.u32": ("u32 u32 u32 u32", lambda a, s, n: bit_field(a, s, n, 32, False)),
    "bfe.s32": ("s32 s32 u32 u32", lambda a, s, n: bit_field(a, s, n, 32, True)),
    "bfe.u64": ("u64 u64 u32 u32", lambda a, s, n: bit_field(a, s, n, 64, False)),
    "bfe.s64": ("s64 s64 u32 u32", lambda a, s, n: bit_field(a, s, n, 64, True)),
    "bfi.b32 , 7": ("b32 b32 b32 u32", lambda a, b, s: insert_field(a, b, s, 7, 32)),
    "bfi.b64 , 64": ("b64 b64 b64 u32", lambda a, b, s: insert_field(a, b, s, 64, 64)),
    "bfi.b32 , 0": ("b32 b32 b32 u32", lambda a, b, s: insert_field(a, b, s, 0, 32)),
    "bfind.u32": ("u32 u32", lambda a: top_bit(a, 32)),
    "bfind.s32": ("u32 s32", lambda a: top_bit(a, 32)),
    "bfind.u64": ("u32 u64", lambda a: top_bit(a, 64)),
    "bfind.shiftamt.u32": ("u32 u32", lambda a: 31 - top_bit(a, 32) if a else -1),
    "prmt.b32": ("b32 b32 b32 b32", permute),
    "lop3.b32 , 0x96": ("b32 b32 b32 b32", table_lookup(0x96)),
    "lop3.b32 , 0xCA": ("b32 b32 b32 b32", table_lookup(0xCA)),
    "lop3.b32 , 0x04": ("b32 b32 b32 b32", table_lookup(0x04)),
    "cvt.u32.u64": ("u32 u64", lambda a: a),
    "cvt.s64.s32": ("s64 s32", lambda a: a),
    "cvt.u64.u32": ("u64 u32", lambda a: a),
    "cvt.s16.s8": ("s16 s8", lambda a: a),
    "cvt.s32.s8": ("s32 s8", lambda a: a),
    "cvt.u16.u32": ("u16 u32", lambda a: a),
    "cvt.s32.u16": ("s32 u16", lambda a: a),
    "cvt.u8.u32": ("u8 u32", lambda a: a),
    "cvt.sat.s8.s32": ("s8 s32", saturated(-128, 127)),
    "cvt.sat.u16.s32": ("u16 s32", saturated(0, 65535)),
    "cvt.sat.u32.s64": ("u32 s64", saturated(0, 2**32 - 1)),
    "cvt.sat.s32.u64": ("s32 u64", saturated(0, 2**31 - 1)),
}  # fmt: skip
SELECTORS = [0x3210, 0x7654, 0x0123, 0x5140, 0x8F9C, 0xFFFF, 0x12347632]
for opcode, (types, _) in INTEGERS.items():
    name, _, more = opcode.partition(" ")
    opcode_kernel(opcode.translate(str.maketrans(". ,", "___")), types, f"{name} {', '.join('dabc'[: len(types.split())])}{more};")


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode):
    types, reference = INTEGERS[opcode]
    kinds = types.split()
    inputs = [edges(kind, few=len(kinds) == 4) for kind in kinds[1:]]
    if opcode == "prmt.b32":
        inputs = [[0x80706050, 0x12345678], [0xF0E0D0C0, 0x7F80FF00], SELECTORS]
    pairs = [(i, reference(*i)) for i in itertools.product(*inputs)]
    pairs = [(i, r) for i, r in pairs if r is not None]
    bits = BITS[kinds[0]]
    wrap = [signed(r, bits) if kinds[0][0] == "s" else r % (1 << bits) for _, r in pairs]
    check(opcode.translate(str.maketrans(". ,", "___")), types, [i for i, _ in pairs], wrap)


# Floats ---------------------------------------------------------------------------------------------------------------
# significant bits, exponent of the smallest number, the largest number
FORMATS = {
    "f16": (11, -24, 65504.0),
    "bf16": (8, -133, (2 - 2.0**-7) * 2.0**127),
    "f32": (24, -149, (2 - 2.0**-23) * 2.0**127),
    "f64": (53, -1074, math.ldexp(2 - 2.0**-52, 1023)),
}


def rounded(exact: Fraction, kind: str, mode: str = "rn") -> float:
    """An exact number, not 0, as a float of so many bits, by the definition of rounding."""
    precision, smallest, largest = FORMATS[kind]
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    quantum = Fraction(2) ** max(exponent - precision + 1, smallest)
    steps = exact / quantum
    down = math.floor(steps)
    up = down + (steps != down)
    toward_zero = down if exact > 0 else up
    nearest = round(steps)  # ties to even
    chosen = {"rn": nearest, "rz": toward_zero, "rm": down, "rp": up}[mode] * quantum
    if abs(chosen) > Fraction(largest):
        outward = mode == "rn" or (mode == "rp") == (exact > 0) and mode != "rz"
        return (math.inf if outward else largest) * (1 if exact > 0 else -1)
    return math.copysign(float(chosen), 1 if exact > 0 else -1)


def exactly(plain, exact, kind, mode="rn"):
    """plain: the operation on Python floats, which is right for infinities, NaN and the sign of zero. exact: on fractions."""

    def reference(*x):
        value = plain(*x)
        if not all(map(math.isfinite, x)) or not (result := exact(*map(Fraction, x))):
            return value
        return rounded(result, kind, mode)

    return reference


def quotient(a, b):
    if b != 0:
        return a / b
    return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)


def float_quotient(kind):
    return lambda a, b: quotient(a, b) if b == 0 or not math.isfinite(b) else exactly(quotient, lambda x, y: x / y, kind)(a, b)


def square_root(kind):
    def reference(x):
        if not x > 0 or x == math.inf:
            return x if x == 0 or x > 0 else math.nan
        scaled = Fraction(x) * Fraction(4) ** 600
        root = math.isqrt(int(scaled) * 4**200)  # so many bits that the rest cannot matter, unless it is 0
        return rounded(Fraction(root * 2 + (root * root != int(scaled) * 4**200)) / Fraction(2) ** 801, kind)

    return reference


def smaller(a, b):
    return b if a != a else a if b != b else a if (a, math.copysign(1, a)) < (b, math.copysign(1, b)) else b


def larger(a, b):
    return -smaller(-a, -b)


def flushed(f):
    def flush(x):
        return math.copysign(0.0, x) if abs(x) < 2**-126 else x

    return lambda *x: flush(f(*map(flush, x)))


def clamped(f):
    def reference(*x):
        y = f(*x)
        return min(y, 1.0) if y > 0 else 0.0

    return reference


def add(a, b):
    return a + b


def subtract(a, b):
    return a - b


def times(a, b):
    return a * b


def sum_mode(mode, kind="f32"):
    def plain(a, b):  # x + -x is -0 only when rounding down
        return -0.0 if mode == "rm" and a == -b and abs(a) < math.inf and math.copysign(1, a) != math.copysign(1, b) else a + b

    return exactly(plain, add, kind, mode)


def fused_mode(mode, kind="f32"):
    def plain(a, b, c):
        product = a * b if math.isfinite(c) or not (math.isfinite(a) and math.isfinite(b)) else 0.0  # which may overflow
        cancels = product == -c and abs(c) < math.inf and math.copysign(1, product) != math.copysign(1, c)
        return -0.0 if mode == "rm" and cancels else product + c

    return exactly(plain, lambda a, b, c: a * b + c, kind, mode)


def unless_nan(f):
    return lambda a, b: f(a, b) if a == a and b == b else math.nan


SPECIAL = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan]
F16 = [*SPECIAL, 2.0**-24, 1 + 2.0**-10, 0.0999755859375, 333.25, 65504.0, -65504.0]
F32 = [*SPECIAL, 2.0**-149, -(2.0**-130), 2.0**-126, 1 + 2.0**-23, 1 + 2.0**-12, 2.0**-60, -(2.0**-60), 0.1, 3.0, -7.7e12]
F32 = [float(np.float32(x)) for x in [*F32, FORMATS["f32"][2], -FORMATS["f32"][2]]]
F64 = [*SPECIAL, 5e-324, 2.0**-1022, 1 + 2.0**-52, 1 + 2.0**-27, 2.0**-120, -(2.0**-120), 0.1, FORMATS["f64"][2]]
VALUES = {"f16": F16, "f32": F32, "f64": F64}
MODES = ("rn", "rz", "rm", "rp")
FLOATS = {
    **{f"add.{kind}": sum_mode("rn", kind) for kind in VALUES},
    **{f"add.{mode}.f32": sum_mode(mode) for mode in MODES},
    "add.ftz.f32": flushed(sum_mode("rn")),
    "add.sat.f32": clamped(sum_mode("rn")),
    "add.ftz.sat.f32": clamped(flushed(sum_mode("rn"))),
    **{f"sub.{kind}": exactly(subtract, subtract, kind) for kind in VALUES},
    "sub.rp.f32": lambda a, b: sum_mode("rp")(a, -b),
    **{f"mul.{kind}": exactly(times, times, kind) for kind in VALUES},
    **{f"mul.{mode}.f32": exactly(times, times, "f32", mode) for mode in MODES},
    "mul.ftz.f32": flushed(exactly(times, times, "f32")),
    **{f"div.{mode}.f32": float_quotient("f32") for mode in ("rn", "full", "approx")},
    "div.rn.f64": float_quotient("f64"),
    "rcp.rn.f32": lambda x: float_quotient("f32")(1.0, x),
    "rcp.approx.ftz.f32": flushed(lambda x: float_quotient("f32")(1.0, x)),
    "rcp.rn.f64": lambda x: float_quotient("f64")(1.0, x),
    **{f"sqrt.{of}": square_root(of[-3:]) for of in ("rn.f32", "rn.f64", "approx.f32")},
    **{f"min.{kind}": smaller for kind in VALUES},
    **{f"max.{kind}": larger for kind in VALUES},
    "max.ftz.f32": flushed(larger),
    "min.NaN.f32": unless_nan(smaller),
    "max.NaN.f32": unless_nan(larger),
    **{f"abs.{kind}": abs for kind in VALUES},
    "abs.ftz.f32": flushed(abs),
    **{f"neg.{kind}": lambda a: -a for kind in VALUES},
    **{f"copysign.{kind}": lambda a, b: math.copysign(b, a) for kind in ("f32", "f64")},
    **{f"fma.{mode}.f32": fused_mode(mode) for mode in MODES},
    "fma.rn.ftz.f32": flushed(fused_mode("rn")),
    "fma.rn.sat.f32": clamped(fused_mode("rn")),
    "fma.rn.f64": fused_mode("rn", "f64"),
    "fma.rn.f16": fused_mode("rn", "f16"),
    "mad.rn.f32": fused_mode("rn"),
}


def float_types(opcode: str, count: int) -> str:
    return " ".join([opcode.rsplit(".", 1)[1]] * (count + 1))


def arity(opcode: str) -> int:
    return {"fma": 3, "mad": 3, "abs": 1, "neg": 1, "rcp": 1, "sqrt": 1}.get(opcode.split(".")[0], 2)


for opcode in FLOATS:
    opcode_kernel(opcode.replace(".", "_"), float_types(opcode, arity(opcode)), f"{opcode} {', '.join('dabc'[: arity(opcode) + 1])};")


@pytest.mark.parametrize("opcode", FLOATS)
def test_floats(opcode):
    kind, count = opcode.rsplit(".", 1)[1], arity(opcode)
    inputs = list(itertools.product(VALUES[kind], repeat=count))
    if count == 3:
        inputs = inputs[:: 5 if kind == "f32" else 1]
    check(opcode.replace(".", "_"), float_types(opcode, count), inputs, [FLOATS[opcode](*x) for x in inputs])


def test_fma_rounds_once():
    a = 1 + 2.0**-12  # a * a is half way between two floats; float64 forgets 2^-60 next to it
    check("fma_rn_f32", "f32 f32 f32 f32", [(a, a, 2.0**-60), (a, a, -(2.0**-60)), (a, a, 0.0)],
          [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11, 1 + 2.0**-11])  # fmt: skip
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        floats = rng.integers(0, 2**32, (3, 4096), dtype=np.uint32).view(np.float32)
        floats[2] = np.where(rng.random(4096) < 0.5, -floats[0] * floats[1], floats[2])  # cancels all but the rounding
        inputs = list(zip(*floats.astype(float).tolist(), strict=True))
    check("fma_rn_f32", "f32 f32 f32 f32", inputs, [FLOATS["fma.rn.f32"](*x) for x in inputs])


@pytest.mark.parametrize(
    ("name", "types", "bits"),
    [("add_f32", "f32 f32 f32", 0x7FFFFFFF), ("min_f32", "f32 f32 f32", 0x7FFFFFFF), ("fma_rn_f32", "f32 f32 f32 f32", 0x7FFFFFFF),
     ("div_approx_f32", "f32 f32 f32", 0x7FFFFFFF), ("mul_f16", "f16 f16 f16", 0x7FFF), ("cvt_rn_f16_f32", "f16 f32", 0x7FFF),
     ("cvt_f32_f16", "f32 f16", 0x7FFFFFFF), ("cvt_rn_f32_f64", "f32 f64", 0x7FFFFFFF), ("cvt_rn_bf16_f32", "u16 f32", 0x7FFF),
     ("neg_f32", "f32 f32", 0xFFC00000), ("cvt_f32_bf16", "f32 b16", 0x7FC10000)],
)  # fmt: skip
def test_nan(name, types, bits):
    given = [0x7FC1 if kind == "b16" else math.nan for kind in types.split()[1:]]
    out = apply(name, types, [tuple(given)])
    assert out.view(f"u{out.itemsize}")[0] == bits


APPROXIMATE = {
    "rsqrt.approx.f32": lambda x: 1 / math.sqrt(x),
    "rsqrt.approx.f64": lambda x: 1 / math.sqrt(x),
    "ex2.approx.ftz.f32": lambda x: 2**x,
    "lg2.approx.f32": math.log2,
    "sin.approx.f32": math.sin,
    "cos.approx.f32": math.cos,
    "tanh.approx.f32": math.tanh,
}
for opcode in APPROXIMATE:
    opcode_kernel(opcode.replace(".", "_"), float_types(opcode, 1), f"{opcode} d, a;")


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate_functions(opcode):
    inputs = [(float(np.float32(x)),) for x in (0.1, 0.5, 1.0, 3.0, 7.7, 100.0)]
    out = apply(opcode.replace(".", "_"), float_types(opcode, 1), inputs)
    np.testing.assert_allclose(out, [APPROXIMATE[opcode](*x) for x in inputs], rtol=1e-7)
    special = {
        "ex2": [(-math.inf, 0.0), (math.inf, math.inf), (-200.0, 0.0)],
        "lg2": [(0.0, -math.inf), (-1.0, math.nan)],
        "rsqrt": [(0.0, math.inf), (-1.0, math.nan), (math.inf, 0.0)],
    }.get(opcode.split(".")[0], [])
    if special:
        check(opcode.replace(".", "_"), float_types(opcode, 1), [(x,) for x, _ in special], [y for _, y in special])


# Conversions ----------------------------------------------------------------------------------------------------------
def to_integer(mode, kind, source):
    low, high = (-(1 << BITS[kind] - 1), (1 << BITS[kind] - 1) - 1) if kind[0] == "s" else (0, (1 << BITS[kind]) - 1)

    def reference(x):
        if x != x:
            return 0 if source == "f32" and BITS[kind] < 64 else (low if kind[0] == "s" else 1 << BITS[kind] - 1)
        if math.isinf(x):
            return low if x < 0 else high
        return min(max({"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](x), low), high)

    return reference


def integral(mode):
    def reference(x):
        if not math.isfinite(x):
            return x
        return math.copysign({"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](x), x)

    return reference


def to_float(kind, mode="rn"):
    def reference(x):
        return rounded(Fraction(x), kind, mode) if math.isfinite(x) and x else x

    return reference


def half_bits(x):
    try:
        return struct.unpack("<H", struct.pack("<e", x))[0]
    except OverflowError:
        return 0x7C00 | (x < 0) << 15


def brain_bits(x):
    return struct.unpack("<I", struct.pack("<f", to_float("bf16")(x)))[0] >> 16


NUMBERS = [0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 1e9, 3e9, -3e9, 2147483520.0, 1e19, -1e19, 2e19, 255.5, 256.0]
INTEGRAL = ("rni", "rzi", "rmi", "rpi")
TO_INTEGERS = [(mode, "s32", "f32") for mode in INTEGRAL] + [("rni", "s32", "f64"), ("rzi", "s64", "f64"), ("rzi", "u32", "f64")]
TO_INTEGERS += [("rzi", kind, "f32") for kind in ("u32", "u64", "s64", "u16", "s8")]
CONVERSIONS = {  # opcode -> types of d and a, Python
    **{f"cvt.{mode}.{to}.{of}": (f"{to} {of}", to_integer(mode, to, of)) for mode, to, of in TO_INTEGERS},
    "cvt.rni.ftz.s32.f32": ("s32 f32", to_integer("rni", "s32", "f32")),
    **{f"cvt.{mode}.{kind}.{kind}": (f"{kind} {kind}", integral(mode)) for mode in INTEGRAL for kind in ("f32", "f64")},
    **{f"cvt.{mode}.f32.{of}": (f"f32 {of}", to_float("f32", mode)) for mode in MODES for of in ("f64", "s32", "u32", "s64", "u64")},
    **{f"cvt.rn.f64.{of}": (f"f64 {of}", to_float("f64")) for of in ("s32", "s64")},
    "cvt.rz.f64.u64": ("f64 u64", to_float("f64", "rz")),
    "cvt.rn.f32.s8": ("f32 s8", float),
    "cvt.rn.f16.s32": ("f16 s32", to_float("f16")),
    **{f"cvt.{to}.{of}": (f"{to} {of}", float) for to, of in [("f64", "f32"), ("f32", "f16"), ("f64", "f16")]},
    **{f"cvt.{mode}.f16.f32": ("f16 f32", to_float("f16", mode)) for mode in ("rn", "rz")},
    "cvt.rn.f16.f64": ("f16 f64", to_float("f16")),
    "cvt.rn.bf16.f32": ("u16 f32", brain_bits),
    "cvt.sat.f32.f32": ("f32 f32", clamped(float)),
    "cvt.ftz.f32.f32": ("f32 f32", flushed(float)),
}
for opcode, (types, _) in CONVERSIONS.items():
    opcode_kernel(opcode.replace(".", "_"), types, f"{opcode} d, a;")


@pytest.mark.parametrize("opcode", CONVERSIONS)
def test_conversions(opcode):
    types, reference = CONVERSIONS[opcode]
    kind = types.split()[1]
    if kind[0] == "f":
        inputs = [float(dtype_of(kind).type(x)) for x in VALUES[kind] + NUMBERS if kind != "f16" or not 65520 <= abs(x) < math.inf]
    else:
        inputs = edges(kind, few=False) + [2**24 + 1, 2**31 - 65, 2**53 + 1] * (BITS[kind] == 64)
    if opcode == "cvt.rn.bf16.f32":
        inputs = [x for x in inputs if x == x] + [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20]
    check(opcode.replace(".", "_"), types, [(x,) for x in inputs], [reference(x) for x in inputs])


opcode_kernel("cvt_rn_f16x2_f32", "b32 f32 f32", "cvt.rn.f16x2.f32 d, a, b;")
opcode_kernel("cvt_f32_bf16", "f32 b16", "cvt.f32.bf16 d, a;")
opcode_kernel("cvt_rn_bf16x2_f32", "b32 f32 f32", "cvt.rn.bf16x2.f32 d, a, b;")


@pytest.mark.parametrize(("name", "bits"), [("cvt_rn_f16x2_f32", half_bits), ("cvt_rn_bf16x2_f32", brain_bits)])
def test_packed_conversions(name, bits):
    inputs = list(itertools.product([x for x in F32 if x == x], repeat=2))
    check(name, "b32 f32 f32", inputs, [bits(a) << 16 | bits(b) for a, b in inputs])


# Comparisons, selection, moves ----------------------------------------------------------------------------------------
ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def nan_in(a, b):
    return a != a or b != b


COMPARISONS = {
    **{f"{r}.{kind}": f for r, f in ORDERED.items() for kind in ("s32", "u32", "s64", "u16")},
    **{f"{r}.u32": ORDERED[f] for r, f in UNSIGNED.items()},
    "eq.b64": ORDERED["eq"],
    "ne.b16": ORDERED["ne"],
    **{f"{r}.{kind}": lambda a, b, f=f: not nan_in(a, b) and f(a, b) for r, f in ORDERED.items() for kind in ("f32", "f64")},
    **{f"{r}u.{kind}": lambda a, b, f=f: nan_in(a, b) or f(a, b) for r, f in ORDERED.items() for kind in ("f32", "f16")},
    "num.f32": lambda a, b: not nan_in(a, b),
    "nan.f32": nan_in,
    "lt.ftz.f32": lambda a, b: flushed(float)(a) < flushed(float)(b),
}
for relation in COMPARISONS:
    kind = relation.rsplit(".", 1)[1]
    opcode_kernel(f"setp_{relation.replace('.', '_')}", f"u32 {kind} {kind}", f"setp.{relation} p0, a, b; selp.u32 d, 1, 0, p0;")


@pytest.mark.parametrize("relation", COMPARISONS)
def test_setp(relation):
    kind = relation.rsplit(".", 1)[1]
    inputs = list(itertools.product(VALUES[kind] if kind[0] == "f" else edges(kind, few=False), repeat=2))
    expected = [int(COMPARISONS[relation](*x)) for x in inputs]
    check(f"setp_{relation.replace('.', '_')}", f"u32 {kind} {kind}", inputs, expected)


for n, mix in enumerate(("and", "or", "xor")):
    opcode_kernel(
        f"setp_lt_{mix}",
        "u32 s32 s32 u32",
        f"""
setp.ne.u32 p0, c, 0;
setp.lt.{mix}.s32 p1|p2, a, b, {"!" * (n == 1)}p0;
selp.u32 d, 1, 0, p1; selp.u32 r2, 2, 0, p2; or.b32 d, d, r2;""",
    )
opcode_kernel(
    "set_types",
    "u32 f32 f32",
    """
set.le.u32.f32 d, a, b; set.gt.f32.f32 f0, a, b; mov.b32 r2, f0; and.b32 d, d, 0xffff; or.b32 d, d, r2;""",
)
opcode_kernel("set_and", "u32 s32 s32", "setp.gt.s32 p0, a, 1; set.lt.and.u32.s32 d, a, b, p0;")
opcode_kernel("slct_s32", "u64 u64 u64 s32", "slct.u64.s32 d, a, b, c;")
opcode_kernel("slct_f32", "u32 u32 u32 f32", "slct.u32.f32 d, a, b, c;")
opcode_kernel(
    "predicates",
    "u32 u32 u32",
    """
setp.ne.u32 p0, a, 0; setp.ne.u32 p1, b, 0; mov.pred p6, 1;
and.pred p2, p0, p1; or.pred p3, p0, p1; xor.pred p4, p0, p1; not.pred p5, p0; mov.pred p7, 0; and.pred p6, p6, p0;
selp.u32 d, 1, 0, p2; @p3 or.b32 d, d, 2; @p4 or.b32 d, d, 4; @p5 or.b32 d, d, 8; @!p7 or.b32 d, d, 16; @!p6 or.b32 d, d, 32;""",
)


def test_predicates():
    pairs = list(itertools.product((-1, 0, 1, 2), (-1, 0, 1, 2), (0, 1)))
    for mix, f in [("and", lambda r, c: r and c), ("or", lambda r, c: r or not c), ("xor", lambda r, c: r != c)]:
        check(f"setp_lt_{mix}", "u32 s32 s32 u32", pairs, [f(a < b, bool(c)) + 2 * f(a >= b, bool(c)) for a, b, c in pairs])
    truth = list(itertools.product((0, 1), repeat=2))
    check("predicates", "u32 u32 u32", truth, [(a & b) + 2 * (a | b) + 4 * (a ^ b) + 8 * (1 - a) + 16 + 32 * (1 - a) for a, b in truth])


def test_set_and_slct():
    pairs = list(itertools.product(F32, repeat=2))
    check("set_types", "u32 f32 f32", pairs, [0xFFFF * (a <= b) | 0x3F800000 * (a > b) for a, b in pairs])
    check("set_and", "u32 s32 s32", [(2, 3), (1, 3), (3, 2)], [0xFFFFFFFF, 0, 0])
    check("slct_s32", "u64 u64 u64 s32", [(7 << 40, 8, c) for c in (-1, 0, 5)], [8, 7 << 40, 7 << 40])
    check("slct_f32", "u32 u32 u32 f32", [(7, 8, c) for c in (-0.0, -1.0, math.nan, math.inf)], [7, 8, 8, 7])


opcode_kernel(
    "mov_unpack",
    "u64 u64",
    """
.reg .b32 low, high; .reg .b16 s0, s1, s2, s3;
mov.b64 {low, high}, a; mov.b64 {s0, s1, s2, s3}, a; mov.b32 {_, s2}, low;
mov.b32 low, {s3, s0}; mov.b64 x4, {high, low}; mov.b64 d, x4;
cvt.u64.u16 x5, s2; xor.b64 d, d, x5;""",
)
opcode_kernel(
    "mov_literals",
    "u64 u32",
    """
mov.u32 r2, 0xFFFFFFFFU; mov.s32 r3, -2; mov.f32 f0, 0f3F800000; mov.f64 g0, 0d3FF8000000000000; mov.b32 r4, 0f40000000;
mov.u32 r5, WARP_SZ;
cvt.f64.f32 g1, f0; add.f64 g0, g0, g1; mov.b64 x3, g0; mov.b32 r6, f0; xor.b32 r6, r6, r4; add.u32 r2, r2, r3; add.u32 r2, r2, r5;
xor.b32 r6, r6, r2; cvt.u64.u32 x4, r6; xor.b64 d, x3, x4;""",
)


def test_mov():
    value = 0x1122334455667788
    check("mov_unpack", "u64 u64", [(value,)], [(0x77881122 << 32 | 0x11223344) ^ 0x5566])
    words = 0x3F800000 ^ 0x40000000 ^ (0xFFFFFFFF - 2 + 32) % 2**32
    check("mov_literals", "u64 u32", [(0,)], [struct.unpack("<Q", struct.pack("<d", 2.5))[0] ^ words])


kernel(
    "special_registers",
    "out",
    """
mov.u32 r0, %ctaid.z; mov.u32 r1, %nctaid.y; mov.u32 r17, %ctaid.y; mad.lo.u32 r0, r0, r1, r17;
mov.u32 r1, %nctaid.x; mov.u32 r17, %ctaid.x; mad.lo.u32 r0, r0, r1, r17;
mov.u32 r2, %ntid.x; mov.u32 r3, %ntid.y; mov.u32 r4, %ntid.z; mul.lo.u32 r5, r2, r3; mul.lo.u32 r5, r5, r4;
mov.u32 r6, %tid.z; mov.u32 r17, %tid.y; mad.lo.u32 r6, r6, r3, r17; mad.lo.u32 r6, r6, r2, tid;
mad.lo.u32 r7, r0, r5, r6; mad.wide.u32 out, r7, 48, out;
mov.u32 r8, %nctaid.z; mov.u32 r9, %laneid; mov.u32 r10, %warpid; mov.u32 r11, %tid.y;
st.global.v4.u32 [out], {r0, r6, r8, r9}; mov.u32 r12, %lanemask_lt; mov.u32 r13, %lanemask_le; mov.u32 r14, %lanemask_eq;
mov.u32 r15, %lanemask_gt; mov.u32 r16, %lanemask_ge;
st.global.v4.u32 [out+16], {r10, r11, r12, r13}; st.global.v2.u32 [out+32], {r14, r15}; st.global.u32 [out+40], r16;""",
)


def test_special_registers_in_three_dimensions():
    grid, block = (2, 3, 2), (5, 4, 2)
    out = np.zeros((12, 40, 12), np.uint32)
    launch("special_registers", out, grid=grid, block=block)
    for b, t in itertools.product(range(12), range(40)):
        lane = t % 32
        masks = [(1 << lane) - 1, (2 << lane) - 1, 1 << lane, (0xFFFFFFFF << lane + 1) & 0xFFFFFFFF, (0xFFFFFFFF << lane) & 0xFFFFFFFF]
        assert out[b, t].tolist() == [b, t, 2, lane, t // 32, t // 5 % 4, *masks, 0]


# Memory ---------------------------------------------------------------------------------------------------------------
kernel(
    "loads",
    "data out",
    """
mad.wide.u32 x0, tid, 16, data; mad.wide.u32 x1, tid, 80, out;
ld.global.u8 r0, [x0+1]; ld.global.s8 r1, [x0+1]; ld.global.nc.u16 r2, [x0+2]; ld.volatile.global.s16 r3, [x0+2];
st.global.v4.b32 [x1], {r0, r1, r2, r3};
ld.global.ca.s8 x2, [x0]; ld.global.s32 x3, [x0+12]; st.global.v2.u64 [x1+16], {x2, x3};
ld.global.cg.v2.f64 {g0, g1}, [x0]; st.global.v2.f64 [x1+32], {g1, g0};
ld.global.L1::no_allocate.v4.f32 {f0, f1, f2, f3}, [x0]; st.global.cs.v4.f32 [x1+48], {f3, f2, f1, f0};
ld.global.v2.u8 {h0, h1}, [x0+2]; st.global.v2.u8 [x1+64], {h1, h0}; ld.relaxed.gpu.global.u16 h2, [x0+6]; st.global.wt.u16 [x1+66], h2;
ld.global.b64 x4, [x0+8]; st.global.b64 [x1+72], x4; st.global.u8 [x1+68], r0; st.global.u8 [x1+69], x4;""",
)


def test_widths_signs_and_vectors_of_ld_and_st():
    data = np.random.default_rng(1).integers(0, 256, (40, 16), dtype=np.uint8)
    out = np.zeros((40, 80), np.uint8)
    launch("loads", data, out, block=(40, 1, 1))
    for row, result in zip(data, out, strict=True):
        raw = row.tobytes()
        expected = struct.pack(
            "<IiIi", raw[1], struct.unpack_from("b", raw, 1)[0], struct.unpack_from("<H", raw, 2)[0], struct.unpack_from("<h", raw, 2)[0]
        )
        expected += struct.pack("<qq", struct.unpack_from("b", raw)[0], struct.unpack_from("<i", raw, 12)[0])
        expected += raw[8:] + raw[:8] + raw[12:] + raw[8:12] + raw[4:8] + raw[:4]
        expected += bytes([raw[3], raw[2]]) + raw[6:8] + bytes([raw[1], raw[8], 0, 0]) + raw[8:]
        assert result.tobytes() == expected


KERNELS["module_variables"] = """
.const .align 4 .f32 weights[3] = {0f3F800000, 2.5, 0fC0000000};
.global .align 8 .u64 counter = 5;
.global .align 1 .b8 letters[6] = {104, 105};
"""
kernel(
    "variables",
    "out",
    """
mov.u64 x0, weights; mad.wide.u32 x1, tid, 4, x0; ld.const.f32 f0, [x1]; ld.const.f32 f1, [weights+8]; add.f32 f0, f0, f1;
mad.wide.u32 x2, tid, 16, out; st.global.f32 [x2], f0;
ld.global.u64 x3, [counter]; st.global.u64 [x2+8], x3; ld.global.u8 r0, [letters+1]; st.global.u32 [x2+4], r0;
mov.u64 x4, counter; cvta.global.u64 x4, x4; @p0 st.u64 [x4], x3; setp.eq.u32 p1, tid, 0; @p1 st.u64 [x4], 6;""",
)


def test_module_variables():
    out = np.zeros((3, 2), [("f", np.float32), ("i", np.uint32)]).view(np.uint32).reshape(3, 4)
    launch("variables", out, block=(3, 1, 1))
    assert out[:, 0].view(np.float32).tolist() == [-1, 0.5, -4] and (out[:, 1] == 105).all() and (out[:, 2] == 5).all()
    launch("variables", out, block=(3, 1, 1))
    assert (out[:, 2] == 6).all()  # they live as long as the module


KERNELS["dynamic"] = ".extern .shared .align 16 .b8 dynamic[];\n"
kernel(
    "shared_spaces",
    "out",
    """
.shared .align 8 .b8 first[4]; .shared .align 16 .b8 second[128];
mov.u32 r0, first; mov.u32 r1, second; mov.u32 r2, dynamic;
mad.lo.u32 r3, tid, 4, r1; mad.lo.u32 r4, tid, 4, r2;
ld.shared.u32 r5, [r3]; ld.shared.u32 r6, [dynamic+4];
st.shared.u32 [r3], tid; bar.sync 0; st.shared::cta.u32 [r4], tid; bar.sync 0;
cvt.u64.u32 x0, r3; cvta.shared.u64 x1, x0; ld.u32 r7, [x1]; cvta.to.shared.u64 x2, x1; cvt.u32.u64 r8, x2; ld.shared.u32 r9, [r8];
mad.wide.u32 x3, tid, 32, out; cvta.global.u64 x4, x3; st.u32 [x4], r7; st.global.u32 [x3+4], r9; st.global.v2.u32 [x3+8], {r5, r6};
st.global.v2.u32 [x3+16], {r1, r2}; setp.lt.u32 p0, tid, 16; selp.b64 x5, x1, x4, p0; mov.u32 r10, 99; st.u32 [x5], r10; bar.sync 0;
ld.u32 r11, [x5]; ld.shared.u32 r12, [r3]; st.global.v2.u32 [x3+24], {r11, r12};""",
)


def test_shared_memory_and_generic_addresses():
    out = np.zeros((32, 8), np.uint32)
    launch("shared_spaces", out, shared=128)
    lane = np.arange(32)
    assert (out[:, 1] == lane).all() and (out[:, 2:4] == 0xFFFFFFFF).all()  # poison
    assert (out[:, 4] == 16).all() and (out[:, 5] == 144).all()
    assert (out[:, 0] == np.where(lane < 16, lane, 99)).all()  # half of the lanes wrote to global memory, half to shared
    assert (out[:, 6] == 99).all() and (out[:, 7] == np.where(lane < 16, 99, lane)).all()


KERNELS[
    "parameters"
] = """.visible .entry parameters(.param .u8 small, .param .align 8 .b8 block[24], .param .f32 number, .param .u64 .ptr .align 1 out)
{
.reg .b32 r<4>; .reg .b64 x<6>; .reg .f32 f<3>;
ld.param.u8 r0, [small]; ld.param.v2.u32 {r1, r2}, [block+8]; ld.param.f32 f0, [number]; ld.param.u64 x0, [out];
mov.b64 x1, block; ld.param.u32 r3, [x1+20]; mov.u64 x2, block; cvta.param.u64 x3, x2; ld.u64 x4, [x3];
st.global.v4.u32 [x0], {r0, r1, r2, r3}; st.global.f32 [x0+16], f0; st.global.u64 [x0+24], x4;
}
"""


@pytest.mark.parametrize("joined", [False, True])
def test_parameters(joined):
    out = np.zeros(8, np.uint32)
    each = [b"\xfe", struct.pack("<6I", 1, 2, 3, 4, 5, 6), struct.pack("f", 1.5), struct.pack("Q", out.ctypes.data)]
    params = each[0] + bytes(7) + each[1] + each[2] + bytes(4) + each[3] if joined else each
    module().launch("parameters", (1, 1, 1), (1, 1, 1), 0, params, [(out.ctypes.data, out.nbytes)])
    assert out.tolist() == [0xFE, 3, 4, 6, 0x3FC00000, 0, 1, 2]


kernel(
    "local_memory",
    "out",
    """
.local .align 8 .b8 depot[20];
.reg .b64 sp, spl; mov.u64 spl, depot; cvta.local.u64 sp, spl; add.u64 x0, sp, 4; cvta.to.local.u64 x1, x0;
st.local.u32 [x1], tid; mul.lo.u32 r0, tid, 3; st.u32 [sp+8], r0; ld.u32 r1, [x0]; ld.local.u32 r2, [spl+8]; ld.local.u32 r3, [depot+16];
mad.wide.u32 x2, tid, 12, out; st.global.u32 [x2], r1; st.global.u32 [x2+4], r2; st.global.u32 [x2+8], r3;""",
)


def test_local_memory_is_a_threads_own():
    out = np.zeros((40, 3), np.uint32)
    launch("local_memory", out, block=(40, 1, 1))
    assert (out == [[t, 3 * t, 0xFFFFFFFF] for t in range(40)]).all()


ATOMICS = {  # operation.type -> operands after the address; Python: (old, operand of thread t) -> new
    "add.u32": ("v", lambda old, t: (old + t) % 2**32),
    "add.s32": ("v", lambda old, t: old + t),
    "add.u64": ("v", lambda old, t: (old + t) % 2**64),
    "add.f32": ("v", lambda old, t: float(np.float32(old + t))),
    "add.f64": ("v", lambda old, t: old + t),
    "min.s32": ("v", min),
    "max.u32": ("v", max),
    "max.s64": ("v", max),
    "and.b32": ("v", lambda old, t: old & t),
    "or.b32": ("v", lambda old, t: old | t),
    "xor.b64": ("v", lambda old, t: old ^ t),
    "exch.b32": ("v", lambda old, t: t),
    "cas.b32": ("7, v", lambda old, t: t if old == 7 else old),
    "inc.u32": ("v", lambda old, t: 0 if old >= t else old + 1),
    "dec.u32": ("v", lambda old, t: t if old == 0 or old > t else old - 1),
}
for operation, (operands, _) in ATOMICS.items():
    width, unit = BITS[operation.split(".")[1]], BITS[operation.split(".")[1]] // 8
    for space in ("global", "shared", "generic"):
        prefix = "" if space == "generic" else f".{space}"
        for base in ("atom", "red") if operation[:3] not in ("exc", "cas") else ("atom",):
            atomic = f"atom{prefix}.{operation} d, [x3], {operands};" if base == "atom" else f"red{prefix}.{operation} [x3], {operands};"
            kernel(
                f"{base}_{space}_{operation.replace('.', '_')}",
                "cells values old",
                f"""
.reg .b{width} v, d; .shared .align 8 .b8 memory[24];
and.b32 r0, tid, 1; mad.wide.u32 x0, r0, 8, cells; mad.wide.u32 x1, tid, {unit}, values; ld.global.b{width} v, [x1];
ld.global.b{width} d, [x0];
mov.u64 x2, memory; mad.wide.u32 x2, r0, 8, x2; st.shared.b{width} [x2], d; bar.sync 0;
mov.b64 x3, {"x2" if space == "shared" else "x0"};
{atomic}
bar.sync 0; {f"ld.shared.b{width} v, [x2]; st.global.b{width} [x0], v;" if space == "shared" else ""}
mad.wide.u32 x4, tid, {unit}, old; st.global.b{width} [x4], d;""",
            )


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics(operation, space):
    kind = operation.split(".")[1]
    values = np.random.default_rng(2).integers(1, 20, 40).astype(dtype_of(kind))
    if kind == "f32":
        values = values * np.float32(2.0**-25) + np.float32(1)
    start = np.array([7, 5], dtype_of(kind))
    state, before = start.tolist(), []
    for t in range(40):
        before.append(state[t % 2])
        state[t % 2] = ATOMICS[operation][1](state[t % 2], values[t].item())
    for base in ("atom", "red") if operation[:3] not in ("exc", "cas") else ("atom",):
        cells, old = np.zeros((2, 8 // start.itemsize), start.dtype), np.zeros_like(values)
        cells[:, 0] = start
        launch(f"{base}_{space}_{operation.replace('.', '_')}", cells, values, old, block=(40, 1, 1))
        assert cells[:, 0].tolist() == state
        assert base == "red" or old.tolist() == before


kernel("lost_update", "out", "ld.global.u32 r0, [out]; add.u32 r0, r0, 1; st.global.u32 [out], r0;")
kernel("fences", "out", "st.global.u32 [out], 3; membar.gl; membar.cta; fence.acq_rel.gpu; fence.sc.sys; @p0 st.global.u32 [out], 4;")


def test_what_is_not_atomic_loses_updates():
    out = np.zeros(1, np.uint32)
    launch("lost_update", out)
    assert out[0] == 1
    launch("fences", out)
    assert out[0] == 3


kernel(
    "cp_async",
    "data out",
    """
.shared .align 16 .b8 memory[1024];
mov.u32 r0, memory; mad.lo.u32 r0, tid, 32, r0; mad.wide.u32 x0, tid, 16, data; mad.wide.u32 x1, tid, 96, out; and.b32 r1, tid, 15;
cp.async.cg.shared.global [r0], [x0], 16; cp.async.commit_group; cp.async.ca.shared.global.L2::128B [r0+16], [x0], 16, r1;
cp.async.commit_group;
ld.shared.v4.u32 {r4, r5, r6, r7}, [r0]; st.global.v4.u32 [x1], {r4, r5, r6, r7};
cp.async.wait_group 1;
ld.shared.v4.u32 {r4, r5, r6, r7}, [r0]; st.global.v4.u32 [x1+16], {r4, r5, r6, r7};
ld.shared.v4.u32 {r4, r5, r6, r7}, [r0+16]; st.global.v4.u32 [x1+32], {r4, r5, r6, r7};
st.global.v2.u64 [x0], {0, 0};
cp.async.wait_group 0;
ld.shared.v4.u32 {r4, r5, r6, r7}, [r0+16]; st.global.v4.u32 [x1+48], {r4, r5, r6, r7};
ld.global.u64 x2, [x1]; cp.async.ca.shared.global [r0], [x1+16], 4; cp.async.ca.shared.global [r0+8], [x1+24], 8; mov.u64 x3, 4;
cp.async.ca.shared.global [r0+4], [x3], 4, 0;
cp.async.wait_all;
ld.shared.v4.u32 {r4, r5, r6, r7}, [r0]; st.global.v4.u32 [x1+64], {r4, r5, r6, r7};
setp.gt.u32 p0, tid, 15; cp.async.cg.shared.global [r0], [x0], 16; cp.async.commit_group; @p0 cp.async.wait_group 0;
ld.shared.v4.u32 {r4, r5, r6, r7}, [r0]; st.global.v4.u32 [x1+80], {r4, r5, r6, r7};""",
)


def test_cp_async_lands_when_it_is_waited_for():
    data, out = np.random.default_rng(3).integers(0, 256, (32, 16), dtype=np.uint8), np.zeros((32, 6, 16), np.uint8)
    given = data.copy()
    launch("cp_async", data, out)
    assert (out[:, 0] == 255).all()  # before any wait: NaN, -1
    assert (out[:, 1] == given).all() and (out[:, 2] == 255).all()  # the older group is there, the younger is not
    for t in range(32):  # what was there at the time of issue, and zeros
        assert out[t, 3].tolist() == given[t, : t % 16].tolist() + [0] * (16 - t % 16)
        assert out[t, 4].tolist() == given[t, :4].tolist() + [0] * 4 + given[t, 8:].tolist()
    assert (out[:16, 5] == 255).all() and (out[16:, 5] == 0).all()  # half of the threads did not wait


# Threads together -----------------------------------------------------------------------------------------------------
for mode in ("idx", "up", "down", "bfly"):
    kernel(
        f"shfl_{mode}",
        "given steps clamps out",
        f"""
mad.wide.u32 x0, tid, 4, given; ld.global.u32 r0, [x0]; mad.wide.u32 x1, tid, 4, steps; ld.global.u32 r1, [x1]; ld.global.u32 r2, [clamps];
shfl.sync.{mode}.b32 r3|p0, r0, r1, r2, -1; shfl.sync.{mode}.b32 r5, r0, r1, r2, 0xffffffff; selp.u32 r4, 1, 0, p0;
mad.wide.u32 x2, tid, 12, out; st.global.u32 [x2], r3; st.global.u32 [x2+4], r4; st.global.u32 [x2+8], r5;""",
    )


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shfl(mode, width):
    given = np.random.default_rng(4).integers(0, 2**32, 64, dtype=np.uint32)
    for step in (0, 1, 3, 7, 16, 31):
        steps, out = np.full(64, step, np.uint32), np.zeros((64, 3), np.uint32)
        if mode == "idx":
            steps[:] = (np.arange(64) * 5 + step) % 32  # a step of each lane's own
        clamp = 32 - width << 8 | (0 if mode == "up" else 31)  # as __shfl_*_sync build it
        launch(f"shfl_{mode}", given, steps, np.array([clamp], np.uint32), out, block=(64, 1, 1))
        for t in range(64):
            n, lane = int(steps[t]), t % width  # CUDA's definition of the four within segments
            source = t - lane + {"idx": n % width, "up": lane - n, "down": lane + n, "bfly": 0}[mode]
            valid = t - lane <= source < t - lane + width
            if mode == "bfly":  # reaches over its segment, but only backwards
                source, valid = t ^ n, t ^ n < t - lane + width
            value = given[source] if valid else given[t]
            assert out[t].tolist() == [value, valid, value]


kernel(
    "votes",
    "given masks out",
    """
mad.wide.u32 x0, tid, 4, given; ld.global.u32 r0, [x0]; mad.wide.u32 x1, tid, 4, masks; ld.global.u32 r1, [x1]; setp.ne.u32 p0, r0, 0;
mad.wide.u32 x2, tid, 16, out; vote.sync.ballot.b32 r2, p0, r1; vote.sync.any.pred p1, p0, r1; vote.sync.all.pred p2, p0, r1;
vote.sync.uni.pred p3, p0, r1;
vote.sync.all.pred p4, !p0, r1; activemask.b32 r7;
selp.u32 r3, 1, 0, p1; @p2 or.b32 r3, r3, 2; @p3 or.b32 r3, r3, 4; @p4 or.b32 r3, r3, 8;
match.any.sync.b32 r4, r0, r1; st.global.v4.u32 [x2], {r2, r3, r4, r7};""",
)
kernel(
    "matches",
    "given masks out",
    """
mad.wide.u32 x0, tid, 8, given; ld.global.u64 x3, [x0]; mad.wide.u32 x1, tid, 4, masks; ld.global.u32 r1, [x1];
mad.wide.u32 x2, tid, 16, out;
match.any.sync.b64 r2, x3, r1; match.all.sync.b64 r3|p0, x3, r1; match.all.sync.b32 r5, r1, r1;
selp.u32 r4, 1, 0, p0; st.global.v4.u32 [x2], {r2, r3, r4, r5};""",
)
REDUCTIONS = {f"{name}.{kind}": f for name, f in [("add", sum), ("min", min), ("max", max)] for kind in ("u32", "s32")}
REDUCTIONS |= {f"{f.__name__.strip('_')}.b32": functools.partial(functools.reduce, f) for f in (operator.and_, operator.or_, operator.xor)}
for operation in REDUCTIONS:
    kernel(
        f"redux_{operation.replace('.', '_')}",
        "given masks out",
        f"""
mad.wide.u32 x0, tid, 4, given; ld.global.u32 r0, [x0]; mad.wide.u32 x1, tid, 4, masks; ld.global.u32 r1, [x1];
mad.wide.u32 x2, tid, 4, out;
redux.sync.{operation} r2, r0, r1; st.global.u32 [x2], r2;""",
    )
# Warps of 40 threads: a full one, and one of 8 lanes in two groups.
MASKS = np.array([0xFFFFFFFF] * 32 + [0x2D if 0x2D >> t & 1 else 0xD2 for t in range(8)], np.uint32)
GROUPS = [[t for t in range(40) if t // 32 == s // 32 and MASKS[s] >> t % 32 & 1] for s in range(40)]


def bits(lanes):
    return sum(1 << t % 32 for t in lanes)


@pytest.mark.parametrize("case", range(4))
def test_vote_match_and_activemask(case):
    given = np.array([np.random.default_rng(5).integers(0, 2, 40), np.zeros(40), np.ones(40), np.arange(40) // 3], np.uint32)[case]
    out = np.zeros((40, 4), np.uint32)
    launch("votes", given, MASKS, out, block=(40, 1, 1))
    for t, group in enumerate(GROUPS):
        ballot = [s for s in group if given[s]]
        flags = bool(ballot) + 2 * (ballot == group) + 4 * (ballot in ([], group)) + 8 * (not ballot)
        assert out[t].tolist() == [bits(ballot), flags, bits(s for s in group if given[s] == given[t]), 0xFFFFFFFF if t < 32 else 0xFF]
    wide = given.astype(np.uint64) << 40
    launch("matches", wide, MASKS, out, block=(40, 1, 1))
    for t, group in enumerate(GROUPS):
        alike, everyone = bits(s for s in group if wide[s] == wide[t]), bits(group)
        assert out[t].tolist() == [alike, everyone * (alike == everyone), alike == everyone, everyone]


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_redux(operation):
    given = np.random.default_rng(6).integers(0, 2**32, 40, dtype=np.uint32)
    out = np.zeros(40, np.uint32)
    launch(f"redux_{operation.replace('.', '_')}", given, MASKS, out, block=(40, 1, 1))
    values = given.view(np.int32) if ".s32" in operation else given
    assert out.tolist() == [REDUCTIONS[operation](values[group].tolist()) % 2**32 for group in GROUPS]


for kind, shape in (("tf32", "m16n8k8"), ("f16", "m16n8k16"), ("bf16", "m16n8k16")):
    kernel(
        f"mma_{kind}",
        "a b c d",
        f"""
mad.wide.u32 a, tid, 16, a; mad.wide.u32 b, tid, 8, b; mad.wide.u32 c, tid, 16, c; mad.wide.u32 d, tid, 16, d;
ld.global.v4.b32 {{r0, r1, r2, r3}}, [a]; ld.global.v2.b32 {{r4, r5}}, [b]; ld.global.v4.f32 {{f0, f1, f2, f3}}, [c];
mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{f4, f5, f6, f7}}, {{r0, r1, r2, r3}}, {{r4, r5}}, {{f0, f1, f2, f3}};
st.global.v4.f32 [d], {{f4, f5, f6, f7}};""",
    )


def fragments(kind):
    """-> (lane, element) -> (row, column) of a, b and c, transcribed from the PTX ISA's figures."""
    if kind == "tf32":
        a = {(x, i): (x // 4 + (8 if i in (1, 3) else 0), x % 4 + (4 if i >= 2 else 0)) for x in range(32) for i in range(4)}
        b = {(x, i): (x % 4 + (4 if i == 1 else 0), x // 4) for x in range(32) for i in range(2)}
    else:
        a = {
            (x, i): (x // 4 + (0 if 0 <= i < 2 or 4 <= i < 6 else 8), x % 4 * 2 + (i & 1) + (8 if i >= 4 else 0))
            for x in range(32)
            for i in range(8)
        }
        b = {(x, i): (x % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), x // 4) for x in range(32) for i in range(4)}
    c = {(x, i): (x // 4 + (0 if i < 2 else 8), x % 4 * 2 + (i & 1)) for x in range(32) for i in range(4)}
    return a, b, c


def held(matrix, places):
    out = np.zeros((32, len(places) // 32), matrix.dtype)
    for place, (row, column) in places.items():
        out[place] = matrix[row, column]
    return out


@pytest.mark.parametrize("kind", ["tf32", "f16", "bf16"])
def test_mma(kind):
    rng = np.random.default_rng(7)
    depth = 8 if kind == "tf32" else 16
    a, b, c = (rng.integers(-30, 30, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    stored = {"tf32": lambda x: (x.view(np.uint32) | 0x1FFF).view(np.float32), "f16": lambda x: x.astype(np.float16),
              "bf16": lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)}[kind]  # fmt: skip
    at = fragments(kind)
    arrays = [held(stored(a), at[0]), held(stored(b), at[1]), held(c, at[2]), np.zeros((32, 4), np.float32)]
    launch(f"mma_{kind}", *arrays)
    expected = held(a @ b + c, at[2])
    assert (arrays[3] == expected).all()  # the low bits of tf32 are dropped; every sum is exact
    for given, swapped in [("{r0, r1,", "{r1, r0,"), ("r2, r3}, {r4", "r3, r2}, {r4"), ("{r4, r5}, {f", "{r5, r4}, {f")]:
        before, after = KERNELS[f"mma_{kind}"].split("mma.sync")
        other = Module(HEADER + before + "mma.sync" + after.replace(given, swapped))
        launch(f"mma_{kind}", *arrays, on=other)
        assert (arrays[3] != expected).any()


for count, trans in itertools.product((1, 2, 4), ("", ".trans")):
    parts = ", ".join(f"r{i}" for i in range(count))
    kernel(
        f"ldmatrix_{count}{trans[1:]}",
        "rows given out",
        f"""
.shared .align 16 .b8 memory[1024];
mov.u32 r8, memory; mad.wide.u32 x0, tid, 4, rows; ld.global.u32 r9, [x0]; mad.wide.u32 x1, tid, 32, given; mad.lo.u32 r10, tid, 32, r8;
ld.global.v4.u32 {{r0, r1, r2, r3}}, [x1]; st.shared.v4.u32 [r10], {{r0, r1, r2, r3}};
ld.global.v4.u32 {{r0, r1, r2, r3}}, [x1+16]; st.shared.v4.u32 [r10+16], {{r0, r1, r2, r3}}; bar.warp.sync -1;
add.u32 r8, r8, r9; ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{parts}}}, [r8];
mad.wide.u32 x2, tid, 16, out; st.global.v4.u32 [x2], {{r0, r1, r2, r3}};""",
    )


@pytest.mark.parametrize("trans", ["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    rng = np.random.default_rng(8)
    given, out = rng.integers(0, 2**16, 512, dtype=np.uint16), np.zeros((32, 8), np.uint16)
    rows = (rng.permutation(64)[:32] * 16).astype(np.uint32)
    rows[8 * count :] = 3  # neither aligned nor looked at
    launch(f"ldmatrix_{count}{trans}", rows, given, out)
    for i in range(count):
        matrix = np.stack([given[row // 2 :][:8] for row in rows[8 * i : 8 * i + 8]])
        matrix = matrix.T if trans else matrix
        assert (out[:, 2 * i : 2 * i + 2] == matrix.reshape(32, 2)).all()


kernel(
    "barriers",
    "out",
    """
.shared .align 4 .b8 memory[160];
mov.u32 r0, memory; mad.lo.u32 r1, tid, 4, r0; setp.lt.u32 p0, tid, 30; setp.lt.u32 p1, tid, 99; setp.gt.u32 p2, tid, 99; mov.u32 r9, 0;
mov.u32 r2, tid;
LOOP:
st.shared.u32 [r1], r2; barrier.sync.aligned 0; mov.u32 r3, 156; sub.u32 r3, r3, 0; mad.lo.u32 r4, tid, -4, r3; add.u32 r4, r4, r0;
ld.shared.u32 r2, [r4];
add.u32 r2, r2, 1; add.u32 r9, r9, 1; bar.sync 0; setp.lt.u32 p3, r9, 3; @p3 bra LOOP;
bar.red.popc.u32 r5, 0, p0; bar.red.and.pred p4, 0, p1; bar.red.or.pred p5, 0, p2; barrier.red.or.pred p6, 0, p0;
selp.u32 r6, 1, 0, p4; @p5 or.b32 r6, r6, 2; @p6 or.b32 r6, r6, 4; mad.wide.u32 x0, tid, 12, out;
st.global.u32 [x0], r2; st.global.u32 [x0+4], r5; st.global.u32 [x0+8], r6;""",
)


def test_barriers():
    out = np.zeros((40, 3), np.uint32)
    launch("barriers", out, block=(40, 1, 1))
    assert (out == [[39 - t + 3, 30, 5] for t in range(40)]).all()


# Control flow ---------------------------------------------------------------------------------------------------------
kernel(
    "collatz",
    "out",
    """
add.u32 r0, tid, 1; mov.u32 r1, 0;
LOOP: setp.eq.u32 p0, r0, 1; @p0 bra DONE;
and.b32 r2, r0, 1; setp.ne.u32 p1, r2, 0; @p1 bra ODD; shr.u32 r0, r0, 1; bra.uni NEXT;
ODD: mad.lo.u32 r0, r0, 3, 1;
NEXT: add.u32 r1, r1, 1; bra LOOP;
DONE: activemask.b32 r3; mad.wide.u32 x0, tid, 8, out; st.global.v2.u32 [x0], {r1, r3};""",
)
kernel(
    "switch",
    "out",
    """
rem.u32 r0, tid, 4; mad.wide.u32 x0, tid, 4, out; setp.eq.u32 p0, tid, 5; @p0 exit;
TABLE: .branchtargets ZERO, ONE, TWO, ONE;
brx.idx r0, TABLE;
ZERO: st.global.u32 [x0], 100; bra END;
ONE: st.global.u32 [x0], 101; @p0 bra END; setp.gt.u32 p1, tid, 20; @p1 ret; st.global.u32 [x0], 102; bra END;
TWO: st.global.u32 [x0], 103;
END: ld.global.u32 r1, [x0]; add.u32 r1, r1, 1000; st.global.u32 [x0], r1;""",
)
# What inline asm expands to when nvcc unrolls: the same names again, with other types, in scopes of their own.
kernel(
    "scopes",
    "out",
    """
.reg .b32 t; mov.u32 t, 1;
{ .reg .b64 t; cvt.u64.u32 t, tid; add.u64 t, t, 5; cvt.u32.u64 r0, t; .reg .pred q; setp.lt.u32 q, tid, 3; @q bra SKIP;
add.u32 r0, r0, 100;
SKIP: add.u32 r0, r0, 1; }
{ .reg .f32 t; mov.f32 t, 0f40000000; cvt.rzi.u32.f32 r1, t; .reg .pred q; setp.lt.u32 q, tid, 6; @q bra SKIP; add.u32 r1, r1, 1000;
SKIP: add.u32 r0, r0, r1; }
add.u32 r0, r0, t; /* a comment; { with punctuation */ mad.wide.u32 x0, tid, 4, out; // and another; }
st.global.u32 [x0], r0; .pragma "nounroll";""",
)


def test_loops_of_different_length_and_reconvergence():
    out = np.zeros((40, 2), np.uint32)
    launch("collatz", out, block=(40, 1, 1))

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert out[:, 0].tolist() == [steps(t + 1) for t in range(40)]
    assert out[:, 1].tolist() == [0xFFFFFFFF] * 32 + [0xFF] * 8


def test_switch_exit_and_ret():
    out = np.zeros(32, np.uint32)
    launch("switch", out)
    expected = [[1100, 1102, 1103, 1102][t % 4] if t < 21 or t % 2 == 0 else 101 for t in range(32)]
    expected[5] = 0
    assert out.tolist() == expected


def test_scopes():
    out = np.zeros(32, np.uint32)
    launch("scopes", out)
    assert out.tolist() == [t + 5 + 100 * (t >= 3) + 1 + 2 + 1000 * (t >= 6) + 1 for t in range(32)]


# A collective in a loop that lanes leave at different times: the mask shrinks with them.
kernel(
    "shrinking",
    "out",
    """
mov.u32 r0, 0; mov.u32 r5, 0;
LOOP: setp.gt.u32 p0, r0, tid; mov.u32 r1, 0xffffffff; shl.b32 r1, r1, r0; @p0 bra DONE;
setp.eq.u32 p2, tid, tid; vote.sync.ballot.b32 r2, p2, r1; popc.b32 r3, r2; add.u32 r5, r5, r3; add.u32 r0, r0, 1; setp.lt.u32 p1, r0, 32;
@p1 bra LOOP;
DONE: mad.wide.u32 x0, tid, 4, out; bar.warp.sync 0xffffffff; st.global.u32 [x0], r5;""",
)
# Halves of a warp come to one shuffle on different ways, at different times, with masks of their own.
kernel(
    "halves",
    "out",
    """
setp.lt.u32 p0, tid, 16; mov.u32 r0, 0xffff; @p0 bra MEET; mov.u32 r0, 0xffff0000; bra LATE;
MEET: shfl.sync.bfly.b32 r1, tid, 15, 0x1f, r0; bra DONE;
LATE: add.u32 tid, tid, 100; bra MEET;
DONE: mov.u32 r2, %tid.x; mad.wide.u32 x0, r2, 4, out; st.global.u32 [x0], r1;""",
)


kernel(
    "active",
    "out",
    """
setp.lt.u32 p0, tid, 3; mov.u32 r0, 0; mad.wide.u32 x0, tid, 4, out; @p0 bra END;
activemask.b32 r0; @!p0 activemask.b32 r1; and.b32 r0, r0, r1;
END: st.global.u32 [x0], r0;""",
)


def test_activemask_of_some_lanes():
    out = np.zeros(40, np.uint32)
    launch("active", out, block=(40, 1, 1))
    assert out.tolist() == [0] * 3 + [0xFFFFFFF8] * 29 + [0xFF] * 8


def test_collectives_of_some_lanes():
    out = np.zeros(32, np.uint32)
    launch("shrinking", out)
    assert out.tolist() == [sum(32 - i for i in range(t + 1)) for t in range(32)]
    launch("halves", out)
    assert out.tolist() == [t ^ 15 if t < 16 else (t ^ 15) + 100 for t in range(32)]


# Faults ---------------------------------------------------------------------------------------------------------------
FAULTS = {  # name -> PTX, what the message says
    "global_out_of_bounds": (
        "mad.wide.u32 x0, tid, 4, out; st.global.u32 [x0+4], tid;",
        r"thread \(31,0,0\): global out of bounds: 4 bytes.*st\.global",
    ),
    "global_before_the_first": ("ld.global.u32 r0, [out+-4];", r"threads \(0,0,0\) .* and 28 more: global out of bounds"),
    "straddling": (
        "ld.global.v2.u32 {r0, r1}, [out+120]; ld.global.v4.u32 {r0, r1, r2, r3}, [out+112]; ld.global.u64 x0, [out+128];",
        "out of bounds: 8 bytes",
    ),
    "null": ("mov.u64 x0, 0; ld.u32 r0, [x0];", "global out of bounds: 4 bytes at 0x0"),
    "not_canonical": ("mov.u64 x0, -4; ld.u32 r0, [x0];", "global out of bounds"),
    "shared_out_of_bounds": (
        ".shared .b32 memory[8]; mad.wide.u32 x0, tid, 4, 0; ld.shared.u32 r0, [x0+4];",
        "shared out of bounds: 4 bytes at 0x20",
    ),
    "shared_through_generic": (
        ".shared .b32 memory[8]; mov.u64 x0, memory; cvta.shared.u64 x0, x0; st.u32 [x0+32], tid;",
        "shared out of bounds",
    ),
    "local_out_of_bounds": (".local .b32 depot[2]; st.local.u32 [depot+8], tid;", "local out of bounds: 4 bytes at 0x8"),
    "misaligned": ("ld.global.u32 r0, [out+2];", "global misaligned: 4 bytes"),
    "misaligned_vector": ("ld.global.v4.u32 {r0, r1, r2, r3}, [out+8];", "global misaligned: 16 bytes"),
    "misaligned_atomic": ("atom.global.add.u64 x0, [out+4], 1;", "global misaligned: 8 bytes"),
    "misaligned_copy": (
        ".shared .align 16 .b8 m[32]; mov.u32 r0, m; cp.async.ca.shared.global [r0+4], [out], 8;",
        "shared misaligned: 8 bytes",
    ),
    "misaligned_source": (".shared .align 16 .b8 m[32]; mov.u32 r0, m; cp.async.cg.shared.global [r0], [out+8], 16;", "global misaligned"),
    "copy_out_of_bounds": (
        ".shared .align 16 .b8 m[32]; mov.u32 r0, m; cp.async.ca.shared.global [r0], [out+128], 4;",
        "global out of bounds",
    ),
    "copy_of_too_many": (
        ".shared .align 16 .b8 m[32]; mov.u32 r0, m; mov.u32 r1, 5; cp.async.ca.shared.global [r0], [out], 4, r1;",
        "copies 5 of 4 bytes",
    ),
    "divergent_barrier": (
        "setp.lt.u32 p0, tid, 7; @p0 bra A; bar.sync 0; ret; A: bar.sync 0;",
        r"threads \(7,0,0\).* and 21 more: waits for ever: threads \(0,0,0\).* and 3 more wait at `bar\.sync 0`",
    ),
    "exited_before_barrier": ("setp.eq.u32 p0, tid, 3; @p0 ret; bar.sync 0;", r"waits for ever: thread \(3,0,0\) exited at `bar.sync 0`"),
    "barrier_of_some": ("setp.eq.u32 p0, tid, 3; @p0 bar.sync 0;", r"thread \(3,0,0\): waits for ever: .* exited"),
    "not_in_mask": ("bar.warp.sync 0xfffffffe;", r"thread \(0,0,0\): the lane is not in its own membermask"),
    "lane_exited": (
        "setp.eq.u32 p0, tid, 9; @p0 exit; vote.sync.any.pred p1, p0, -1;",
        "membermask names a lane that has exited or never was",
    ),
    "source_outside_mask": (
        "setp.gt.u32 p0, tid, 7; @p0 bra END; shfl.sync.down.b32 r0, tid, 1, 31, 0xff; END:",
        r"thread \(7,0,0\): reads a lane outside",
    ),
    "collective_deadlock": (
        "setp.lt.u32 p0, tid, 7; @p0 bra A; bar.warp.sync -1; ret; A: redux.sync.add.u32 r0, tid, -1;",
        "wait at `redux",
    ),
    "two_masks": (
        "setp.eq.u32 p0, tid, 0; selp.b32 r0, 0xffffffff, 0xfffffffe, p0; bar.warp.sync r0; bar.warp.sync r0;",
        "waits for ever: .*exited",
    ),
    "partial_warp_mma": (
        "setp.eq.u32 p0, tid, 9; @p0 exit; "
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {f0,f1,f2,f3}, {r0,r1,r2,r3}, {r4,r5}, {f0,f1,f2,f3};",
        "has exited",
    ),
    "misaligned_matrix": (
        ".shared .align 16 .b8 m[32]; mov.u32 r0, m; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r1}, [r0+8];",
        "shared misaligned: 16 bytes",
    ),
    "matrix_out_of_bounds": (
        ".shared .align 16 .b8 m[40]; mov.u32 r0, m; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r1}, [r0+32];",
        "shared out of bounds: 16 bytes",
    ),
    "division_by_zero": ("sub.u32 r0, tid, 5; div.u32 r1, tid, r0;", r"thread \(5,0,0\): division by zero"),
    "no_such_label": ("TABLE: .branchtargets A; brx.idx tid, TABLE; A:", "no label for this index"),
    "trap": ("setp.eq.u32 p0, tid, 4; @p0 trap;", r"thread \(4,0,0\): trap at `@p0 trap`"),
}
for name, (text, _) in FAULTS.items():
    kernel(f"fault_{name}", "out", text)


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    memory = np.zeros(80, np.uint32)
    out = memory[-memory.ctypes.data % 64 // 4 :][:64]
    halves = [(out.ctypes.data, 128), (out.ctypes.data + 132, 64)]
    if name == "straddling":
        halves = [(out.ctypes.data, 132), (out.ctypes.data + 132, 64)]  # neighbours, and 8 bytes across them
    with pytest.raises(Fault, match=FAULTS[name][1]) as info:
        launch(f"fault_{name}", out, regions=halves)
    assert f"fault_{name}, block (0, 0, 0), thread" in str(info.value)


def test_overlapping_regions_are_one_region():
    out = np.zeros(64, np.uint32)
    with pytest.raises(Fault, match=f"out of bounds: 8 bytes at {out.ctypes.data + 128:#x}"):  # they cover 132 bytes together
        launch("fault_straddling", out, regions=[(out.ctypes.data, 124), (out.ctypes.data + 100, 32), (out.ctypes.data, 20)])


def test_a_lane_that_never_was():
    given = np.zeros(40, np.uint32)
    with pytest.raises(Fault, match=r"threads \(32,0,0\) .* and 4 more: the membermask names a lane"):
        launch("votes", given, np.full(40, 0xFFFFFFFF, np.uint32), np.zeros((40, 4), np.uint32), block=(40, 1, 1))


def test_dynamic_shared_memory_ends_where_the_launch_says():
    with pytest.raises(Fault, match="shared out of bounds: 4 bytes at 0x10c"):
        launch("shared_spaces", np.zeros((32, 8), np.uint32), shared=124)


LINES = """.entry k() {
.reg .b32 r<2>; .reg .b64 x<2>;
.loc 1 7 3
mov.u64 x0, 16;
.loc 2 41 5, function_name $L__info_string0, inlined_at 1 9 1
.loc 2 0 5
ld.global.u32 r0, [x0];
ret;
}
.file 1 "kernel.cu"
.file 2 "some//where.cuh"
.section .debug_str { $L__info_string0: .b8 95,0 }
"""


def test_lines_of_the_source():
    place = r"thread \(0,0,0\): .* at `ld\.global\.u32 r0, \[x0\]` \(some//where\.cuh:41 in kernel\.cu:9\)$"
    with pytest.raises(Fault, match=r"k, block \(0, 0, 0\), " + place):
        Module(HEADER + LINES).launch("k", (1, 1, 1), (1, 1, 1))


UNKNOWN = [
    "frobnicate.b32 r0, r1;",
    "add.s16x2 r0, r0, r1;",
    "add.sat.s32 r0, r0, r1;",
    "dp4a.u32.u32 r0, r0, r1, r2;",
    "ld.global.frozen.u32 r0, [out];",
    "bar.sync 0, 64;",
    "shfl.up.b32 r0, r1, 1, 0;",
    "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {r0}, {r0}, {r0}, {r0};",
    "membar.proxy;",
    "call helper;",
    "mov.u32 r0, %clock;",
    "cvt.rn.relu.bf16.f32 h0, f0;",
    "cvt.s32.f32 r0, f0;",
    "fma.rn.bf16 h0, h1, h2, h3;",
    "setp.ltu.s32 p0, r0, r1;",
    "mov.b64 x0, r0;",
    "atom.global.add.f16 h0, [out], h1;",
    "cp.async.bulk.commit_group;",
    "add.rz.f64 g0, g0, g1;",
    "ld.shared::cluster.u32 r0, [r1];",
    "cp.async.cg.shared.global [r0], [out], 8;",
    "min.xorsign.abs.f32 f0, f1, f2;",
    ".reg .b128 q;",
    ".weird 3;",
]


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_unknown_instructions_are_refused_before_anything_runs(instruction):
    out = np.zeros(4, np.uint32)
    text = HEADER + entry("unknown", "out", f"st.global.u32 [out], 1; {instruction}")
    with pytest.raises(NotImplementedError, match=re.escape(re.match(r"[^;]*?(?=;| [a-z])", instruction)[0])):
        Module(text).launch("unknown", (1, 1, 1), (1, 1, 1), 0, [struct.pack("Q", out.ctypes.data)], [(out.ctypes.data, 16)])
    assert (out == 0).all()


def test_bad_launches():
    out = np.zeros(4096, np.uint32)
    limited = Module(HEADER + ".entry k()\n.maxntid 64, 1, 1\n.minnctapersm 2\n{ ret; }")
    limited.launch("k", (1, 1, 1), (64, 1, 1))
    for block in ((65, 1, 1), (0, 1, 1)):
        with pytest.raises(Fault, match="block"):
            limited.launch("k", (1, 1, 1), block)
    with pytest.raises(Fault, match="parameters"):
        launch("lost_update", out, out)
    assert (out == 0).all()


# The tests themselves -------------------------------------------------------------------------------------------------
def test_every_opcode_is_tested():
    tested = {opcode.split(".")[0] for entry in module().entries.values() for opcode in entry.opcodes}
    assert tested == set(OPCODES)
    assert "fma.rn.f32" in module().entries["fma_rn_f32"].opcodes


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas")
def test_the_kernels_are_ptx(tmp_path):
    (tmp_path / "all.ptx").write_text(HEADER + "".join(KERNELS.values()))
    done = subprocess.run(["ptxas", "-arch=sm_90", "-O0", "-o", "/dev/null", tmp_path / "all.ptx"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
