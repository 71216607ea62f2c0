"""The dense definition of the streaming log-sum-exp: the truth of the tests, the baseline of the benchmarks."""

import torch
from torch import Tensor

from ccl_fast.ops.precision import accumulation_dtype


def logsumexp_by_relation(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    key_bias: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the keys of the row's own id, and over all other keys; O(n m) memory.

    Without ids every key counts as other, and the first result is -inf. The products are taken in the dtype
    of ``q``, everything after them in float32 (float64 for float64): what a careful dense loss would do.
    """
    logits, candidates, same = _logits(q, k, scale, key_bias, q_ids, k_ids)
    return _masked_logsumexp(logits, same), _masked_logsumexp(logits, candidates & ~same)


def contrast_by_relation(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    ids: Tensor,
    k_ids: Tensor | None,
    single: Tensor | None,
    by_id: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `contrast_with_positives`."""
    logits, candidates, same = _logits(q, k, scale, None, ids, k_ids)
    positives = logits.masked_fill(~same, 0.0).sum(1)
    if by_id:
        return _masked_logsumexp(logits, candidates & ~same), _masked_logsumexp(logits, same), positives
    left_out = torch.zeros_like(same) if single is None else same & single[:, None]
    return _masked_logsumexp(logits, candidates & ~left_out), logits.new_empty(0), positives


def _logits(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    key_bias: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, m], which of them are a row's with another one, and which of those have its id."""
    logits = (q @ (q if k is None else k).T).to(accumulation_dtype(q)) * scale
    if key_bias is not None:
        logits = logits + key_bias
    candidates = torch.ones_like(logits, dtype=torch.bool)
    if k is None:
        candidates = ~torch.eye(q.shape[0], dtype=torch.bool, device=q.device)
        k_ids = q_ids
    same = torch.zeros_like(candidates) if q_ids is None or k_ids is None else q_ids[:, None] == k_ids[None, :]
    return logits, candidates, same & candidates


def mutual_by_relation(
    q: Tensor, k: Tensor, scale: Tensor, q_ids: Tensor | None, k_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of the rows of q over those of k and, after them, of the rows of k over those of q."""
    there = logsumexp_by_relation(q, k, scale, None, q_ids, k_ids)
    back = logsumexp_by_relation(k, q, scale, None, k_ids, q_ids)
    same, other = (torch.cat(both) for both in zip(there, back, strict=True))
    return same, other


def _masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Row-wise log-sum-exp over ``mask``; -inf with zero gradient (not NaN) where a row has nothing."""
    if logits.shape[1] == 0:
        return logits.sum(dim=1) - torch.inf
    kept = logits.masked_fill(~mask, -torch.inf)
    empty = (kept == -torch.inf).all(dim=1)  # a key bias of -inf removes a key too
    return torch.logsumexp(kept.masked_fill(empty[:, None], 0.0), dim=1).masked_fill(empty, -torch.inf)
