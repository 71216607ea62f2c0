"""Similarities of the pairs that a sparse pattern lists."""

import functools
import warnings

import torch
from torch import Tensor

from ccl_fast.checks import (
    assert_on_device,
    check_floating,
    check_integer,
    check_matrix,
    check_same,
    check_tensor,
    host_knows,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, without_autocast
from ccl_fast.ops.rowwise.half_product import factor, product


def edge_similarity(q: Tensor, k: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    r"""Inner products :math:`\langle q_i, k_j \rangle` of the edges (i, j) of a graph, given by rows (CSR).

    Time is O(e d), memory O(e + (n + m) d). Gradients flow to ``q`` and ``k``; a second derivative raises.

    Args:
        q: ``[n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        k: ``[m, d]``, same dtype and device.
        crow_indices: ``[n + 1]``, int32 or int64: the edges of row i are those from ``crow_indices[i]`` to
            ``crow_indices[i + 1]``, as in ``torch.sparse_csr_tensor``. (t neighbours each: ``arange(n + 1) * t``.)
        col_indices: ``[e]``, of the same dtype: j of each edge, 0 to m - 1, in any order, also repeated.

    Returns:
        ``[e]`` float32 (float64 for float64 input).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the edges of ``crow_indices`` are not those of
            ``col_indices`` (on a GPU: an assertion on the device).
        IndexError: an index is below 0 or not less than m (on a GPU: an assertion on the device).
    """
    check_matrix("q", q)
    check_floating("q", q)
    check_matrix("k", k, columns=q.shape[1])
    check_same("k", k, "q", q)
    for name, indices in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        check_tensor(name, indices)
        check_integer(name, indices)
        check_same(name, indices, "q", q, dtype=False)
        if indices.ndim != 1:
            raise ArgumentError(f"{name}: expected one dimension, got shape {list(indices.shape)}")
    if crow_indices.shape[0] != q.shape[0] + 1:
        raise ArgumentError(f"crow_indices: expected shape [{q.shape[0] + 1}], got {list(crow_indices.shape)}")
    check_same("col_indices", col_indices, "crow_indices", crow_indices)
    _check_values(crow_indices, col_indices, k.shape[0])
    q = in_autocast_dtype(q)
    return _SIMILARITY(q, k.to(q.dtype), crow_indices, col_indices)


def _check_values(crow_indices: Tensor, col_indices: Tensor, m: int) -> None:
    # What lies outside would be read all the same.
    ends = crow_indices[0] == 0, crow_indices[-1] == col_indices.shape[0], (crow_indices.diff() >= 0).all()
    inside = ((col_indices >= 0) & (col_indices < m)).all()
    if not (host_knows(crow_indices) and host_knows(col_indices)):
        assert_on_device(torch.stack((*ends, inside)).all(), "edge_similarity: crow_indices or col_indices")
        return
    if not all(ends):
        raise ArgumentError(
            f"crow_indices: expected increasing numbers from 0 to {col_indices.shape[0]} (of col_indices), got "
            f"{crow_indices.min():d} to {crow_indices[-1]:d}"
        )
    if not inside:
        raise IndexError(
            f"col_indices: expected 0 to {m - 1}, as there are {m} rows in k, got "
            f"{col_indices.min():d} to {col_indices.max():d}"
        )


# ---- one operator forward, one backward: two opaque nodes for what traces them ----


def _forward(q: Tensor, k: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    with without_autocast(q.device):
        dtype = accumulation_dtype(q)
        pattern = _matrix(crow_indices, col_indices, q.new_zeros(col_indices.shape[0], dtype=dtype), k.shape[0])
        if col_indices.shape[0] == 0:
            return q.new_zeros(0, dtype=dtype)
        if col_indices.shape[0] > q.shape[0] * k.shape[0]:
            # torch refuses: some edges are repeated, and the whole matrix is smaller.
            return product(factor(q), factor(k))[_rows(crow_indices, col_indices), col_indices]
        return torch.sparse.sampled_addmm(pattern, q.to(dtype), k.to(dtype).T, beta=0.0).values().clone()  # no view


def _matrix(crow_indices: Tensor, col_indices: Tensor, values: Tensor, m: int) -> Tensor:
    size = (crow_indices.shape[0] - 1, m)
    _warn_no_more()
    options = {"device": values.device, "check_invariants": False}
    return torch.sparse_csr_tensor(crow_indices, col_indices, values, size, **options)


def _rows(crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """i of each edge."""
    rows = torch.arange(crow_indices.shape[0] - 1, device=col_indices.device, dtype=col_indices.dtype)
    return rows.repeat_interleave(crow_indices.diff(), output_size=col_indices.shape[0])


@functools.cache
def _warn_no_more() -> None:
    """torch says once that its sparse rows are in beta; that concerns us, not who calls us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0], [], [], (0, 0), device="cpu", check_invariants=False)


def _empty(q, k, crow_indices, col_indices):
    return q.new_empty(col_indices.shape[0], dtype=accumulation_dtype(q))


def _backward(
    q: Tensor, k: Tensor, crow_indices: Tensor, col_indices: Tensor, grad: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    with without_autocast(q.device):
        (n, m), need_q, need_k = (q.shape[0], k.shape[0]), *needs
        grad_q, grad_k = q.new_empty(0), q.new_empty(0)  # an operator's results must not share memory
        if need_q:
            grad_q = (_matrix(crow_indices, col_indices, grad, m) @ k.to(grad.dtype)).to(q.dtype)
        if need_k:
            rows = torch.arange(n, device=q.device, dtype=col_indices.dtype)
            rows = rows.repeat_interleave(crow_indices.diff(), output_size=col_indices.shape[0])
            pairs = torch.stack((col_indices, rows))
            transposed = torch.sparse_coo_tensor(pairs, grad, (m, n), device=grad.device, check_invariants=False)
            grad_k = torch.sparse.mm(transposed, q.to(grad.dtype)).to(k.dtype)
        return grad_q, grad_k


def _empty_gradients(q, k, crow_indices, col_indices, grad, needs):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else q.new_empty(0)
        for x, need in zip((q, k), needs, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor):
    needs = list(ctx.needs_input_grad[:2])
    grads = _GRADIENT(*ctx.saved_tensors, grad, needs)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), None, None)


_SIMILARITY = Differentiable("edge_similarity", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator("edge_similarity_backward", _backward, _empty_gradients, of="edge_similarity")
