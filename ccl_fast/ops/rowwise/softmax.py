"""What needs more of a row's softmax than a log-sum-exp: of its hardest keys, of all but some, its mean similarity."""

import torch
from torch import Tensor

from ccl_fast.checks import (
    Candidates,
    check_candidates,
    check_count,
    check_integer,
    check_logits,
    check_matrix,
    check_same,
    host_knows,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.precision import in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.rowwise.blocks import RowBlocks
from ccl_fast.ops.rowwise.topk import kth_largest


def topk_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    topk: int,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: Candidates = "all",
) -> Tensor:
    r"""Log-sum-exp over each row's most similar keys.

    .. math::
        \mathrm{LSE}_i = \log \sum_{j \in A(i):\ \langle q_i, k_j \rangle \ge \theta_i}
            e^{\mathrm{scale} \cdot \langle q_i, k_j \rangle}

    with :math:`\theta_i` the row's ``topk``-th largest similarity among its candidates (where there are fewer, all of
    them count; so do ties with it, as far as equal keys get the same product). The threshold is a constant: gradients
    flow to ``q``, ``k`` and ``scale`` through the sum. Some rows are computed at a time against all keys: memory is
    linear in n and m, whatever ``topk``. A second
    derivative raises.

    Args:
        q, k, scale, q_ids, k_ids, candidates: as in `streaming_logsumexp`.
        topk: at least 1.

    Returns:
        ``[n]`` float32 (float64 for float64 input); -inf, with zero gradient, where A(i) is empty.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    check_count("topk", topk)
    return _row_softmax(q, k, scale, None, q_ids, k_ids, None, candidates, topk, "logsumexp")


def expected_similarity(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    key_bias: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: Candidates = "all",
) -> Tensor:
    r"""A row's mean similarity with its candidates, weighted by their softmax.

    .. math::
        E_i = \sum_{j \in A(i)} p_{ij} \langle q_i, k_j \rangle, \qquad
        p_{ij} = \frac{e^{s_{ij}}}{\sum_{l \in A(i)} e^{s_{il}}}, \qquad
        s_{ij} = \mathrm{scale} \cdot \langle q_i, k_j \rangle + \mathrm{bias}_j

    It is the derivative of the row's log-sum-exp with respect to the scale. Gradients flow to ``q``, ``k``, ``scale``
    and ``key_bias``, through the softmax too:

    .. math::
        \partial E_i / \partial \langle q_i, k_j \rangle =
            p_{ij} \big( 1 + \mathrm{scale} \cdot (\langle q_i, k_j \rangle - E_i) \big)

    Some rows are computed at a time against all keys: memory is linear in n and m. A second derivative raises.

    Args:
        q, k, key_bias, q_ids, k_ids, candidates: as in `streaming_logsumexp`.
        scale: likewise; it may be negative (the least similar weigh most) or 0 (the plain mean).

    Returns:
        ``[n]`` float32 (float64 for float64 input); 0, with zero gradient, where A(i) is empty.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    return _row_softmax(q, k, scale, key_bias, q_ids, k_ids, None, candidates, 0, "mean")


def logsumexp_excluding(q: Tensor, k: Tensor, excluded: Tensor, *, scale: float | Tensor) -> Tensor:
    r"""Log-sum-exp over all keys that are not on the row's list.

    .. math::
        \mathrm{LSE}_i = \log \sum_{j \notin E_i} e^{\mathrm{scale} \cdot \langle q_i, k_j \rangle}

    What is on the list never enters the sum, so nothing cancels, however much larger it is. Gradients flow to ``q``,
    ``k`` and ``scale``. Some rows are computed at a time against all keys: memory is linear in n and m. A second
    derivative raises.

    Args:
        q, k, scale: as in `streaming_logsumexp`.
        excluded: E, ``[n, l]``, int32 or int64: rows of ``k``; below 0 is none.

    Returns:
        ``[n]`` float32 (float64 for float64 input); -inf, with zero gradient, where no key is left.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        IndexError: a number on the list is no row of ``k`` (on a GPU torch's assertion on the device).
    """
    check_matrix("q", q)
    check_matrix("k", k)
    check_matrix("excluded", excluded)
    check_integer("excluded", excluded)
    check_same("excluded", excluded, "k", k, dtype=False)
    if excluded.shape[0] != q.shape[0]:
        raise ArgumentError(f"excluded: expected {q.shape[0]} rows (those of q), got {excluded.shape[0]}")
    if host_knows(excluded) and excluded.numel() and excluded.max() >= k.shape[0]:
        raise IndexError(f"excluded: expected rows of k, below {k.shape[0]}, got {excluded.max():d}")
    return _row_softmax(q, k, scale, None, None, None, excluded.long(), "all", 0, "logsumexp")


def _row_softmax(q, k, scale, key_bias, q_ids, k_ids, excluded, candidates, topk, wanted) -> Tensor:
    check_candidates(q, k, q_ids, k_ids, candidates)
    check_logits(q, k, scale, key_bias)
    q = in_autocast_dtype(q)
    k = None if k is None else k.to(q.dtype)
    scale = scale_tensor(scale, q)
    key_bias = None if key_bias is None else key_bias.to(scale.dtype)
    logsumexp, mean, _ = _SOFTMAX(q, k, scale, key_bias, q_ids, k_ids, excluded, candidates, topk, wanted == "mean")
    return mean if wanted == "mean" else logsumexp


# ---- one operator forward, one backward: two opaque nodes for what traces them ----


def _forward(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    key_bias: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    excluded: Tensor | None,
    candidates: str,
    topk: int,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row's softmax over its candidates, or over the ``topk`` (if not 0) most similar of them.

    The log-sum-exp, the mean similarity (empty if not wanted) and the least similarity of the ``topk`` (empty if all).
    """
    with without_autocast(q.device):
        blocks = RowBlocks(q, k, q_ids, k_ids, candidates, excluded)
        logsumexp, mean, threshold = (scale.new_empty(size) for size in _sizes(q, topk, with_mean))
        for rows in blocks:
            x = _similarities(blocks, rows, topk > 0)
            if topk:
                # Of fewer candidates all, but nothing else.
                threshold[rows] = kth_largest(x, topk).clamp_(min=torch.finfo(x.dtype).min / 2)
            logits = _logits(blocks, x, rows, scale, key_bias, threshold)
            maximum = logits.amax(1) if logits.shape[1] else logits.new_full((logits.shape[0],), -torch.inf)
            weights = _exp_(logits, maximum)
            total = weights.sum(1)
            logsumexp[rows] = maximum + total.log()
            if with_mean:
                mean[rows] = weights.mul_(x).sum(1) / total.masked_fill_(total == 0, 1.0)
        return logsumexp, mean, threshold


def _sizes(q: Tensor, topk: int, with_mean: bool) -> tuple[int, int, int]:
    n = q.shape[0]
    return n, n if with_mean else 0, n if topk else 0


def _similarities(blocks: RowBlocks, rows: slice, of_candidates: bool) -> Tensor:
    """Those of the rows; what is no candidate has the least number of all, if that is wanted: 0 times it is 0."""
    x = blocks.similarities(rows)
    return blocks.only_candidates_(x, rows, torch.finfo(x.dtype).min) if of_candidates else x


def _logits(
    blocks: RowBlocks, x: Tensor, rows: slice, scale: Tensor, key_bias: Tensor | None, threshold: Tensor
) -> Tensor:
    """Of similarities x; -inf for keys that do not take part. Forward and backward they are rounded alike."""
    logits = x * scale if key_bias is None else torch.addcmul(key_bias, x, scale)
    if threshold.shape[0]:
        return logits.masked_fill_(x < threshold[rows, None], -torch.inf)
    return blocks.only_candidates_(logits, rows)


def _exp_(logits: Tensor, shift: Tensor) -> Tensor:
    return logits.sub_(shift.masked_fill(shift == -torch.inf, 0.0)[:, None]).exp_()


def _empty(q, k, scale, key_bias, q_ids, k_ids, excluded, candidates, topk, with_mean):
    return tuple(scale.new_empty(size) for size in _sizes(q, topk, with_mean))


def _backward(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    key_bias: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    excluded: Tensor | None,
    logsumexp: Tensor,
    mean: Tensor,
    threshold: Tensor,
    grad_logsumexp: Tensor,
    grad_mean: Tensor,
    candidates: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_q, need_k, need_scale, need_bias = needs
    with without_autocast(q.device):
        blocks = RowBlocks(q, k, q_ids, k_ids, candidates, excluded)
        to_scale = torch.zeros_like(scale)
        to_bias = scale.new_empty(0) if key_bias is None or not need_bias else torch.zeros_like(key_bias)

        with_mean = mean.shape[0] > 0
        grad = grad_mean if with_mean else grad_logsumexp

        def weights(rows: slice) -> Tensor:
            x, g = _similarities(blocks, rows, threshold.shape[0] > 0), grad[rows]
            p = _exp_(_logits(blocks, x, rows, scale, key_bias, threshold), logsumexp[rows])
            if with_mean:
                x.sub_(mean[rows, None])
            if need_bias or need_scale:
                # By the logits: p of the log-sum-exp, p (x - mean) of the mean.
                by_logit = p * x if with_mean else p
                if need_bias:
                    to_bias.add_(g @ by_logit)
                if need_scale:
                    to_scale.add_(torch.dot(g, row_dot(by_logit, x)))
            # By the similarities: scale times these, and of the mean p.
            by_p = (g * scale)[:, None]
            return p.mul_(torch.addcmul(g[:, None], x, by_p) if with_mean else by_p)

        grad_q, grad_k = blocks.gradients(weights, need_q, need_k)
        return (  # an operator's results must not share memory
            q.new_empty(0) if grad_q is None else grad_q.to(q.dtype),
            q.new_empty(0) if grad_k is None else grad_k.to(q.dtype),
            to_scale,
            to_bias,
        )


def _empty_gradients(
    q, k, scale, key_bias, q_ids, k_ids, excluded, logsumexp, mean, threshold, grad_logsumexp, grad_mean, candidates,
    needs,
):  # fmt: skip
    need_q, need_k, _need_scale, need_bias = needs
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else q.new_empty(0),
        torch.empty_like(k, memory_format=torch.contiguous_format) if need_k else q.new_empty(0),
        torch.empty_like(scale),
        torch.empty_like(key_bias) if need_bias else scale.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.candidates, _topk, _with_mean = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, grad_logsumexp: Tensor, grad_mean: Tensor, _grad_threshold: None):
    needs = list(ctx.needs_input_grad[:4])
    grads = _GRADIENT(*ctx.saved_tensors, grad_logsumexp, grad_mean, ctx.candidates, needs)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *(6 * [None]))


_SOFTMAX = Differentiable("row_softmax", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator(
    "row_softmax_backward",
    _backward,
    _empty_gradients,
    of="topk_logsumexp, logsumexp_excluding, expected_similarity",
)
