"""Sums of rows by cluster by the CUDA extension."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address

# Rows that one block sums.
PIECE_ROWS = 256


def sum_by_cluster(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `update.sum_by_cluster` says of a backend."""
    x, d = x.contiguous(), x.shape[1]
    weights = None if weights is None else weights.contiguous()
    order, offsets, piece_offsets = _segments(clusters, count)
    pieces = -(-len(x) // PIECE_ROWS) + count  # at most: how many there are is known to the device alone
    partial = torch.empty(pieces, d, dtype=torch.float64, device=x.device)
    partial_weight = torch.empty(pieces, dtype=torch.float64, device=x.device)
    sums = torch.empty(count, d, dtype=torch.float64, device=x.device)
    total_weight = torch.empty(count, dtype=torch.float64, device=x.device)
    extension.compiled().kmeans_update(
        address(x), extension.dtype_code(x.dtype), count, d, address(order), address(offsets), address(piece_offsets),
        pieces, address(weights), address(partial), address(partial_weight), address(sums), address(total_weight),
        *extension.where(x),
    )  # fmt: skip
    return sums, total_weight


def _segments(clusters: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers sorted by cluster; where each cluster begins, in rows and in pieces, [count + 1] each."""
    in_order, order = clusters.sort(stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(count + 1, device=clusters.device))
    pieces = (offsets.diff() + PIECE_ROWS - 1) // PIECE_ROWS
    return order, offsets, F.pad(pieces.cumsum(0), (1, 0))
