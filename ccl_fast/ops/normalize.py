"""Vectors of length 1."""

import torch
from torch import Tensor

from ccl_fast.checks import host_knows
from ccl_fast.ops.precision import accumulation_dtype

# Exponents of lengths whose squares are normal float32 numbers. Below the first a gradient is that of a row of this
# length: at most 1e12 times what comes in, as of torch's normalize.
SHORTEST, LONGEST = -40, 60


def normalize_rows(x: Tensor) -> Tensor:
    """``x / |x|`` over the last axis; zero vectors stay zero. No square over- or underflows."""
    largest = x.abs().amax(-1, keepdim=True)
    x = torch.where(largest > 0, x / largest, 0.0)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)  # a component is 1 now, if not all are 0


def normalize_embeddings(x: Tensor) -> Tensor:
    """The same of rows [n, d], differentiable any number of times; float32 for half ones.

    A row of zeros gets the gradient 0, and no gradient is more than `SHORTEST` allows.
    """
    x = x.to(accumulation_dtype(x))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if host_knows(norm) and x.shape[0] and lengths_are_usual(norm.detach()):
        return x * norm.reciprocal()
    x, is_zero = _of_length_one_or_so(x)
    return (x * torch.linalg.vector_norm(x, dim=1, keepdim=True).reciprocal()).masked_fill(is_zero, 0.0)


def lengths_are_usual(norm: Tensor) -> bool:
    """Tell whether this is the usual case, at least one row; only a CPU knows without waiting."""
    low, high = norm.aminmax()
    return low.item() >= 2.0**SHORTEST and high.item() <= 2.0**LONGEST


def _of_length_one_or_so(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row by a power of two, so that its largest component is about 1; tell which rows are zeros.

    For autograd the power is a constant, as the direction does not depend on it. Rows of zeros become ones.
    """
    if x.shape[1] == 0:
        return x, x.new_ones(x.shape[0], 1, dtype=torch.bool)
    constant = x.detach()
    largest = constant.abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent
    most = 126 if x.dtype == torch.float32 else 1022  # of the exponents of normal numbers, either way
    one = torch.ones_like(largest)
    power, subnormal = exponent.clamp(-most, most), (exponent + most).clamp(max=0)
    scaled = torch.ldexp(torch.ldexp(one, -power) * constant, -subnormal)
    of_gradient = torch.ldexp(one, -exponent.clamp(SHORTEST, most))
    x = x * of_gradient + (scaled - constant * of_gradient)  # no difference but for the shortest rows
    is_zero = largest == 0
    return x.masked_fill(is_zero, 1.0), is_zero
