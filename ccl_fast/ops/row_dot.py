"""Row-wise inner products."""

import torch
from torch import Tensor


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> of two [n, d], in float32 (float64 for float64) also for half-precision rows and under autocast."""
    wide = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return torch.linalg.vecdot(a.to(wide), b.to(wide))
