"""Vectors of length 1."""

import torch
from torch import Tensor

from ccl_fast.checks import host_knows
from ccl_fast.ops import normalize_cpu, normalize_triton
from ccl_fast.ops.differentiable import Differentiable, is_traced
from ccl_fast.ops.precision import accumulation_dtype, without_autocast

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
    # An exported program keeps the operations, and not the gradient that a Function brings.
    return (unit_rows if is_traced(x) else _UNIT)(x)[0]


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, or 0, and the inverse lengths that their gradients have: 0 for rows of zeros."""
    for kernels in (normalize_triton, normalize_cpu):
        if kernels.serves(x):
            return kernels.unit(x, 2.0 ** (1 - SHORTEST))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if host_knows(norm) and x.shape[0] and lengths_are_usual(norm):
        inverse = norm.reciprocal()
        return x * inverse, inverse
    scaled, power, is_zero = _of_length_one_or_so(x)
    inverse = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).reciprocal()
    return (scaled * inverse).masked_fill(is_zero, 0.0), (inverse * power).masked_fill(is_zero, 0.0)


def unit_rows_gradient(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of rows, given that of their `unit_rows`."""
    if not torch.is_grad_enabled():
        for kernels in (normalize_triton, normalize_cpu):
            if kernels.serves(grad):
                return kernels.gradient(grad, unit, inverse)
    along = (grad * unit).sum(1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1) * inverse


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _gradients(ctx, grad: Tensor | None, of_inverse: Tensor | None) -> Tensor | None:
    """Itself differentiable: then the inverse, which is an output for that, has a gradient too."""
    unit, inverse = ctx.saved_tensors
    to_x = None
    with without_autocast(unit.device):
        if grad is not None:
            to_x = unit_rows_gradient(grad, unit, inverse)
        if of_inverse is not None:
            more = unit * (of_inverse * inverse.square())
            to_x = -more if to_x is None else to_x - more
    return to_x


# Of plain operations autograd would keep x and its lengths besides, and take twice as many steps.
_UNIT = Differentiable("normalize_embeddings", unit_rows, _save, _gradients)


def lengths_are_usual(norm: Tensor) -> bool:
    """Tell whether this is the usual case, at least one row; only a CPU knows without waiting."""
    low, high = norm.aminmax()
    return low.item() >= 2.0**SHORTEST and high.item() <= 2.0**LONGEST


def _of_length_one_or_so(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale each row by a power of two, so that its largest component is about 1; rows of zeros become ones.

    Also that power, as far as gradients may grow by it, and which rows are zeros. For autograd, where it traces this,
    the power is a constant, as the direction does not depend on it.
    """
    if x.shape[1] == 0:
        one = x.new_ones(x.shape[0], 1)
        return x, one, one.bool()
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
    return x.masked_fill(is_zero, 1.0), of_gradient, is_zero
