"""Rows that can be written down: those of the figures in the definitions of published systems."""

import torch
from torch import Tensor
from torch.nn import functional


def waves(n: int, d: int, a: float = 0.7, b: float = 1.3) -> Tensor:
    """Return sin(a i (j + 1) + b j + 0.3 i), ``[n, d]`` float64."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i * (j + 1) + b * j + 0.3 * i)


def other_waves(n: int, d: int) -> Tensor:
    """Return the second of two views."""
    return waves(n, d, 1.1, 0.4)


def unit_waves(n: int, d: int, a: float = 0.7, b: float = 1.3) -> Tensor:
    """Return the same with rows of unit length."""
    return functional.normalize(waves(n, d, a, b), dim=1)
