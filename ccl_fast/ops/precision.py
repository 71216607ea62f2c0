"""In which precision operators multiply and add: the input's, or autocast's, and float32 at least."""

import contextlib

import torch
from torch import Tensor

from ccl_fast.checks import autocasts, product_dtype


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Of sums, and of all that follows the products of x: float32; float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scale_tensor(scale: float | Tensor, q: Tensor) -> Tensor:
    """Of no dimensions, in accumulation precision."""
    dtype = accumulation_dtype(q)
    if isinstance(scale, Tensor):
        scale = scale.to(device=q.device, dtype=dtype)
        return scale.reshape(()) if scale.ndim else scale
    return torch.full((), scale, dtype=dtype, device=q.device)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Under autocast x in its dtype, unless it is float64."""
    return x.to(product_dtype(x))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Where autocast is off already, nothing: a context costs as much as a small operation."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
