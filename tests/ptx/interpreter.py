"""Executes the PTX that nvcc emits, inline asm included, on the CPU: numpy works on all threads of a block at once.

Threads that went different ways take turns, those at the lowest instruction first, and go on together where their ways meet;
barriers and warp collectives hold them until everybody is there. Blocks run one after another. So no data race ever shows, and a
thread that spins until another one writes never ends. Sums inside mma and the .approx functions are float64 rounded once: expect
a GPU's results, not its bits. Calls, and whatever else is not implemented, raise NotImplementedError when their kernel is
launched, before it runs.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections import ChainMap, namedtuple
from types import SimpleNamespace

import numpy as np

DTYPES = {f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}") for kind in "bsu" for bits in (8, 16, 32, 64)}
DTYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
U16, U32, I64, U64, F16, F32, F64, PRED = (np.dtype(name) for name in ("u2", "u4", "i8", "u8", "f2", "f4", "f8", "?"))
NAN = {F16: np.array(0x7FFF, U16).view(F16), F32: np.array(0x7FFFFFFF, U32).view(F32)}
LANE = np.arange(32)
WINDOW = {"global": 0, "const": 0, "shared": 1 << 56, "local": 2 << 56, "param": 3 << 56}  # generic address = window + address
# When and through which caches an access is done, and who sees it when: all one to threads in lock step.
CACHING = (
    "weak volatile relaxed acquire release acq_rel cta cluster gpu sys ca cg cs lu cv wb wt nc L1::evict_normal "
    "L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate L2::64B L2::128B L2::256B"
).split()


class Fault(RuntimeError):
    """The kernel did what a GPU punishes or leaves undefined."""


# Text -----------------------------------------------------------------------------------------------------------------
COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.S)
LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file|version|target|address_size)\b[^\n;]*$", re.M)  # these go without a semicolon
SECTION = re.compile(r"\.section\s+\S+\s*\{[^}]*\}")
FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])")
STATEMENT = re.compile(r"\s*(?:([\w$%]+)\s*:(?!:)|([{}])|((?:[^;{}]|\{[^{}]*\})+);)")
INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+) )?([a-z][\w.:]*) ?(.*)")
DECLARATION = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(param|global|const|shared|local)(?:\s+\.align\s+(\d+))?\s+\.([bsuf]\d+)"
    r"(?:\s+\.\w+(?:\s+\d+)?)*\s+([\w$%]+)((?:\[\d*\])*)\s*(?:=(.*))?",
    re.S,
)
Register = namedtuple("Register", "bits index")  # 1 bit: a predicate
Address = namedtuple("Address", "base offset")
Instruction = namedtuple("Instruction", "text opcode operands guard negated names source")  # names: in scope; source: file:line
Variable = namedtuple("Variable", "space name align size data")


def number(token, dtype):
    """A literal. Integers wrap; 0f and 0d announce the bits of a float in hexadecimal."""
    if token[:2].lower() in ("0f", "0d"):
        value = np.array(int(token[2:], 16), U32 if token[1] in "fF" else U64)
        return value.view(f"f{value.itemsize}").astype(dtype) if dtype.kind == "f" else value.view(dtype)
    if dtype.kind == "f":
        return dtype.type(token)
    value = int(token.rstrip("U"), 0)
    return np.bool_(value) if dtype == PRED else np.array(value & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)


def declaration(text):
    try:
        space, align, kind, name, shape, initial = DECLARATION.fullmatch(text.strip()).groups()
        dtype = DTYPES[kind]
        data = b"".join(number(token, dtype).tobytes() for token in re.findall(r"[^\s,{}]+", initial or ""))
    except (AttributeError, KeyError, ValueError):
        raise NotImplementedError(f"declaration: {text.strip()}") from None
    size = dtype.itemsize * math.prod(int(n or 0) for n in re.findall(r"\[(\d*)\]", shape))  # 0: dynamic
    return Variable(space, name, int(align or dtype.itemsize), size, data.ljust(size, b"\0"))


def lay_out(variables):
    """-> the offset of each variable and the end of the last."""
    offsets, end = {}, 0
    for v in variables:
        offsets[v.name] = end + -end % v.align
        end = offsets[v.name] + v.size
    return offsets, end


class Body:
    """The instructions of an entry: registers numbered by width, labels as places in the code."""

    def __init__(self, text, files):
        self.code, self.variables, self.leaders, self.files = [], [], {0}, files
        self.counts = {1: 0, 16: 0, 32: 0, 64: 0}
        self.names, self.source, label = ChainMap(), "?", None
        at, text = 0, text.strip()
        while at < len(text):
            found = STATEMENT.match(text, at)
            if not found:
                raise NotImplementedError(f"statement: {text[at : at + 60]}")
            at = found.end()
            if found[1]:
                label = f":{found[1]}"
                self.names[label] = len(self.code)
                self.leaders.add(len(self.code))
            elif found[2]:
                self.names = self.names.new_child() if found[2] == "{" else self.names.parents
            else:
                self.statement(" ".join(found[3].split()), label)

    def statement(self, text, label):
        directive, *words = text.replace(",", " ").split()
        if directive == ".loc":
            places = [words[:2], *([words[-3:-1]] if "inlined_at" in words else [])]
            if words[1] != "0":
                self.source = " in ".join(f"{self.files.get(file, file)}:{line}" for file, line in places)
        elif directive == ".reg":
            self.declare(*words)
        elif directive in (".shared", ".local"):
            self.variables.append(declaration(text))
        elif directive == ".branchtargets":
            self.names[label] = words
        elif directive != ".pragma":
            self.instruction(text)

    def declare(self, kind, *names):
        bits = 1 if kind == ".pred" else int(kind[2:])
        if bits not in self.counts:
            raise NotImplementedError(f".reg {kind}")
        for name in names:
            stem, _, count = name.rstrip(">").partition("<")
            for full in [f"{stem}{i}" for i in range(int(count))] if count else [name]:
                self.names[full] = self.register(bits)

    def register(self, bits):
        self.counts[bits] += 1
        return Register(bits, self.counts[bits] - 1)

    def instruction(self, text):
        found = INSTRUCTION.fullmatch(text)
        if not found:
            raise NotImplementedError(text)
        negate, guard, opcode, rest = found.groups()
        operands = [self.operand(token) for token in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest.replace(" ", ""))]
        self.code.append(Instruction(text, opcode, operands, guard and self.names[guard], bool(negate), self.names, self.source))

    def operand(self, token):
        if token[0] == "{" or "|" in token:
            return [self.operand(part) for part in re.split(r"[,|]", token.strip("{}"))]
        if token[0] == "[":
            base, offset = re.fullmatch(r"([^+-]+)(?:\+?(-?\w+))?", token[1:-1]).groups()
            return Address(self.names.get(base, base), int(offset or "0", 0))
        if token[0] == "!":  # an instruction of its own, so that all others read plain registers
            negated = self.register(1)
            self.code.append(Instruction(token, "not.pred", [negated, self.names[token[1:]]], None, False, self.names, self.source))
            return negated
        return self.names.get(token, token)


# Numbers --------------------------------------------------------------------------------------------------------------
def flush(x):
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def saturate(x):
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))  # NaN and -0 become 0


def canonical(x):
    """With the one NaN of each format; float64 keeps what it gets."""
    return x if x.dtype == F64 else np.where(x == x, x, NAN[x.dtype])


def exact_sum(a, b, mode):
    """-> (sum, error) in float64; together they are a + b, exactly."""
    a, b = a.astype(F64), b.astype(F64)
    high = a + b
    t = high - a
    low = (a - (high - t)) + (b - t)
    if mode == "rm":
        high = np.where((high == 0) & (np.signbit(a) != np.signbit(b)), -0.0, high)
    return high, np.where(np.isfinite(low), low, 0)


def narrow(high, low, mode, dtype):
    """high + low, |low| at most half an ulp of high in float64, rounded once."""
    if mode == "rn":
        bits = high.view(I64)  # rounded to odd in float64, a sum lies on the right side of every tie in dtype
        return np.where((low != 0) & (bits & 1 == 0), bits + np.where((low > 0) == (high > 0), 1, -1), bits).view(F64).astype(dtype)
    near = high.astype(dtype)
    above, below = near.astype(F64) - high > low, near.astype(F64) - high < low
    wrong = {"rm": above, "rp": below, "rz": np.where(high > 0, above, below)}[mode]
    return np.where(wrong, np.nextafter(near, dtype.type({"rm": -np.inf, "rp": np.inf, "rz": 0}[mode])), near)


LIBM = ctypes.CDLL("libm.so.6")
LIBM.fma.restype, LIBM.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
FMA64 = np.frompyfunc(LIBM.fma, 3, 1)


def extreme(of, zeros):
    """min or max. Equal floats differ in the sign of zero at most, and then their bits decide."""

    def f(a, b):
        same = zeros(a.view(f"u{a.itemsize}"), b.view(f"u{a.itemsize}")).view(a.dtype)
        return np.where(a == b, same, of(a, b))

    return f


NEAREST = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt, "rcp": np.reciprocal,
    "abs": np.abs, "neg": np.negative, "copysign": lambda a, b: np.copysign(b, a),
    "min": extreme(np.fmin, np.bitwise_or), "max": extreme(np.fmax, np.bitwise_and),
    "min.NaN": extreme(np.minimum, np.bitwise_or), "max.NaN": extreme(np.maximum, np.bitwise_and),
}  # fmt: skip
EXACT = {  # -> (result, error) in float64, of floats of at most 32 bits
    "add": exact_sum, "sub": lambda a, b, mode: exact_sum(a, -b, mode), "mul": lambda a, b, mode: (a.astype(F64) * b, np.zeros(len(a))),
    "fma": lambda a, b, c, mode: exact_sum(a.astype(F64) * b, c, mode),
}  # fmt: skip
APPROXIMATE = {
    "div": np.divide, "sqrt": np.sqrt, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
COMPARE_FLOATS = {name: COMPARE[name] for name in ("eq", "lt", "le", "gt", "ge")} | {
    "ne": lambda a, b: (a < b) | (a > b), "neu": np.not_equal, "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


def bits_of(x):  # (threads, width), lowest first
    return np.unpackbits(np.ascontiguousarray(x).view("u1").reshape(len(x), -1), axis=1, bitorder="little")


def highest_bit(x):
    x = x ^ (x >> 8 * x.itemsize - 1) if x.dtype.kind == "i" else x
    return np.where(x == 0, -1, 8 * x.itemsize - 1 - bits_of(x)[:, ::-1].argmax(1))


def shift_left(x, n):
    return np.where(n < 8 * x.itemsize, x << np.minimum(n, 8 * x.itemsize - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x, n):
    shifted = x >> np.minimum(n, 8 * x.itemsize - 1).astype(x.dtype)
    return np.where((n < 8 * x.itemsize) | (x.dtype.kind == "i"), shifted, x.dtype.type(0))


def low_ones(n, dtype):
    return ~shift_left(np.full(len(n), -1).astype(dtype), n)


def extract_bits(x, start, length):
    width, start, length = 8 * x.itemsize, start & 255, length & 255
    kept = low_ones(np.minimum(length, width - np.minimum(start, width)), x.dtype)
    sign = shift_right(x, np.minimum(start + length.astype(I64) - 1, width - 1)) & 1
    value = shift_right(x, start) & kept
    return np.where((x.dtype.kind == "i") & (sign != 0) & (length > 0), value | ~kept, value)


def insert_bits(x, into, start, length):
    mask = shift_left(low_ones(length & 255, x.dtype), start & 255)
    return into & ~mask | shift_left(x, start & 255) & mask


def permute_bytes(a, b, selectors):
    pool = np.stack([a, b], 1).view("u1")
    nibbles = selectors[:, None] >> np.arange(0, 16, 4, dtype=U32) & 15
    chosen = np.take_along_axis(pool, (nibbles & 7).astype(I64), 1)
    return np.where(nibbles & 8, (chosen.view("i1") >> 7).view("u1"), chosen).view(U32).reshape(-1)


def look_up(a, b, c, table):
    """lop3: bit i of table says what becomes of bits 4, 2 and 1 of i in a, b and c."""
    terms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) & -(table >> i & 1) for i in range(8))
    return functools.reduce(np.bitwise_or, terms)


def wider(dtype):
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def high_product(a, b):
    if a.itemsize < 8:
        return (a.astype(wider(a.dtype)) * b >> 8 * a.itemsize).astype(a.dtype)
    x, y, low, half = a.view(U64), b.view(U64), U64.type(0xFFFFFFFF), U64.type(32)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    high = (x >> half) * (y >> half) + (middle >> half) + ((x & low) * (y >> half) + (middle & low) >> half)
    return high.view(a.dtype) - (np.where(a < 0, b, 0) + np.where(b < 0, a, 0)).astype(a.dtype)


def quotient(a, b):
    floor = a // b
    return np.where((floor * b != a) & ((a < 0) != (b < 0)), floor + 1, floor)


def joined(low, high):
    return high.astype(U64) << 32 | low


INTEGER = {  # t: the instruction's type, u: .u32; the destination comes first
    "add": ("ttt", np.add), "sub": ("ttt", np.subtract), "min": ("ttt", np.minimum), "max": ("ttt", np.maximum),
    "div": ("ttt", quotient), "rem": ("ttt", lambda a, b: a - quotient(a, b) * b), "abs": ("tt", np.abs), "neg": ("tt", np.negative),
    "and": ("ttt", np.bitwise_and), "or": ("ttt", np.bitwise_or), "xor": ("ttt", np.bitwise_xor), "not": ("tt", np.invert),
    "shl": ("ttu", shift_left), "shr": ("ttu", shift_right), "popc": ("ut", lambda x: bits_of(x).sum(1)),
    "clz": ("ut", lambda x: 8 * x.itemsize - 1 - highest_bit(x)),
    "brev": ("tt", lambda x: np.packbits(bits_of(x)).view(x.dtype).byteswap()),
    "bfe": ("ttuu", extract_bits), "bfi": ("tttuu", insert_bits), "prmt": ("tttt", permute_bytes), "lop3": ("ttttt", look_up),
    "bfind": ("ut", highest_bit), "bfind.shiftamt": ("ut", lambda x: np.where(x != 0, 8 * x.itemsize - 1 - highest_bit(x), -1)),
    "shf.l.wrap": ("tttt", lambda low, high, n: joined(low, high) << (n & 31) >> 32),
    "shf.l.clamp": ("tttt", lambda low, high, n: joined(low, high) << np.minimum(n, 32) >> 32),
    "shf.r.wrap": ("tttt", lambda low, high, n: joined(low, high) >> (n & 31)),
    "shf.r.clamp": ("tttt", lambda low, high, n: joined(low, high) >> np.minimum(n, 32)),
}  # fmt: skip
TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def from_bfloat16(bits):
    return (bits.astype(U32) << 16).view(F32)


def to_bfloat16(x):
    bits = x.view(U32)
    return np.where(x == x, bits + 0x7FFF + (bits >> 16 & 1) >> 16, 0x7FFF).astype(U16)


def saturated_integers(x, dtype, from_f64):
    """NaN becomes 0, or the top bit if a double or a 64-bit integer takes part."""
    limits, top = np.iinfo(dtype), 2.0 ** (8 * dtype.itemsize - (dtype.kind == "i"))
    nan = np.array(1 << 8 * dtype.itemsize - 1 if from_f64 or dtype.itemsize == 8 else 0, f"u{dtype.itemsize}").view(dtype)
    inside = np.where((x >= limits.min) & (x < top), x, 0).astype(dtype)
    return np.select([x != x, x >= top, x < limits.min], [nan, dtype.type(limits.max), dtype.type(limits.min)], inside)


def conversion(source, target, mode, ftz, sat):
    """cvt between these types, as a function of an array."""

    def between_integers(x):
        if sat:
            a, b = np.iinfo(source), np.iinfo(target)
            x = np.clip(x, source.type(max(a.min, b.min)), source.type(min(a.max, b.max)))
        return x.astype(target)

    def to_integers(x):
        return saturated_integers(TO_INTEGRAL[mode]((flush(x) if ftz else x).astype(F64)), target, source == F64)

    def to_floats(x):
        if source.kind == "f":
            x = TO_INTEGRAL.get(mode, np.positive)(flush(x) if ftz else x)
        if mode not in ("rz", "rm", "rp"):
            x = x.astype(target)
        elif source.kind == "f":
            x = narrow(x.astype(F64), np.zeros(len(x)), mode, target)
        else:  # in halves, since float64 does not hold 64 bits
            x = x.astype(f"{source.kind}8")
            x = narrow(*exact_sum((x >> 16).astype(F64) * 65536, x & 65535, mode), mode, target)
        x = flush(x) if ftz else x
        x = canonical(x) if mode or source != target else x  # bfloat16 widens bit by bit
        return saturate(x) if sat else x

    return to_floats if target.kind == "f" else to_integers if source.kind == "f" else between_integers


# Memory and operands --------------------------------------------------------------------------------------------------
class Space:
    """The bytes of a state space. An access must lie inside one of the regions (address, size)."""

    def __init__(self, name, memory, regions, base=0, strides=None):
        self.name, self.memory, self.base, self.strides = name, memory, base, strides  # strides: what to add for each thread
        spans = np.array(sorted(regions), I64).reshape(-1, 2)
        ends = np.maximum.accumulate(spans.sum(1))
        apart = spans[1:, 0] >= ends[:-1]  # overlapping ones count as one, neighbours do not
        self.starts = spans[np.append(True, apart)[: len(spans)], 0]
        self.ends = np.append(np.iinfo(I64).min + 16, ends[np.append(apart, True)[: len(spans)]])

    def locate(self, op, lanes, address, size, align):
        """-> where in memory the lanes' accesses start, after all checks."""
        misaligned = address & align - 1 != 0
        outside = address > self.ends[self.starts.searchsorted(address, "right")] - size
        for bad, what in (misaligned, "misaligned"), (outside, "out of bounds"):
            if bad.any():
                op.fault(lanes[bad], f"{self.name} {what}: {size} bytes at {address[bad][0]:#x}")
        return address - self.base if self.strides is None else address + self.strides[lanes]


class Op:
    """An instruction while it is decoded. Handlers take the modifiers they implement; what is left over is unknown.

    Operands become arrays over all threads that follow their registers. A handler returns what executes the instruction: a function
    of the active threads, which are True for all or a mask.
    """

    def __init__(self, program, instruction, after):
        self.program, self.instruction, self.operands, self.after = program, instruction, instruction.operands, after
        self.base, *self.modifiers = re.sub(r"::(cta|entry)\b", "", instruction.opcode).split(".")

    def reject(self):
        raise NotImplementedError(f"{self.program.name}: {self.instruction.text}")

    def fault(self, threads, message):
        program, instruction = self.program, self.instruction
        place = f"`{instruction.text}` ({instruction.source})"
        raise Fault(f"{program.name}, block {program.block}, {program.spell(threads)}: {message} at {place}")

    def take(self, *names):
        """The first of the modifiers that is among the names, or None."""
        for name in self.modifiers:
            if name in names:
                self.modifiers.remove(name)
                return name

    def need(self, *names):
        return self.take(*names) or self.reject()

    def dtype(self):
        return DTYPES[self.need(*DTYPES)]

    def typed(self, array, dtype):
        if (array.dtype == PRED) != (dtype == PRED) or array.itemsize < dtype.itemsize:
            self.reject()
        return array

    def read(self, operand, dtype):
        """Its value in all threads: an array that follows its register, of which it may be the low bytes."""
        program = self.program
        if isinstance(operand, Register):
            array = program.registers[operand.bits][operand.index]
        elif operand in program.special:
            array = program.special[operand]
        else:
            return program.constant(self, operand, dtype)
        return self.typed(array, dtype).view(dtype)[:: array.itemsize // dtype.itemsize]

    def write(self, operand, dtype):
        """The array that takes its value in all threads; it is wider than dtype if the register is."""
        if operand == "_":
            return np.empty(len(self.program.numbers), dtype)
        array = self.typed(self.program.registers[operand.bits][operand.index], dtype)
        if array.itemsize == dtype.itemsize:
            return array.view(dtype)
        return array.view(f"{dtype.kind}{array.itemsize}") if dtype.kind in "iu" else self.reject()

    def source(self, i, dtype):
        return self.read(self.operands[i], dtype)

    def target(self, dtype):
        return self.write(self.operands[0], dtype)

    def pair(self):
        """Operand 0 of the form d|p, or d alone."""
        return self.operands[0] if isinstance(self.operands[0], list) else [self.operands[0], "_"]

    def guarded(self, run, leads=False):
        """run, for those of the active threads that the guard lets through; if it leads elsewhere, the others go straight on."""
        if self.instruction.guard is None:
            return run
        guard, negated = self.read(self.instruction.guard, PRED), self.instruction.negated

        def run_some(w):
            on = (guard ^ negated) & w
            led = run(True if on.all() and not leads else on) if on.any() else []
            return [(self.after, w & ~on), *led] if leads else None

        return run_some


def put(out, value, w):
    np.copyto(out, value, where=w, casting="unsafe")


def elementwise(f, out, *inputs):
    if isinstance(f, np.ufunc) and out.dtype == inputs[0].dtype:
        return lambda w: f(*inputs, out=out, where=w)
    return lambda w: put(out, f(*inputs), w)


def bits_per_warp(mask):  # (..., 32) or (threads) -> 32 bits each
    return np.packbits(mask, axis=-1, bitorder="little").view(U32)


# Instructions of a thread alone ---------------------------------------------------------------------------------------
def arithmetic(op):
    dtype = op.dtype()
    if dtype.kind == "f":
        return floating(op, dtype)
    if op.base in ("mul", "mad"):
        return multiply(op, dtype)
    name = ".".join(filter(None, [op.base, op.take("shiftamt", "l", "r"), op.take("wrap", "clamp")]))
    shape, f = INTEGER.get(name) or op.reject()
    if len(op.operands) != len(shape):
        op.reject()
    inputs = [op.source(i, U32 if t == "u" else dtype) for i, t in enumerate(shape) if i]
    run = elementwise(f, op.target(U32 if shape[0] == "u" else dtype), *inputs)

    def divide(w):
        if (zero := (inputs[1] == 0) & w).any():
            op.fault(zero, "division by zero")
        run(w)

    return divide if op.base in ("div", "rem") else run


def multiply(op, dtype):
    part = op.need("lo", "hi", "wide")
    out = wider(dtype) if part == "wide" else dtype
    product = {"lo": np.multiply, "hi": high_product, "wide": lambda a, b: a.astype(out) * b}[part]
    factors = op.source(1, dtype), op.source(2, dtype)
    if op.base == "mul":
        return elementwise(product, op.target(out), *factors)
    return elementwise(lambda a, b, c: product(a, b) + c, op.target(out), *factors, op.source(3, out))


def floating(op, dtype):
    mode, ftz, sat = op.take("rn", "rz", "rm", "rp", "approx", "full") or "rn", op.take("ftz"), op.take("sat")
    name = f"{op.base}.NaN" if op.take("NaN") else op.base.replace("mad", "fma")
    nearest = NEAREST | {"fma": lambda *x: FMA64(*x).astype(F64)} if dtype == F64 else NEAREST
    approximate, direct = mode in ("approx", "full"), mode == "rn" and name in nearest
    if not (name in APPROXIMATE if approximate else direct or (name in EXACT and dtype != F64)):
        op.reject()

    def f(*x):
        x = [flush(v) for v in x] if ftz else x
        if approximate:
            y = APPROXIMATE[name](*(v.astype(F64) for v in x)).astype(dtype)
        else:
            y = nearest[name](*x) if direct else narrow(*EXACT[name](*x, mode), mode, dtype)
        y = flush(y) if ftz else y
        y = y if name in ("abs", "neg", "copysign") else canonical(y)
        return saturate(y) if sat else y

    return elementwise(f, op.target(dtype), *(op.source(i, dtype) for i in range(1, len(op.operands))))


def compare(op):
    relation, mix, ftz = op.need(*COMPARE, *COMPARE_FLOATS), op.take("and", "or", "xor"), op.take("ftz")
    result = op.dtype() if op.base == "set" else PRED
    dtype = op.dtype()
    f = (COMPARE_FLOATS if dtype.kind == "f" else COMPARE).get(relation) or op.reject()
    a, b, also = op.source(1, dtype), op.source(2, dtype), op.source(3, PRED) if mix else None
    outs, true = [op.write(part, result) for part in op.pair()], np.array(1 if result.kind == "f" else -1).astype(result)

    def run(w):
        holds = f(flush(a), flush(b)) if ftz else f(a, b)
        answers = [INTEGER[mix][1](answer, also) if mix else answer for answer in (holds, ~holds)]
        for out, answer in zip(outs, answers, strict=True):
            put(out, np.where(answer, true, result.type(0)), w)

    return run


def select(op):
    dtype, kind = op.dtype(), PRED if op.base == "selp" else op.dtype()
    inputs = op.source(1, dtype), op.source(2, dtype), op.source(3, kind)
    return elementwise(lambda a, b, c: np.where(c if kind == PRED else c >= 0, a, b), op.target(dtype), *inputs)


def move(op):
    dtype = op.dtype()
    count = max(len(operand) if isinstance(operand, list) else 1 for operand in op.operands)
    part, whole = (dtype, dtype) if count == 1 else (np.dtype(f"u{dtype.itemsize // count}"), np.dtype(f"u{dtype.itemsize}"))

    def parts(operand, array_of):
        if isinstance(operand, list):
            return [array_of(one, part) for one in operand]
        return [array_of(operand, whole).view(part)[i::count] for i in range(count)]

    pairs = list(zip(parts(op.operands[0], op.write), parts(op.operands[1], op.read), strict=True))

    def run(w):
        for out, value in pairs:
            put(out, value, w)

    return run


def convert(op):
    types = [m for m in op.modifiers if m in DTYPES or m in ("bf16", "bf16x2", "f16x2")]
    op.modifiers = [m for m in op.modifiers if m not in types]
    mode, ftz, sat = op.take(*TO_INTEGRAL, "rn", "rz", "rm", "rp"), op.take("ftz"), op.take("sat")
    kind = types[0].removesuffix("x2")
    source, target = (F32 if t == "bf16" else DTYPES.get(t) or op.reject() for t in (types[1], kind))
    if (kind == "bf16" and (mode != "rn" or source not in (F16, F32))) or (
        source.kind == "f" and target.kind in "iu" and mode not in TO_INTEGRAL
    ):
        op.reject()
    f = conversion(source, target, mode, ftz, sat)

    def one(x):
        x = f(from_bfloat16(x) if types[1] == "bf16" else x)
        return to_bfloat16(x) if kind == "bf16" else x

    inputs = [op.source(i, U16 if types[1] == "bf16" else source) for i in range(1, len(op.operands))]
    if kind == types[0]:
        return elementwise(one, op.target(U16 if kind == "bf16" else target), *inputs)
    return elementwise(lambda high, low: one(high).view(U16).astype(U32) << 16 | one(low).view(U16), op.target(U32), *inputs)


def convert_address(op):
    f = np.subtract if op.take("to") else np.add
    window = op.program.constant(op, str(WINDOW[op.need(*WINDOW)]), U64)
    return elementwise(f, op.target(op.dtype()), op.source(1, U64), window)


def active_mask(op):
    out = op.target(op.dtype())
    return lambda w: put(out, bits_per_warp(op.program.everyone & w).repeat(32), w)


def fence(op):
    op.take("sc", "acq_rel")
    op.need("gl", "cta", "gpu", "sys")
    return lambda w: None


# Memory ---------------------------------------------------------------------------------------------------------------
def addresses(op, operand):
    wide = not isinstance(operand.base, Register) or operand.base.bits == 64
    base = op.read(operand.base, I64 if wide else U32)
    return lambda lanes: np.add(base[lanes], operand.offset, dtype=I64)


def accesses(op, operand, size, names=("global", "shared", "local")):
    """-> a function of the active threads that yields (lanes, space, where in its memory) for every space they access."""
    program, name, address_of = op.program, op.take(*names), addresses(op, operand)

    def generic(address):
        window = np.where(np.isin(address >> 56, [1, 2, 3]), address & -1 << 56, 0)
        for space in (program.spaces[name] for name in ("global", "shared", "local", "param")):
            yield space, window == WINDOW[space.name], address - WINDOW[space.name]

    def locate(w):
        lanes = program.lanes(w)
        address = address_of(lanes)
        for space, here, offset in generic(address) if name is None else [(program.spaces[name], slice(None), address)]:
            if len(lanes[here]):
                yield lanes[here], space, space.locate(op, lanes[here], offset[here], size, size)

    return locate


def load_or_store(op):
    while op.take(*CACHING):
        pass
    count, dtype, loads = int((op.take("v2", "v4") or "v1")[1:]), op.dtype(), op.base == "ld"
    value, address = op.operands if loads else op.operands[::-1]
    where = accesses(op, address, count * dtype.itemsize, WINDOW if loads else ("global", "shared", "local"))
    arrays = [(op.write if loads else op.read)(part, dtype) for part in (value if count > 1 else [value])]

    def run(w):
        for lanes, space, at in where(w):
            elements, at = space.memory.view(dtype), at // dtype.itemsize
            for i, array in enumerate(arrays):
                if loads:
                    array[lanes] = elements[at + i]
                else:
                    elements[at + i] = array[lanes]

    return run


ATOMIC = {name: INTEGER[name][1] for name in ("add", "min", "max", "and", "or", "xor")} | {
    "exch": lambda old, new: new, "cas": lambda old, expected, new: new if old == expected else old,
    "inc": lambda old, last: 0 if old >= last else old + 1, "dec": lambda old, last: last if old == 0 or old > last else old - 1,
}  # fmt: skip


def atomic(op):
    while op.take(*CACHING):
        pass
    name, dtype = op.need(*ATOMIC), op.dtype()
    if dtype.itemsize < 4 or (dtype.kind == "f" and name != "add"):
        op.reject()
    out, operands = (op.target(dtype), op.operands[1:]) if op.base == "atom" else (None, op.operands)
    where, values = accesses(op, operands[0], dtype.itemsize), [op.read(operand, dtype) for operand in operands[1:]]

    def run(w):
        for lanes, space, at in where(w):
            elements, before = space.memory.view(dtype), np.empty(len(lanes), dtype)
            for i, (place, *arguments) in enumerate(zip(at // dtype.itemsize, *(v[lanes] for v in values), strict=True)):
                before[i] = elements[place]
                elements[place] = ATOMIC[name](before[i], *arguments)
            if out is not None:
                out[lanes] = before

    return run


def copy_async(op):
    program, _, step = op.program, op.need("async"), op.take("commit_group", "wait_group", "wait_all")
    if step:
        return lambda w: program.advance(w, step, int(op.operands[0]) if step == "wait_group" else 0)
    cache, size = op.need("ca", "cg"), int(op.operands[2])
    while op.take(*CACHING):
        pass
    if op.need("shared") and op.need("global") and size not in ((4, 8, 16) if cache == "ca" else (16,)):
        op.reject()
    sizes = op.source(3, U32) if len(op.operands) > 3 else program.constant(op, str(size), U32)
    to, source = (addresses(op, operand) for operand in op.operands[:2])
    column = np.arange(size)

    def run(w):
        lanes, (shared, memory) = program.lanes(w), (program.spaces[name] for name in ("shared", "global"))
        at = shared.locate(op, lanes, to(lanes), size, size)[:, None] + column
        data = np.zeros((len(lanes), size), "u1")
        for count in set(sizes[lanes].tolist()) - {0}:
            some = sizes[lanes] == count
            if count > size:
                op.fault(lanes[some], f"copies {count} of {size} bytes")
            start = memory.locate(op, lanes[some], source(lanes[some]), count, size)
            data[some, :count] = memory.memory[start[:, None] + column[:count]]
        program.copies.append((lanes, program.groups[lanes], at, data))
        shared.memory[at] = 0xFF

    return run


# Instructions at which threads meet: handlers return who of the arrived may go on, and what those then do --------------
def barrier(op):
    if op.take("warp"):
        return members_of(op, op.source(0, U32)) if op.need("sync") else None, lambda w: None
    op.take("cta"), op.take("aligned")
    fold, program = op.need("sync", "red") == "red" and op.need("and", "or", "popc"), op.program
    if len(op.operands) != (3 if fold else 1):
        op.reject()
    out, value = (op.target(op.dtype()), op.source(2, PRED)) if fold else (None, None)

    def run(w):
        if fold:
            put(out, {"and": np.all, "or": np.any, "popc": np.sum}[fold](value[w]), w)

    return lambda arrived: arrived & (arrived.sum() == program.threads), run


def members_of(op, members):
    """Lanes may go on when all of their membermask are here with the same one."""
    program = op.program

    def ready(arrived):
        masks, here = members.reshape(-1, 32), arrived.reshape(-1, 32)
        if (stranger := here & (masks >> LANE & 1 == 0)).any():
            op.fault(stranger, "the lane is not in its own membermask")
        if (lonely := here & (masks & bits_per_warp(program.exited.reshape(-1, 32)) != 0)).any():
            op.fault(lonely, "the membermask names a lane that has exited or never was")
        agree = here[:, None, :] & (masks[:, :, None] == masks[:, None, :])
        return (here & (masks & ~bits_per_warp(agree)[:, :, 0] == 0)).reshape(-1)

    return ready


def shuffle(op):
    op.need("sync")
    mode, dtype, numbers = op.need("up", "down", "bfly", "idx"), op.dtype(), op.program.numbers
    out, valid_out = (op.write(part, kind) for part, kind in zip(op.pair(), (dtype, PRED), strict=True))
    value, step, clamp, members = (op.source(i, U32) for i in (1, 2, 3, 4))

    def run(w):
        lane, n, bound, segment = numbers % 32, step.astype(I64) & 31, clamp.astype(I64) & 31, clamp.astype(I64) >> 8 & 31
        first = lane & segment
        last = first | bound & ~segment
        source = {"up": lane - n, "down": lane + n, "bfly": lane ^ n, "idx": first | n & ~segment}[mode]
        valid = source >= last if mode == "up" else source <= last
        source = np.where(valid, source, lane)
        if (outside := w & (members >> source & 1 == 0)).any():
            op.fault(outside, "reads a lane outside the membermask")
        put(out, value[numbers - lane + source], w)
        put(valid_out, valid, w)

    return members_of(op, members), run


def ballot(values, members):
    return bits_per_warp(values) & members


def alike(values, members):
    return bits_per_warp(values[:, :, None] == values[:, None, :])[:, :, 0] & members


def reduction(f, first):
    def reduce(values, members):
        everyone = np.broadcast_to(values[:, None, :], (len(values), 32, 32))
        return f.reduce(everyone, axis=2, where=members[:, :, None] >> LANE & 1 != 0, initial=first(np.iinfo(values.dtype)))

    return reduce


TOGETHER = {  # of values and membermasks (warps, 32)
    "vote.ballot": ballot, "vote.any": lambda v, m: ballot(v, m) != 0, "vote.all": lambda v, m: ballot(v, m) == m,
    "vote.uni": lambda v, m: (ballot(v, m) == m) | (ballot(v, m) == 0),
    "match.any": alike, "match.all": lambda v, m: np.where(alike(v, m) == m, m, 0),
    "redux.add": reduction(np.add, lambda limits: 0), "redux.min": reduction(np.minimum, lambda limits: limits.max),
    "redux.max": reduction(np.maximum, lambda limits: limits.min), "redux.and": reduction(np.bitwise_and, lambda limits: limits.max),
    "redux.or": reduction(np.bitwise_or, lambda limits: 0), "redux.xor": reduction(np.bitwise_xor, lambda limits: 0),
}  # fmt: skip


def together(op):
    op.need("sync")
    f = TOGETHER[f"{op.base}.{op.need(*(name.split('.')[1] for name in TOGETHER if name.startswith(op.base)))}"]
    dtype = op.dtype()
    out, same = (op.write(part, kind) for part, kind in zip(op.pair(), (U32 if op.base == "match" else dtype, PRED), strict=True))
    value, members = op.source(1, PRED if op.base == "vote" else dtype), op.source(2, U32)

    def run(w):
        answer = f(value.reshape(-1, 32), members.reshape(-1, 32)).reshape(-1)
        put(out, answer, w)
        put(same, answer != 0, w)

    return members_of(op, members), run


def held_at(rows, columns):
    """Where a tile's elements are, if a lane holds (rows[lane, e], columns[lane, e]): (row, column) -> lane * elements + e."""
    index = np.empty((rows.max() + 1, columns.max() + 1), int)
    index[rows, columns] = np.arange(rows.size).reshape(rows.shape)
    return index


def multiply_matrices(op):
    kind = op.modifiers[-2]
    shape = {"tf32": "m16n8k8", "f16": "m16n8k16", "bf16": "m16n8k16"}.get(kind)
    if op.modifiers != ["sync", "aligned", shape, "row", "col", "f32", kind, kind, "f32"]:
        op.reject()
    op.modifiers = []
    g, t, e = LANE[:, None] // 4, LANE[:, None] % 4, np.arange(8)
    rows, columns = g + 8 * (e[:4] >> 1), 2 * t + (e[:4] & 1)  # of c and d
    if kind == "tf32":
        a_at, b_at = held_at(g + 8 * (e[:4] & 1), t + 4 * (e[:4] >> 1)), held_at(t + 4 * e[:2], g + 0 * e[:2])
    else:  # two to a register
        a_at = held_at(g + 8 * (e >> 1 & 1), 2 * t + (e & 1) + 8 * (e >> 2))
        b_at = held_at(2 * t + (e[:4] & 1) + 8 * (e[:4] >> 1), g + 0 * e[:4])
    outs = [op.write(part, F32) for part in op.operands[0]]
    a, b, c = ([op.read(part, U32) for part in operand] for operand in op.operands[1:])
    decode = {"tf32": lambda x: (x & 0xFFFFE000).view(F32), "f16": lambda x: x.view(F16), "bf16": lambda x: from_bfloat16(x.view(U16))}

    def tile(parts, at, decoded):
        held = decoded(np.stack(parts, -1))
        return held.reshape(len(held) // 32, -1)[:, at].astype(F64)

    def run(w):
        sums = tile(a, a_at, decode[kind]) @ tile(b, b_at, decode[kind]) + tile(c, held_at(rows, columns), lambda x: x.view(F32))
        for i, out in enumerate(outs):
            put(out, sums[:, rows[:, i], columns[:, i]].reshape(-1), w)

    return members_of(op, op.program.constant(op, "-1", U32)), run


def load_matrices(op):
    count, transposed, program = int((op.need("x1", "x2", "x4"))[1]), op.take("trans"), op.program
    if op.modifiers != ["sync", "aligned", "m8n8", "shared", "b16"] or len(op.operands[0]) != count:
        op.reject()
    op.modifiers = ["shared"]
    where, outs = accesses(op, op.operands[1], 16, ("shared",)), [op.write(part, U32) for part in op.operands[0]]
    row, column = (2 * (LANE % 4), LANE // 4) if transposed else (LANE // 4, 2 * (LANE % 4))

    def run(w):
        [(_, space, at)] = where(w & (program.numbers % 32 < 8 * count))
        halves, at = space.memory.view(U16), at.reshape(-1, count, 8) // 2
        for i, out in enumerate(outs):
            low = halves[at[:, i, row] + column]
            high = halves[at[:, i, row + 1] + column] if transposed else halves[at[:, i, row] + column + 1]
            out[w] = (low | high.astype(U32) << 16).reshape(-1)

    return members_of(op, program.constant(op, "-1", U32)), run


# Instructions that lead elsewhere: handlers return a function of the threads there -> [(where in the code, who)] --------
def branch(op):
    op.take("uni")
    place = op.instruction.names[f":{op.operands[0]}"]
    return lambda mask: [(place, mask)]


def branch_by_index(op):
    op.need("idx"), op.take("uni")
    names, index = op.instruction.names, op.source(0, U32)
    places = [names[f":{label}"] for label in names[f":{op.operands[1]}"]]

    def leave(mask):
        if (wrong := mask & (index >= len(places))).any():
            op.fault(wrong, f"no label for this index among {len(places)}")
        return [(place, mask & (index == i)) for i, place in enumerate(places)]

    return leave


ARITHMETIC = (
    "add sub mul mad div rem min max abs neg and or xor not shl shr shf popc clz brev bfe bfi bfind prmt lop3 fma sqrt rcp rsqrt ex2 "
    "lg2 sin cos tanh copysign"
).split()
ALONE = dict.fromkeys(ARITHMETIC, arithmetic) | {
    "setp": compare, "set": compare, "selp": select, "slct": select, "mov": move, "cvt": convert, "cvta": convert_address,
    "activemask": active_mask, "membar": fence, "fence": fence, "ld": load_or_store, "st": load_or_store, "atom": atomic, "red": atomic,
    "cp": copy_async,
}  # fmt: skip
MEETING = {
    "bar": barrier, "barrier": barrier, "shfl": shuffle, "vote": together, "redux": together, "match": together,
    "mma": multiply_matrices, "ldmatrix": load_matrices,
}  # fmt: skip
LEADING = {
    "bra": branch, "brx": branch_by_index, "ret": lambda op: op.program.exit, "exit": lambda op: op.program.exit,
    "trap": lambda op: lambda mask: op.fault(mask, "trap"),
}  # fmt: skip
OPCODES = ALONE | MEETING | LEADING


# Execution ------------------------------------------------------------------------------------------------------------
class Program:
    """An entry decoded for blocks of so many threads with so much dynamic shared memory, and the state of the block at work."""

    def __init__(self, entry, threads, dynamic):
        variables, counts = [*entry.module.variables, *entry.body.variables], entry.body.counts
        self.name, self.threads, self.constants = entry.name, threads, {}
        self.numbers = np.arange(threads + -threads % 32)  # whole warps; the lanes beyond threads never run
        self.everyone = self.numbers < threads
        self.registers = {n: np.empty((count, len(self.numbers)), PRED if n == 1 else f"u{n // 8}") for n, count in counts.items()}
        lane = self.numbers.astype(U32) % 32
        lower = (1 << lane.astype(U64)) - 1
        self.special = {f"%{name}.{axis}": np.zeros_like(lane) for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {
            "WARP_SZ": np.full_like(lane, 32), "%laneid": lane, "%warpid": self.numbers.astype(U32) // 32,
            "%lanemask_lt": lower.astype(U32), "%lanemask_le": (2 * lower + 1).astype(U32), "%lanemask_eq": (lower + 1).astype(U32),
            "%lanemask_gt": (~(2 * lower + 1)).astype(U32), "%lanemask_ge": (~lower).astype(U32),
        }  # fmt: skip
        shared, end = lay_out([v for v in variables if v.space == "shared" and v.size])
        unsized = [v for v in variables if v.space == "shared" and not v.size]  # all begin where the others end
        end += -end % max((v.align for v in unsized), default=1) if dynamic else 0
        local, depth = lay_out([v for v in variables if v.space == "local"])
        params, length = lay_out(entry.params)
        self.symbols = {**entry.module.addresses, **shared, **dict.fromkeys((v.name for v in unsized), end), **local, **params}
        stride = depth + -depth % 16
        self.spaces = {
            "shared": Space("shared", np.empty(end + dynamic + 16 & ~15, "u1"), [(0, end + dynamic)]),
            "local": Space("local", np.empty(stride * len(self.numbers), "u1"), [(0, depth)], strides=self.numbers * stride),
            "param": Space("param", np.empty(length + 16 & ~15, "u1"), [(0, length)]),
        }
        self.blocks = self.decode(entry.body)

    def constant(self, op, token, dtype):
        if (token, dtype) not in self.constants:
            try:
                value = np.array(self.symbols[token]).astype(dtype) if token in self.symbols else number(token, dtype)
            except ValueError:
                op.reject()
            self.constants[token, dtype] = np.full(len(self.numbers), value, dtype)
        return self.constants[token, dtype]

    def lanes(self, w):
        return self.numbers if w is True else np.flatnonzero(w)

    def decode(self, body):
        """-> {where in the code: (what to execute in turn, what then tells where to go on)}."""
        blocks, first, straight = {len(body.code): ([], self.exit)}, 0, []
        for i, instruction in enumerate(body.code):
            if i in body.leaders and i > first:
                blocks[first], first, straight = (straight, lambda mask, i=i: [(i, mask)]), i, []
            op = Op(self, instruction, i + 1)
            made = OPCODES.get(op.base, Op.reject)(op)
            if op.modifiers:
                op.reject()
            if op.base in ALONE:
                straight.append(op.guarded(made))
            else:
                leave = self.meet(op, *made) if op.base in MEETING else made
                blocks[first], first, straight = (straight, op.guarded(leave, leads=True)), i + 1, []
        if first < len(body.code):
            blocks[first] = straight, self.exit
        return blocks

    def meet(self, op, ready, run):
        def leave(mask):
            arrived = self.waiting.pop(op, False) | mask
            going = ready(arrived)
            if (rest := arrived & ~going).any():
                self.waiting[op] = rest
            if going.any():
                run(going)
            return [(op.after, going)]

        return leave

    def exit(self, mask):
        self.exited = self.exited | mask
        return []

    def advance(self, w, step, allowed):
        """cp.async: closes the active threads' groups, or lets their copies arrive except those of the last `allowed` groups."""
        if step != "wait_group":
            self.groups[self.lanes(w)] += 1
        if step == "commit_group":
            return
        left = []
        for lanes, groups, at, data in self.copies:
            now = (groups < self.groups[lanes] - allowed) & (self.everyone & w)[lanes]
            self.spaces["shared"].memory[at[now]] = data[now]
            if not now.all():
                left.append((lanes[~now], groups[~now], at[~now], data[~now]))
        self.copies = left

    def launch(self, grid, block, params, regions):
        thread = self.numbers % block[0], self.numbers // block[0] % block[1], self.numbers // (block[0] * block[1])
        for axis, *values in zip("xyz", thread, block, grid, strict=True):
            for name, value in zip(("tid", "ntid", "nctaid"), values, strict=True):
                self.special[f"%{name}.{axis}"][:] = value
        self.spaces["param"].memory[: len(params)] = np.frombuffer(params, "u1")
        base = min((start for start, _ in regions), default=0) & ~15
        size = max((start + size for start, size in regions), default=16) - base + 15 & ~15
        # One view over everything from the first to the last region, of which only the regions are ever touched.
        view = {"data": (base, False), "shape": (size if regions else 0,), "typestr": "|u1", "version": 3}
        memory = np.asarray(SimpleNamespace(__array_interface__=view))
        self.spaces["global"] = self.spaces["const"] = Space("global", memory, regions, base)
        for z, y, x in np.ndindex(*grid[::-1]):
            self.run_block((x, y, z))

    def run_block(self, index):
        self.block = index
        for axis, number_of_block in zip("xyz", index, strict=True):
            self.special[f"%ctaid.{axis}"][:] = number_of_block
        for array in self.registers.values():
            array.fill(0 if array.dtype == PRED else np.iinfo(array.dtype).max)
        for name in ("shared", "local"):
            self.spaces[name].memory.fill(0xFF)
        self.exited, self.waiting, self.copies = ~self.everyone, {}, []  # waiting: at which instruction who
        self.groups = np.zeros(len(self.numbers), int)  # of cp.async that each thread has closed
        pending = {0: self.everyone}  # who goes on where
        while pending:
            here = min(pending)
            mask = pending.pop(here)
            straight, leave = self.blocks[here]
            w = True if mask.all() else mask
            for run in straight:
                run(w)
            for place, threads in leave(mask):
                if threads.any():
                    pending[place] = pending.get(place, False) | threads
        if self.waiting:
            self.report_deadlock()

    def report_deadlock(self):
        (op, mask), *others = self.waiting.items()
        reasons = [f"{self.spell(m)} wait at `{o.instruction.text}` ({o.instruction.source})" for o, m in others]
        gone = self.exited & self.everyone
        reasons += [f"{self.spell(gone)} exited"] if gone.any() else []
        op.fault(mask, "waits for ever: " + ("; ".join(reasons) or "the membermasks differ"))

    def spell(self, threads):
        numbers = np.flatnonzero(threads) if threads.dtype == PRED else threads
        shown = ["(" + ",".join(str(self.special[f"%tid.{axis}"][n]) for axis in "xyz") + ")" for n in numbers[:4]]
        return f"thread{'s'[: len(numbers) - 1]} {' '.join(shown)}" + f" and {len(numbers) - 4} more" * (len(numbers) > 4)


class Entry:
    def __init__(self, module, name, params, header, text):
        self.module, self.name, self.text, self.programs = module, name, text, {}
        self.params = [declaration(p) for p in params.split(",") if p.strip()]
        found = re.search(r"\.maxntid\s+([\d, ]+)", header)
        self.most_threads = math.prod(map(int, found[1].split(","))) if found else 1024

    @functools.cached_property
    def body(self):
        return Body(self.text, self.module.files)

    @property
    def opcodes(self):
        return {instruction.opcode for instruction in self.body.code}

    def pack(self, params):
        """The parameters' bytes as the kernel reads them."""
        offsets, length = lay_out(self.params)
        if not isinstance(params, bytes):
            if [len(p) for p in params] != [v.size for v in self.params]:
                raise Fault(f"{self.name}: parameters of {[len(p) for p in params]} bytes, declared {[v.size for v in self.params]}")
            each, params = params, b""
            for offset, one in zip(offsets.values(), each, strict=True):
                params = params.ljust(offset, b"\0") + one
        if len(params) != length:
            raise Fault(f"{self.name}: {len(params)} bytes of parameters, declared {length}")
        return params


class Module:
    """Parses PTX text. Pointers in it are addresses of this process, where the module's own variables are allocated."""

    def __init__(self, text):
        text = COMMENT.sub(lambda found: found[0] if found[0][0] == '"' else " ", text)
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
        text = SECTION.sub("", LINE_DIRECTIVE.sub(r"\g<0>;", text))
        self.entries, rest, at = {}, "", 0
        while found := FUNCTION.search(text, at):
            rest += text[at : found.start()]
            at, depth = found.end(), int(found[5] == "{")
            while depth:
                brace = re.compile("[{}]").search(text, at)
                at, depth = brace.end(), depth + (1 if brace[0] == "{" else -1)
            if found[1] == "entry":
                self.entries[found[2]] = Entry(self, found[2], found[3] or "", found[4], text[found.end() : at - 1])
        statements = [s.strip() for s in (rest + text[at:]).split(";")]
        self.variables = [declaration(s) for s in statements if s and not re.match(r"\.(version|target|address_size|file|loc)\b", s)]
        static = [v for v in self.variables if v.space != "shared"]
        offsets, size = lay_out(static)
        self.memory = np.zeros(size + 256, "u1")
        start = -self.memory.ctypes.data % 256
        for v in static:
            self.memory[start + offsets[v.name] :][: v.size] = np.frombuffer(v.data, "u1")
        self.addresses = {name: self.memory.ctypes.data + start + offset for name, offset in offsets.items()}

    def launch(self, name, grid, block, shared=0, params=b"", regions=()):
        """Runs all blocks, or raises Fault.

        params: the parameters' bytes, one by one or laid out as the kernel reads them. regions: (address, size) of all memory
        that the kernel may touch; an access must lie inside one of them.
        """
        entry, threads = self.entries[name], math.prod(block)
        if not 0 < threads <= entry.most_threads or min(grid) < 1:
            raise Fault(f"{name}: grid {grid}, block {block}: must not be empty, nor have more than {entry.most_threads} threads")
        if (threads, shared) not in entry.programs:
            entry.programs[threads, shared] = Program(entry, threads, shared)
        own = [(self.addresses[v.name], v.size) for v in self.variables if v.space != "shared"]
        with np.errstate(all="ignore"):
            entry.programs[threads, shared].launch(grid, block, entry.pack(params), [*own, *regions])
