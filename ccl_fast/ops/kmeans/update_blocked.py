"""Sums of rows by cluster in plain torch."""

import torch
from torch import Tensor

# Entries that are summed at once: on a CPU they should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 17, 1 << 25


def sum_by_cluster(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `update.sum_by_cluster` says of a backend."""
    sums = torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device)
    total_weights = torch.zeros(count, dtype=torch.float64, device=x.device)

    def add(total: Tensor, to: Tensor, rows: Tensor) -> None:
        if x.device.type == "cpu":
            total.index_add_(0, to, rows)  # row after row
        else:
            total.index_put_((to,), rows, accumulate=True)  # sorted, while index_add_ would use atomics

    size = max(1, (CPU_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES) // max(1, x.shape[1]))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        rows = x[part].double()
        if weights is None:
            add(sums, clusters[part], rows)
            continue
        weight = weights[part].double()
        add(sums, clusters[part], rows * weight[:, None])
        add(total_weights, clusters[part], weight)
    return sums, clusters.bincount(minlength=count).double() if weights is None else total_weights
