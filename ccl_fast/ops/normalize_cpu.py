"""Rows of length 1 by the CPU extension, and their gradient: one call where plain torch has six, and four."""

import torch
from torch import Tensor

from ccl_fast.kernels import cpu_extension
from ccl_fast.kernels.cpu_extension import rows_of
from ccl_fast.kernels.extension import address
from ccl_fast.ops.differentiable import are_transforms_active, is_traced

# Elements of rows from which on torch's threads make up for the calls.
MAX_ELEMENTS = 1 << 18


def serves(x: Tensor) -> bool:
    """Tell whether the extension does it for rows x: float32, few, and plain tensors, which nothing traces."""
    # Sizes of what is traced are asked for nothing: they may be unknown.
    if cpu_extension.module is None or is_traced(x) or are_transforms_active():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and 0 < x.numel() <= MAX_ELEMENTS


def unit(x: Tensor, largest_inverse: float) -> tuple[Tensor, Tensor]:
    """Rows [n, d] of length 1, or 0, and [n, 1] what their gradients are multiplied by, at most this."""
    x = rows_of(x)
    n, d = x.shape
    result, inverse = x.new_empty(n, d), x.new_empty(n, 1)
    cpu_extension.best().unit_rows(address(x), x.stride(0), n, d, largest_inverse, address(result), address(inverse))
    return result, inverse


def gradient(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Of x, given that of its unit rows, which `unit` made."""
    grad = rows_of(grad)
    n, d = unit.shape
    result = grad.new_empty(n, d)
    cpu_extension.best().unit_rows_gradient(
        address(grad), grad.stride(0), n, d, address(unit), address(inverse), address(result)
    )
    return result
