"""Distances of rows to centres in plain torch."""

import torch
from torch import Tensor

from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.threads import for_each_block

# Largest number of entries of one block of differences: on a CPU it should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 16, 1 << 26


def center_distance(x: Tensor, centers: Tensor, labels: Tensor, metric: str) -> Tensor:
    """As `distance.center_distance`."""
    size = max(1, (CPU_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES) // max(1, x.shape[2]))
    distance = torch.empty(labels.shape, dtype=centers.dtype, device=x.device)
    for problem in range(len(x)):

        def work(part: slice, problem: int = problem) -> None:
            nearest = centers[problem][labels[problem, part]]
            distance[problem, part] = _distance(x[problem, part].to(centers.dtype), nearest, metric)

        for_each_block(x.shape[1], size, work, x.device)
    return distance


def _distance(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return (x - centers).square_().sum(1)
    return (1 - (normalize_rows(x.double()) * normalize_rows(centers.double())).sum(1)).clamp_(min=0)
