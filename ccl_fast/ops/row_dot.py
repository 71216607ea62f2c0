"""Row-wise inner products."""

import contextlib

import torch
from torch import Tensor


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> of two [n, d], in float32 (float64 for float64) also for half-precision rows and under autocast."""
    wide = torch.promote_types(a.dtype, torch.float32)
    with without_autocast(a.device):
        return torch.linalg.vecdot(a.to(wide), b.to(wide))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Where autocast is off already, nothing: a context costs as much as a small operation."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
