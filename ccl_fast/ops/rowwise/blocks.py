"""Similarities of some rows with all keys at a time, where whole rows are needed: linear memory, plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ccl_fast.ops.precision import accumulation_dtype
from ccl_fast.ops.rowwise.half_product import Weights, columns_of, factor, product

# Similarities at a time on a CPU: they stay in its cache. Of many keys a few rows more than fit: for fewer the product
# would mostly read keys.
CPU_ELEMENTS = 1 << 20
MIN_ROWS, MAX_ROWS = 32, 512
# On a GPU they fill no cache, but launches, and what is read and written once a block, are to be few: a share of its
# memory, for all that an operator keeps of each at a time: four float32 numbers, two masks, one half and a top-k's.
DEVICE_SHARE, MIN_BYTES = 32, 384 << 20
BYTES_PER_SIMILARITY = 24


def block_rows(keys: int, device: torch.device, arrays: int = 1) -> int:
    """How many rows to compute at a time against so many keys; on a CPU so that several arrays stay in its cache."""
    if device.type == "cpu":
        return max(MIN_ROWS, min(MAX_ROWS, CPU_ELEMENTS // max(arrays * keys, 1)))
    return max(MIN_ROWS, workspace_bytes(device_memory(device)) // (BYTES_PER_SIMILARITY * max(keys, 1)))


def workspace_bytes(memory: int) -> int:
    """Of a GPU's memory what an operator takes for the blocks it works on."""
    return max(MIN_BYTES, memory // DEVICE_SHARE)


@functools.cache
def device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, used or not, so that blocks are the same in every run; 0 where torch does not tell."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def blocks_of(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` rows, one after the other."""
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


class RowBlocks:
    """<q_i, k_j> of rows [n, d] and keys [m, d] (None: the rows themselves, without i = j), in accumulation precision.

    Candidates as in `streaming_logsumexp`, without each row's list [n, l] of excluded keys (below 0: none).
    """

    def __init__(
        self, q: Tensor, k: Tensor | None = None, q_ids: Tensor | None = None, k_ids: Tensor | None = None,
        candidates: str = "all", excluded: Tensor | None = None,
    ):  # fmt: skip
        self.is_self = k is None
        self.q = factor(q)
        self.k = self.q if k is None else factor(k)
        self.q_ids, self.k_ids, self.candidates = q_ids, q_ids if k is None else k_ids, candidates
        self.excluded = excluded
        self.size = block_rows(self.k.shape[0], q.device)

    def __iter__(self) -> Iterator[slice]:
        return blocks_of(self.q.shape[0], self.size)

    def similarities(self, rows: slice) -> Tensor:
        return product(self.q[rows], self.k)

    def only_candidates_(self, x: Tensor, rows: slice, nothing: float = -torch.inf) -> Tensor:
        """x [rows, m] with ``nothing`` where a key is no candidate, in place."""
        if self.is_self:
            x[:, rows].fill_diagonal_(nothing)
        if self.candidates != "all":
            assert self.q_ids is not None and self.k_ids is not None
            same = self.q_ids[rows, None] == self.k_ids
            x.masked_fill_(same if self.candidates == "other_id" else ~same, nothing)
        if self.excluded is not None and x.shape[1]:
            keys = self.excluded[rows]
            # What is below 0 leaves key 0 as it is.
            to = torch.where(keys < 0, torch.inf, nothing).to(x.dtype)
            x.scatter_reduce_(1, keys.clamp(min=0), to, "amin")
        return x

    def gradients(
        self, weights: Callable[[slice], Tensor], need_q: bool, need_k: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Given, by rows, the derivatives W of something by the similarities: W k for q, W^T q for k.

        Of rows against themselves the sum of both, for q.
        """
        need_k = need_q if self.is_self else need_k
        dtype = accumulation_dtype(self.q)
        q_columns, k_columns = columns_of(self.q), columns_of(self.k)
        to_q = self.q.new_zeros(self.q.shape, dtype=dtype) if need_q else None
        to_k = self.k.new_zeros(k_columns.shape, dtype=dtype) if need_k else None
        for rows in self:
            w = Weights(weights(rows), self.q.dtype)
            if to_q is not None:
                to_q[rows] = w.sums_of_keys(k_columns)
            if to_k is not None:
                to_k += w.sums_of_queries(q_columns[:, rows])
        if self.is_self:
            return (None if to_q is None or to_k is None else to_q.add_(to_k.T)), None
        return to_q, None if to_k is None else to_k.T.contiguous()
