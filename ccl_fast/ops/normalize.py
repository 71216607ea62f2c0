"""Vectors of length 1."""

import torch
from torch import Tensor

from ccl_fast.ops.precision import accumulation_dtype


def normalize_rows(x: Tensor) -> Tensor:
    """``x / |x|`` over the last axis; zero vectors stay zero. No square over- or underflows."""
    largest = x.abs().amax(-1, keepdim=True)
    x = torch.where(largest > 0, x / largest, 0.0)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)  # a component is 1 now, if not all are 0


def normalize_embeddings(x: Tensor) -> Tensor:
    """The same of rows [n, d] whose squares are in range, differentiable any number of times; float32 for half ones.

    A row of zeros gets the gradient 0. (That of torch's normalize is 1e12 times what it is given.)
    """
    x = x.to(accumulation_dtype(x))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * torch.where(norm > torch.finfo(x.dtype).tiny, norm, torch.inf).reciprocal()
