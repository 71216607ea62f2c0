"""Sums of rows by cluster by the CPU extension: row after row, into float64, without a copy of the rows."""

import torch
from torch import Tensor

from ccl_fast.kernels import cpu_extension
from ccl_fast.kernels.extension import address

# Entries of rows that are converted at once, if the extension does not take them as they are: they should stay in the
# cache.
ENTRIES = 1 << 16


def sum_by_cluster(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `update.sum_by_cluster` says of a backend."""
    cpu, d = cpu_extension.best(), x.shape[1]
    sums = torch.zeros(count, d, dtype=torch.float64, device=x.device)
    totals = torch.zeros(count, dtype=torch.float64, device=x.device)
    clusters = clusters.contiguous()
    weights = None if weights is None else weights.contiguous()
    size = max(1, len(x) if cpu_extension.takes(x) else ENTRIES // max(1, d))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        rows = cpu_extension.rows_of(x[part])
        weight = None if weights is None else weights[part]
        cpu.add(
            address(rows), rows.stride(0), len(rows), d, address(weight), address(clusters[part]), address(sums),
            address(totals),
        )  # fmt: skip
    return sums, totals
