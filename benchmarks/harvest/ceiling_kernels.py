"""Triton kernels that do one thing only: read what lies in the L2 cache, and take exponentials."""

import triton
import triton.language as tl


@triton.jit
def read(x_ptr, out_ptr, blocks, times, BLOCK: tl.constexpr):
    """Every program reads all blocks of x `times` times, each from a block of its own on."""
    total = tl.zeros((BLOCK,), tl.int32)
    block = tl.program_id(0) % blocks
    for _ in range(blocks * times):
        # The cache of a multiprocessor must not answer: the path to the L2 is measured.
        total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
        block = (block + 1) % blocks
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def exponentials(x_ptr, out_ptr, times, BLOCK: tl.constexpr):
    """`times` exponentials one after the other of each of a program's BLOCK numbers, which stay finite."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    for _ in range(times):
        x = tl.exp2(-x)
    tl.store(out_ptr + index, x)
