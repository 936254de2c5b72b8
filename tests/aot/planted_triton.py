import triton
import triton.language as tl


@triton.jit
def product(left, right, out, d, AFTER: tl.constexpr):
    """A matrix product in the loop, or after it."""
    row, column = tl.arange(0, 128), tl.arange(0, 32)
    dot = tl.zeros([128, 128], tl.float32)
    summed_left, summed_right = tl.zeros([128, 32], tl.float32), tl.zeros([32, 128], tl.float32)
    for start in range(0, d, 32):
        a = tl.load(left + row[:, None] * d + start + column[None, :])
        b = tl.load(right + row[None, :] * d + start + column[:, None])
        if AFTER:
            summed_left += a
            summed_right += b
        else:
            dot = tl.dot(a, b, dot, input_precision="tf32")
    if AFTER:
        dot = tl.dot(summed_left, summed_right, dot, input_precision="tf32")
    tl.store(out + row[:, None] * 128 + row[None, :], dot)


@triton.jit
def sums(x, out, d):
    """With four warps, 64 sums a thread."""
    row, column = tl.arange(0, 64), tl.arange(0, 128)
    total = tl.zeros([64, 128], tl.float32)
    for start in range(0, d, 128):
        total = total * total + tl.load(x + row[:, None] * d + start + column[None, :])
    tl.store(out + row[:, None] * 128 + column[None, :], total)
