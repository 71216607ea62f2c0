"""Sums of rows by cluster in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ccl_fast.ops.precision import accumulation_dtype

# Rows that are summed in the working precision before float64 takes over.
PIECE_ROWS = 256
# Entries that are summed in float64 from the start, at once: on a CPU they should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 17, 1 << 25


def sum_by_cluster(
    x: Tensor, clusters: Tensor, count: int, weights: Tensor | None, wide: bool
) -> tuple[Tensor, Tensor]:
    """As `update.sum_by_cluster` says of a backend."""
    return (_in_float64 if wide else _in_pieces)(x, clusters, count, weights)


def segments(clusters: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers sorted by cluster; where each cluster begins, in rows and in pieces, [count + 1] each."""
    in_order, order = clusters.sort(stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(count + 1, device=clusters.device))
    pieces = (offsets.diff() + PIECE_ROWS - 1) // PIECE_ROWS
    return order, offsets, F.pad(pieces.cumsum(0), (1, 0))


def _in_pieces(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device)
    if len(x) == 0:
        return sums, sums.sum(1)
    order, offsets, piece_offsets = segments(clusters, count)
    cluster = torch.repeat_interleave(torch.arange(count, device=x.device), piece_offsets.diff())
    piece = torch.arange(len(cluster), device=x.device) - piece_offsets[cluster]
    starts = offsets[cluster] + PIECE_ROWS * piece

    def add(rows: Tensor, totals: Tensor, row_weights: Tensor | None) -> Tensor:
        partial = F.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=row_weights)
        for i in range(int(piece_offsets.diff().max())):  # one piece of every cluster after the other
            present = (piece_offsets.diff() > i).nonzero()[:, 0]
            totals[present] += partial[piece_offsets[present] + i]
        return totals

    rows = x.to(accumulation_dtype(x)).contiguous()  # other strides would take other kernels
    if weights is None:
        return add(rows, sums, None), offsets.diff().double()
    total_weights = torch.zeros(count, 1, dtype=torch.float64, device=x.device)
    return add(rows, sums, weights[order]), add(weights[:, None].double(), total_weights, None)[:, 0]


def _in_float64(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
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
            weight = torch.ones_like(rows[:, 0])
        else:
            weight = weights[part].double()
            rows = rows * weight[:, None]
        add(sums, clusters[part], rows)
        add(total_weights, clusters[part], weight)
    return sums, total_weights
