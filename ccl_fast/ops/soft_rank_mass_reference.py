"""The dense definition: the product of all layers' swaps as a matrix of probabilities for every list."""

import math

import torch
from torch import Tensor


def soft_permutation(s: Tensor, steepness: float) -> Tensor:
    """Return the probabilities ``[b, m, m]`` that an item (row) of the lists ``[b, m]`` lands in a place (column)."""
    b, m = s.shape
    values = list(s.unbind(1))
    places = list(torch.eye(m, dtype=s.dtype, device=s.device).expand(b, m, m).unbind(2))  # [b, items] of each place
    for layer in range(m):
        for i in range(layer % 2, m - 1, 2):
            low, high = values[i], values[i + 1]
            stay = 0.5 + torch.atan(steepness * (high - low)) / math.pi
            values[i], values[i + 1] = stay * low + (1 - stay) * high, (1 - stay) * low + stay * high
            stay, low, high = stay[:, None], places[i], places[i + 1]
            places[i], places[i + 1] = stay * low + (1 - stay) * high, (1 - stay) * low + stay * high
    return torch.stack(places, dim=2)


def soft_rank_mass(s: Tensor, n_top: int, *, steepness: float = 1.0) -> Tensor:
    """As `ccl_fast.ops.soft_rank_mass`, of lists ``[b, m]``."""
    return soft_permutation(s, steepness)[:, :, s.shape[1] - n_top :].sum(2)
