"""Sums of rows by cluster by the CUDA extension."""

import torch
from torch import Tensor

from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address
from ccl_fast.ops.kmeans.update_blocked import PIECE_ROWS, segments


def sum_by_cluster(
    x: Tensor, clusters: Tensor, count: int, weights: Tensor | None, wide: bool
) -> tuple[Tensor, Tensor]:
    """As `update.sum_by_cluster` says of a backend."""
    x, d = x.contiguous(), x.shape[1]
    weights = None if weights is None else weights.contiguous()
    order, offsets, piece_offsets = segments(clusters, count)
    pieces = -(-len(x) // PIECE_ROWS) + count  # at most: how many there are is known to the device alone
    partial = torch.empty(pieces, d, dtype=torch.float32, device=x.device)
    partial_weight = torch.empty(pieces, dtype=torch.float64, device=x.device)
    sums = torch.empty(count, d, dtype=torch.float64, device=x.device)
    total_weight = torch.empty(count, dtype=torch.float64, device=x.device)
    extension.compiled().kmeans_update(
        address(x), extension.dtype_code(x.dtype), count, d, address(order), address(offsets), address(piece_offsets),
        pieces, address(weights), address(partial), address(partial_weight), address(sums), address(total_weight),
        *extension.where(x),
    )  # fmt: skip
    return sums, total_weight
