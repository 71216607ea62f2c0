"""Rows of length 1 by a kernel, and their gradient by another: in plain torch some twenty small ones."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ccl_fast.ops.differentiable import are_transforms_active, is_traced
from ccl_fast.ops.logsumexp.triton import obstacles, on_device_of

# Of tensors; in the tests also a CPU, whose kernels are interpreted.
DEVICES = ("cuda",)
MAX_BLOCK = 4096  # elements of a row that a program has at once
ELEMENTS_OF_A_WARP = 256


def serves(x: Tensor) -> bool:
    """Tell whether the kernels run for rows x: float32, not empty, and of plain tensors, which nothing traces."""
    return x.dtype == torch.float32 and serves_rows(x)


def serves_rows(x: Tensor) -> bool:
    """Tell the same of rows that are brought to float32 first; float64 would lose by it."""
    if is_traced(x) or x.device.type not in DEVICES or x.dtype == torch.float64 or x.numel() == 0:
        return False
    return not are_transforms_active() and _can_run(x.device)


@cache
def _can_run(device: torch.device) -> bool:
    return not obstacles(device, torch.float32)


def unit(x: Tensor, largest_inverse: float) -> tuple[Tensor, Tensor]:
    """Rows [n, d] of length 1, or 0, and [n, 1] what their gradients are multiplied by, at most about this."""
    from ccl_fast.kernels.unit_rows import unit_rows  # needs Triton

    x = _with_whole_rows(x)
    n, d = x.shape
    result = torch.empty(n, d, dtype=torch.float32, device=x.device)
    inverse = torch.empty(n, 1, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        unit_rows[(n,)](x, result, inverse, d, x.stride(0), **launch_options(d, LARGEST_INVERSE=largest_inverse))
    return result, inverse


def gradient(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Of x, given that of its unit rows."""
    from ccl_fast.kernels.unit_rows import unit_rows_gradient

    grad = _with_whole_rows(grad)
    n, d = unit.shape
    result = torch.empty_like(unit)
    with on_device_of(unit):
        unit_rows_gradient[(n,)](grad, unit, inverse, result, d, grad.stride(0), **launch_options(d))
    return result


def _with_whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def launch_options(d: int, **constants) -> dict[str, Any]:
    """Of a kernel with a program for each row of d elements."""
    block = min(1 << (d - 1).bit_length(), MAX_BLOCK)
    warps = max(1, min(8, block // ELEMENTS_OF_A_WARP))
    return constants | {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
