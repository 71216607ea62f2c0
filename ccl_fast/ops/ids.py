"""Relabelling of cluster ids."""

import torch
from torch import Tensor


def consecutive_ids(ids: Tensor) -> Tensor:
    """Relabel ids to 0, 1, ... in their order, int64 [n]; unlike torch.unique without a host copy."""
    ordered, order = ids.sort()
    rank = torch.zeros(ids.shape, dtype=torch.int64, device=ids.device)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(rank).scatter_(0, order, rank)
