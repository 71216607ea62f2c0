"""Row-wise inner products."""

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_same, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import savable
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> of two [n, d], in float32 (float64 for float64) also for half-precision rows and under autocast."""
    for name, x in (("a", a), ("b", b)):
        check_tensor(name, x)
        check_floating(name, x)
    check_same("b", b, "a", a, dtype=False)
    if a.shape != b.shape or a.ndim == 0:
        raise ArgumentError(f"b: expected shape {list(a.shape)} (that of a) of rows, got {list(b.shape)}")
    wide = accumulation_dtype(a)
    with without_autocast(a.device):
        return torch.linalg.vecdot(savable(a.to(wide)), savable(b.to(wide)))
