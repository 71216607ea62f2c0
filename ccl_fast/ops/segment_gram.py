"""Gram matrices of the rows of every cluster, in memory that is linear in the rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_ids, check_matrix, check_same
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.ids import check_ids_below
from ccl_fast.ops.precision import accumulation_dtype, without_autocast
from ccl_fast.ops.rowwise.blocks import blocks_of

# Rows of a cluster that are brought together at once, and numbers of rows weighted for all clusters.
SEGMENT_ROWS, MIN_ROWS = 8192, 32
CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 20, 1 << 26


def segment_gram(
    z: Tensor, ids: Tensor | None = None, n_clusters: int | None = None, *, weights: Tensor | None = None
) -> Tensor:
    r"""Sum of the outer products of the rows of every cluster.

    .. math::
        G_k = \sum_{i:\ y_i = k} z_i z_i^T, \qquad\text{or with weights}\qquad G_k = \sum_i w_{ik}\, z_i z_i^T

    With a column of ones beside z, the last row of G_k holds the sum of the cluster's rows, and their number. Of rows
    that are far from the origin subtract the mean first, if it is the spread that is wanted.

    Time is O(n d^2) with ids (O(n K d^2) with weights), memory O((n + K d) d): no outer product of a single row
    exists. Gradients flow to ``z`` and ``weights``; a second derivative raises.

    Args:
        z: ``[n, d]``, float64, float32, bfloat16 or float16; sums are taken in float32 (float64 for float64), also
            under autocast.
        ids: y, ``[n]``, int32 or int64, below ``n_clusters``; of a row below 0 nothing counts.
        n_clusters: K, with ``ids``.
        weights: w, ``[n, K]``, in place of both: the dtype of z, any values.

    Returns:
        G, ``[K, d, d]``, float32 (float64 for float64 input); zero for empty clusters.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or device.
        IndexError: an id is not below ``n_clusters`` (on a GPU: an assertion on the device).

    Example:
        >>> import torch
        >>> from ccl_fast.ops import segment_gram
        >>> z = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
        >>> segment_gram(z, torch.tensor([0, 0, 1]), 2).tolist()
        [[[10.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]]
    """
    check_matrix("z", z)
    check_floating("z", z)
    if (ids is None) == (weights is None):
        raise ArgumentError(f"ids, weights: expected one of the two, got {'none' if ids is None else 'both'}")
    if weights is not None:
        if n_clusters is not None:
            raise ArgumentError(f"n_clusters: expected None with weights, got {n_clusters}")
        check_matrix("weights", weights)
        check_floating("weights", weights)
        check_same("weights", weights, "z", z)
        if weights.shape[0] != z.shape[0]:
            raise ArgumentError(f"weights: expected {z.shape[0]} rows (as z has), got {weights.shape[0]}")
        return _BY_WEIGHTS(z, weights)
    assert ids is not None
    check_ids("ids", ids, z)
    check_count("n_clusters", n_clusters)
    assert n_clusters is not None
    check_ids_below("ids", ids, n_clusters, "n_clusters")
    return _BY_IDS(z, ids, n_clusters)


# ---- by ids: the rows of a cluster are brought together, and a product of matrices sums them ----


def _segments(ids: Tensor, n_clusters: int) -> Iterator[tuple[int, Tensor]]:
    """Clusters, and some of their rows' numbers at a time. The host waits for a GPU once, for the sizes."""
    ids = ids.long().clamp(min=-1)
    order = ids.argsort(stable=True)
    unassigned, *sizes = (ids + 1).bincount(minlength=n_clusters + 1).tolist()
    for cluster, rows in enumerate(order[unassigned:].split(sizes)):
        for some in rows.split(SEGMENT_ROWS):
            if some.shape[0]:
                yield cluster, some


def _by_ids(z: Tensor, ids: Tensor, n_clusters: int) -> Tensor:
    dtype = accumulation_dtype(z)
    grams = z.new_zeros(n_clusters, z.shape[1], z.shape[1], dtype=dtype)
    with without_autocast(z.device):
        for cluster, rows in _segments(ids, n_clusters):
            x = z[rows].to(dtype)
            grams[cluster].addmm_(x.T, x)
    return grams


def _by_ids_backward(z: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    grad_z = torch.zeros_like(z, memory_format=torch.contiguous_format)
    with without_autocast(z.device):
        for cluster, rows in _segments(ids, grad.shape[0]):
            grad_z[rows] = (z[rows].to(grad.dtype) @ (grad[cluster] + grad[cluster].T)).to(z.dtype)
    return grad_z


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients_by_ids(ctx, grad: Tensor):
    return _BY_IDS_GRADIENT(*ctx.saved_tensors, grad), None, None


def _empty(z, ids, n_clusters):
    return z.new_empty(n_clusters, z.shape[1], z.shape[1], dtype=accumulation_dtype(z))


def _empty_like(z, ids, grad):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


# ---- by weights: the same rows, weighted for each cluster, side by side, in one product for a block of them ----


def _blocks(z: Tensor, weights: Tensor) -> Iterator[slice]:
    elements = CPU_ELEMENTS if z.device.type == "cpu" else DEVICE_ELEMENTS
    size = max(MIN_ROWS, min(SEGMENT_ROWS, elements // max(1, weights.shape[1] * z.shape[1])))
    return blocks_of(z.shape[0], size)


def gram_by_weights(z: Tensor, weights: Tensor) -> Tensor:
    """As `segment_gram`, without its checks; not differentiable."""
    (d, k), dtype = (z.shape[1], weights.shape[1]), accumulation_dtype(z)
    sums = z.new_zeros(k * d, d, dtype=dtype)
    with without_autocast(z.device):
        for rows in _blocks(z, weights):
            x = z[rows].to(dtype)
            sums.addmm_((weights[rows].to(dtype)[:, :, None] * x[:, None]).flatten(1).T, x)
    return sums.view(k, d, d)


def gram_by_weights_gradients(z: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of z and of the weights, given that of the Gram matrices."""
    (d, k), dtype = (z.shape[1], weights.shape[1]), grad.dtype
    grad_z, grad_weights = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (z, weights))
    with without_autocast(z.device):
        both = (grad + grad.mT).transpose(0, 1).reshape(d, k * d)
        for rows in _blocks(z, weights):
            x, w = z[rows].to(dtype), weights[rows].to(dtype)
            products = (x @ both).view(x.shape[0], k, d)
            grad_z[rows] = torch.bmm(w[:, None], products)[:, 0].to(z.dtype)
            grad_weights[rows] = (torch.bmm(products, x[:, :, None])[:, :, 0] / 2).to(weights.dtype)
    return grad_z, grad_weights


def _gradients_by_weights(ctx, grad: Tensor):
    return _BY_WEIGHTS_GRADIENT(*ctx.saved_tensors, grad)


def _empty_by_weights(z, weights):
    return z.new_empty(weights.shape[1], z.shape[1], z.shape[1], dtype=accumulation_dtype(z))


def _empty_like_both(z, weights, grad):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (z, weights))


_BY_IDS = Differentiable("segment_gram", _by_ids, _save, _gradients_by_ids, _empty)
_BY_IDS_GRADIENT = GradientOperator("segment_gram_backward", _by_ids_backward, _empty_like, of="segment_gram")
_BY_WEIGHTS = Differentiable(
    "segment_gram_by_weights", gram_by_weights, _save, _gradients_by_weights, _empty_by_weights
)
_BY_WEIGHTS_GRADIENT = GradientOperator(
    "segment_gram_by_weights_backward", gram_by_weights_gradients, _empty_like_both, of="segment_gram"
)
