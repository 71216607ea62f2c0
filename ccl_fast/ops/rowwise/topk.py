"""Each row's most similar keys, without the matrix of similarities."""

import numpy as np
import torch
from torch import Tensor

from ccl_fast.checks import (
    Candidates,
    check_candidates,
    check_count,
    check_floating,
    check_same,
    check_scale,
    check_vector,
)
from ccl_fast.ops.differentiable import one_by_one
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.rowwise.blocks import RowBlocks

# Neighbouring keys that are first judged by the best of them, and for how many groups per wanted key that pays.
GROUP, MIN_GROUPS = 16, 4


@torch.no_grad()
def streaming_topk(
    q: Tensor,
    k: Tensor | None = None,
    *,
    topk: int,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: Candidates = "all",
    ceiling: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The ``topk`` largest similarities :math:`\langle q_i, k_j \rangle` of every row, and whose they are.

    Of a row over its candidates A(i). Some rows are computed at a time against all keys: memory is linear in n and m,
    besides the result. No gradient flows; `edge_similarity` gives differentiable similarities of the pairs that were
    found.

    Args:
        q, k, q_ids, k_ids, candidates: as in `streaming_logsumexp`.
        topk: at least 1.
        ceiling: keys that are more similar than this do not count: a number, or ``[n]``, of each row. (Semi-hard
            negatives are below the positive's similarity, or at some distance at least.)

    Returns:
        Similarities ``[n, topk]``, float32 (float64 for float64 input), the largest first, and the keys' numbers
        ``[n, topk]`` int64. Where A(i) has fewer keys, up to the ceiling: -inf, and -1. Ties are broken at will.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    check_count("topk", topk)
    check_candidates(q, k, q_ids, k_ids, candidates)
    q = in_autocast_dtype(q)
    return _op(q, None if k is None else k.to(q.dtype), q_ids, k_ids, candidates, topk, _of_rows(ceiling, q))


def _of_rows(ceiling: float | Tensor | None, q: Tensor) -> Tensor | None:
    """A ceiling of each row, in accumulation precision."""
    if ceiling is None:
        return None
    if isinstance(ceiling, Tensor) and ceiling.numel() != 1:
        check_vector("ceiling", ceiling, q.shape[0])
        check_floating("ceiling", ceiling)
        check_same("ceiling", ceiling, "q", q, dtype=False)
        return ceiling.to(accumulation_dtype(q))
    check_scale("ceiling", ceiling)
    return scale_tensor(ceiling, q).expand(q.shape[0]).clone()


@torch.library.custom_op("ccl_fast::streaming_topk", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    candidates: str,
    topk: int,
    ceiling: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with without_autocast(q.device):
        blocks = RowBlocks(q, k, q_ids, k_ids, candidates)
        values, indices = _empty(q, topk)
        found = min(topk, blocks.k.shape[0])
        values[:, found:], indices[:, found:] = -torch.inf, -1
        for rows in blocks:
            x = blocks.only_candidates_(blocks.similarities(rows), rows)
            if ceiling is not None:
                x.masked_fill_(x > ceiling[rows, None], -torch.inf)
            best, where = largest(x, found)
            values[rows, :found] = best
            indices[rows, :found] = where.masked_fill_(best == -torch.inf, -1)
        return values, indices


def _empty(q: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    values = q.new_empty(q.shape[0], topk, dtype=accumulation_dtype(q))
    return values, torch.empty_like(values, dtype=torch.int64)


_op.register_vmap(one_by_one(_op))


@_op.register_fake
def _(q, k, q_ids, k_ids, candidates, topk, ceiling):
    return _empty(q, topk)


def largest(x: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """``x.topk(topk)`` along rows: all of them lie in the ``topk`` groups of keys whose best are best."""
    groups = x.shape[1] // GROUP
    if groups < MIN_GROUPS * topk:
        return _largest_of_few(x, topk)
    grouped = groups * GROUP
    best = x[:, :grouped].unflatten(1, (groups, GROUP)).amax(2)
    first = best.topk(topk, sorted=False).indices * GROUP
    where = (first[:, :, None] + torch.arange(GROUP, device=x.device)).flatten(1)
    if grouped < x.shape[1]:
        rest = torch.arange(grouped, x.shape[1], device=x.device).expand(x.shape[0], -1)
        where = torch.cat((where, rest), dim=1)
    values, order = x.gather(1, where).topk(topk)
    return values, where.gather(1, order)


def _largest_of_few(x: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu" or topk == 0:
        return x.topk(topk)
    # NumPy's selection and sort are vectorised: where many are wanted, ten times as fast as torch's.
    where = torch.from_numpy(np.argpartition(x.numpy(), x.shape[1] - topk, axis=1)[:, x.shape[1] - topk :])
    values = x.gather(1, where)
    order = torch.from_numpy(np.argsort(values.numpy(), axis=1)).flip(1)
    return values.gather(1, order), where.gather(1, order)


def kth_largest(x: Tensor, k: int) -> Tensor:
    """Of every row [n, m] the k-th largest value; the least one if there are fewer."""
    k = min(k, x.shape[1])
    if k == 0:
        return x.new_full((x.shape[0],), -torch.inf)
    if x.device.type == "cpu":
        place = x.shape[1] - k
        return torch.from_numpy(np.partition(x.numpy(), place, axis=1)[:, place])
    return largest(x, k)[0][:, -1]
