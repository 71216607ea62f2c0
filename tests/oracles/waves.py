"""The inputs whose values by authors' code are known."""

import torch
from torch import Tensor


def waves(n: int, d: int, a: float = 0.7, b: float = 1.3) -> Tensor:
    """Return sin(a i (j + 1) + b j + 0.3 i), float64 [n, d]."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i * (j + 1) + b * j + 0.3 * i)
