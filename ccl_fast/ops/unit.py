"""Vectors of length 1."""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` over the last axis; zero vectors stay zero. No square over- or underflows."""
    largest = x.abs().amax(-1, keepdim=True)
    x = torch.where(largest > 0, x / largest, 0.0)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)  # a component is 1 now, if not all are 0
