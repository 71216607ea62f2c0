"""Products of half-precision matrices with float32 results, without a float32 copy of either, where a GPU has them.

Tensor cores multiply halves exactly and add in float32: products of rows are those of float32 copies, at many times
their rate. Weights, which are computed in float32, are rounded to halves, as a product has factors of one dtype.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ccl_fast.ops.matmul import matmul_nt
from ccl_fast.ops.precision import accumulation_dtype

HALVES = (torch.float16, torch.bfloat16)
# What the largest weight of a matrix becomes in float16, whose numbers end at 2^16 and lose bits below 2^-14.
MAX_WEIGHT = 2.0**14
# Rows of halves that begin at 16 bytes are loaded as a whole.
ALIGNMENT = 8


def factor(x: Tensor) -> Tensor:
    """x as a factor of `product`: as it is where halves can be multiplied so, else in accumulation precision."""
    if x.dtype in HALVES and multiplies_halves(x.device):
        return x.contiguous()
    return x.to(accumulation_dtype(x))


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` of two factors [n, l] and [m, l] -> [n, m] in accumulation precision. Not differentiable."""
    if x.dtype in HALVES:
        return torch.mm(x, y.T, out_dtype=torch.float32)
    return matmul_nt(x, y)


def columns_of(x: Tensor) -> Tensor:
    """A factor [n, d] as its columns [d, n], so that sums of its rows are fast products: `Weights` takes them."""
    # A library of halves is fast on rows and columns alike. Rows are aligned wherever d is, columns only where n is.
    return x.T if x.dtype in HALVES else x.T.contiguous()


class Weights:
    """W [n, m], in accumulation precision, for weighted sums of the rows of factors of a dtype."""

    def __init__(self, w: Tensor, dtype: torch.dtype):
        self.w, self.gain = _as_halves(w, dtype) if dtype in HALVES else (w, None)

    def sums_of_keys(self, k_columns: Tensor) -> Tensor:
        """W k, [n, d]; of the columns of keys [m, d]."""
        return self._undone(product(self.w, k_columns))

    def sums_of_queries(self, q_columns: Tensor) -> Tensor:
        """The columns [d, m] of W^T q; of the columns of queries [n, d]."""
        return self._undone(product(q_columns, self.w.T))

    def _undone(self, sums: Tensor) -> Tensor:
        return sums if self.gain is None else sums.div_(self.gain)


def _as_halves(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """W rounded to a dtype, its rows aligned, and what it was multiplied by."""
    n, m = w.shape
    rounded = torch.empty(n, -(-m // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=w.device)[:, :m]
    if dtype == torch.bfloat16 or w.numel() == 0:
        return rounded.copy_(w), None
    # Weights of the size of 1 / n^2 would vanish.
    low, high = w.aminmax()
    gain = MAX_WEIGHT / torch.maximum(-low, high).clamp_(min=1e-30)
    return torch.mul(w, gain, out=rounded), gain


@functools.cache
def multiplies_halves(device: torch.device) -> bool:
    """Whether torch multiplies halves with float32 results on a device, and that is fast: on NVIDIA's since Ampere."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
