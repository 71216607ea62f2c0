"""Triton kernels of rows brought to length 1, and of their gradient: a program for each row, of any length."""

import triton
import triton.language as tl

# A row whose largest component is below the first is lifted by the second before anything is squared.
SMALL, LIFT = tl.constexpr(2.0**-62), tl.constexpr(2.0**64)


@triton.jit
def unit_rows(x_ptr, unit_ptr, inverse_ptr, d, x_row, LARGEST_INVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of length 1, and what the gradient is multiplied by: 1 / |x|, bounded; both 0 for a row of zeros.

    Components are scaled by the power of two that brings the largest to [1, 2): no square over- or underflows, and
    rows that differ by a power of two have the same direction to the last bit.
    """
    row, col = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK)
    x_ptr += row * x_row
    unit_ptr += row * d
    largest = tl.zeros((), tl.float32)
    for first in range(0, d, BLOCK):
        x = tl.load(x_ptr + first + col, mask=first + col < d, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    lift = tl.where(largest < SMALL, LIFT, 1.0)
    exponent = ((largest * lift).to(tl.int32, bitcast=True) >> 23) & 255
    power = ((254 - tl.minimum(exponent, 253)) << 23).to(tl.float32, bitcast=True)
    total = tl.zeros((), tl.float32)
    for first in range(0, d, BLOCK):
        x = tl.load(x_ptr + first + col, mask=first + col < d, other=0.0) * lift * power
        total += tl.sum(x * x, 0)
    inverse = tl.where(total == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(total)))
    # Of a row that holds an infinity all is NaN, as of one that holds NaN.
    inverse = tl.where(total < float("inf"), inverse, float("nan"))
    for first in range(0, d, BLOCK):
        x = tl.load(x_ptr + first + col, mask=first + col < d, other=0.0) * lift * power
        tl.store(unit_ptr + first + col, x * inverse, mask=first + col < d)
    power = tl.where(lift == 1.0, tl.minimum(power, LARGEST_INVERSE), LARGEST_INVERSE)
    tl.store(inverse_ptr + row, inverse * power)


@triton.jit
def unit_rows_gradient(grad_ptr, unit_ptr, inverse_ptr, out_ptr, d, grad_row, BLOCK: tl.constexpr):
    """(g - <g, u> u) / |x|."""
    row, col = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK)
    grad_ptr += row * grad_row
    unit_ptr += row * d
    out_ptr += row * d
    along = tl.zeros((), tl.float32)
    for first in range(0, d, BLOCK):
        inside = first + col < d
        grad = tl.load(grad_ptr + first + col, mask=inside, other=0.0)
        along += tl.sum(grad * tl.load(unit_ptr + first + col, mask=inside, other=0.0), 0)
    inverse = tl.load(inverse_ptr + row)
    for first in range(0, d, BLOCK):
        inside = first + col < d
        grad = tl.load(grad_ptr + first + col, mask=inside, other=0.0)
        unit = tl.load(unit_ptr + first + col, mask=inside, other=0.0)
        tl.store(out_ptr + first + col, (grad - along * unit) * inverse, mask=inside)
