"""Numbers of which figures of published systems are known, by a formula that any language can write."""

import torch


def waves(n: int, d: int, a: float = 0.7, b: float = 1.3) -> torch.Tensor:
    """X(n, d; a, b)_ij = sin(a i (j + 1) + b j + 0.3 i), i and j from 0, float64."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return (a * i * (j + 1) + b * j + 0.3 * i).sin()
