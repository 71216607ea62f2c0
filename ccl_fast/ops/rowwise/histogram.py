"""How similarities are distributed, without their matrix."""

import torch
from torch import Tensor

from ccl_fast.checks import LARGEST, Candidates, check_candidates, check_count, shown
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import one_by_one
from ccl_fast.ops.precision import in_autocast_dtype, without_autocast
from ccl_fast.ops.rowwise.blocks import RowBlocks

COUNTED = 1 << 24


@torch.no_grad()
def similarity_histogram(
    q: Tensor,
    k: Tensor | None = None,
    *,
    bins: int,
    range: tuple[float, float] = (-1.0, 1.0),
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: Candidates = "all",
) -> Tensor:
    r"""Histogram of the similarities :math:`\langle q_i, k_j \rangle` of all rows with their candidates.

    Some rows are computed at a time against all keys: memory is linear in n and m. No gradient flows.

    Args:
        q, k, q_ids, k_ids, candidates: as in `streaming_logsumexp`. (Of rows against themselves a pair counts twice.)
        bins: their number, at least 1, all of the same width.
        range: the least and the largest edge. Similarities outside count in the first and the last bin.

    Returns:
        Counts ``[bins]``, int64.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    check_candidates(q, k, q_ids, k_ids, candidates)
    check_count("bins", bins)
    low, high = _edges(range)
    q = in_autocast_dtype(q)
    return _op(q, None if k is None else k.to(q.dtype), q_ids, k_ids, candidates, bins, low, high)


def _edges(range) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in range)
    except (TypeError, ValueError, OverflowError):
        low = high = 0.0
    if isinstance(range, str) or not -LARGEST <= low < high <= LARGEST:
        raise ArgumentError(f"range: expected two increasing numbers, got {shown(range)}")
    return low, high


@torch.library.custom_op("ccl_fast::similarity_histogram", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    candidates: str,
    bins: int,
    low: float,
    high: float,
) -> Tensor:
    with without_autocast(q.device):
        blocks = RowBlocks(q, k, q_ids, k_ids, candidates)
        counts = torch.zeros(bins, dtype=torch.int64, device=q.device)
        for rows in blocks:
            x = blocks.only_candidates_(blocks.similarities(rows), rows, torch.nan)  # which counts nowhere
            # Counts are of the dtype of x, and float32 has all whole numbers up to 2^24 alone.
            for part in x.split(max(1, COUNTED // max(1, x.shape[1]))):
                part = part.double() if part.numel() > COUNTED else part
                counts += part.clamp_(low, high).histc(bins, low, high).long()
        return counts


_op.register_vmap(one_by_one(_op))


@_op.register_fake
def _(q, k, q_ids, k_ids, candidates, bins, low, high):
    return q.new_empty(bins, dtype=torch.int64)
