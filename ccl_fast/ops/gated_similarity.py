"""Cosines under a gate of every row, by two products."""

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_matrix, check_same
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.normalize import normalize_embeddings
from ccl_fast.ops.precision import accumulation_dtype, without_autocast

# Gated rows of a squared length below this count as 0, so that no gradient is infinite.
LEAST_SQUARE = 1e-24


def gated_similarity(q: Tensor, gates: Tensor, k: Tensor) -> Tensor:
    r"""Cosines of rows and keys whose dimensions are weighted by a gate of the row.

    .. math::
        \cos(g_i \odot q_i, g_i \odot k_j) = \frac{\langle g_i^2 \odot q_i, k_j \rangle}
            {|g_i \odot q_i| \sqrt{\langle g_i^2, k_j^2 \rangle}}

    The keys are never gated for each row, which would take n x m x d numbers: there are two products, of O(n m d) time,
    and n x m numbers; for fewer at a time it is what `map_row_blocks` is for. Gradients flow to all.

    Args:
        q: ``[n, d]``, float64, float32, bfloat16 or float16.
        gates: g, ``[n, d]``.
        k: ``[m, d]``.

    Returns:
        ``[n, m]``, float32 (float64 for float64 input); 0, without a gradient, where a gated row is 0
        (below 1e-12 of the product of both lengths).

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or device.

    Example:
        >>> import torch
        >>> from ccl_fast.ops import gated_similarity
        >>> gated_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 9.0]]))
        tensor([[1.]])
    """
    check_matrix("q", q)
    check_floating("q", q)
    for name, x in (("gates", gates), ("k", k)):
        check_matrix(name, x, columns=q.shape[1])
        check_floating(name, x)
        check_same(name, x, "q", q, dtype=False)
    if gates.shape != q.shape:
        raise ArgumentError(f"gates: expected shape {list(q.shape)} (that of q), got {list(gates.shape)}")
    wide = torch.promote_types(accumulation_dtype(q), accumulation_dtype(gates))
    with without_autocast(q.device):
        # Of length 1, which changes no cosine, so that no square over- or underflows.
        q, gates, k = (normalize_embeddings(x.to(wide)) for x in (q, gates, k))
        squares = gates.square()
        weighted = squares * q
        of_rows = _inverse_length((weighted * q).sum(1, keepdim=True))
        return (weighted * of_rows) @ k.T * _inverse_length(squares @ k.square().T)


def _inverse_length(square: Tensor) -> Tensor:
    return square.clamp(min=LEAST_SQUARE).rsqrt().masked_fill(square < LEAST_SQUARE, 0.0)
