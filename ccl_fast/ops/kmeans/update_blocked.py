"""Sums of rows by cluster in plain torch."""

import torch
from torch import Tensor

# Entries that are summed at once: on a CPU they should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 17, 1 << 25
# Entries of rows that are few: what many steps make of them is kept, though that takes more memory than they do.
KEPT_ENTRIES = 1 << 20


def sum_kept(rows: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Sums of float64 rows [problems, n, columns] on a CPU by labels [problems, n]: [problems, n_clusters, columns].

    Or, of a single problem, by labels [sets, n].
    """
    sums = torch.zeros(labels.shape[0], n_clusters, rows.shape[2], dtype=rows.dtype)
    for i in range(labels.shape[0]):
        sums[i].index_add_(0, labels[i], rows[min(i, rows.shape[0] - 1)])  # row after row
    return sums


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
