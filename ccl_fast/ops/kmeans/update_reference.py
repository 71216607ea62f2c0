"""Sums of rows by cluster by definition, in float64."""

import torch
from torch import Tensor


def sum_by_cluster(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `update.sum_by_cluster` says of a backend."""
    weights = torch.ones(len(x), dtype=torch.float64, device=x.device) if weights is None else weights.double()
    sums = torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device)
    total_weights = torch.zeros(count, dtype=torch.float64, device=x.device)
    return sums.index_add_(0, clusters, weights[:, None] * x.double()), total_weights.index_add_(0, clusters, weights)
