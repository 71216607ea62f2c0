"""Row-wise inner products."""

import torch
from torch import Tensor

from ccl_fast.ops.precision import accumulation_dtype, without_autocast


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> of two [n, d], in float32 (float64 for float64) also for half-precision rows and under autocast."""
    wide = accumulation_dtype(a)
    with without_autocast(a.device):
        return torch.linalg.vecdot(a.to(wide), b.to(wide))
