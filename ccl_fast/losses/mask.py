"""Positives that a mask over the samples tells, as SupContrast's."""

import torch
from torch import Tensor

from ccl_fast.checks import assert_on_device, check_same, check_tensor, host_knows
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.pairs import entries
from ccl_fast.ops import row_dot
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


def check_mask(mask: Tensor, rows: Tensor) -> None:
    """Check weights [n, n] >= 0 of the samples of rows [n, ...], dense or CSR; on a GPU the device tells of others."""
    check_tensor("mask", mask, sparse=True)
    if mask.layout not in (torch.strided, torch.sparse_csr):
        raise ArgumentError(f"mask: expected a dense tensor or CSR, got layout {mask.layout}")
    n = len(rows)
    if mask.shape != (n, n):
        raise ArgumentError(f"mask: expected shape [{n}, {n}], got {list(mask.shape)}")
    if mask.is_complex() or (mask.is_floating_point() and mask.element_size() < 2):
        raise ArgumentError(f"mask: expected bool, integers or floating point, got {mask.dtype}")
    check_same("mask", mask, "embeddings", rows, dtype=False)
    values = mask.values() if mask.layout == torch.sparse_csr else mask
    inside = ((values >= 0) & values.isfinite()).all()
    if not host_knows(inside):
        assert_on_device(inside, "mask: expected weights >= 0")
    elif not inside:
        raise ArgumentError(f"mask: expected finite weights >= 0, got {values.min():g} to {values.max():g}")


def masked_similarity(z: Tensor, anchors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weighted sum of an anchor's inner products with all other views, and of the weights.

    .. math::
        \sum_{j, v} m_{ij} \langle a_i, z_{jv} \rangle - m_{ii} \langle a_i, a_i \rangle, \qquad
        V \sum_j m_{ij} - m_{ii}

    Args:
        z: ``[n, views, d]``.
        anchors: ``[n, v, d]``, the first v of these views.
        mask: ``[n, n]``, dense or CSR.

    Returns:
        Both ``[n v]``, float32 (float64 for float64).
    """
    wide = accumulation_dtype(z)
    with without_autocast(z.device):
        if mask.layout == torch.sparse_csr:
            pairs, weights = entries(mask)
            weights = weights.to(wide)
            matrix = torch.sparse_coo_tensor(torch.stack(pairs), weights, mask.shape, check_invariants=False)
            total = pairs.sums(weights, len(z))
            own = pairs.sums(weights.masked_fill(~pairs.diagonal, 0.0), len(z))
        else:
            matrix = mask.detach().to(wide)
            total, own = matrix.sum(1), matrix.diagonal()
        # The product with the sums of the views: no similarity is computed but that of each row with its own.
        wanted = matrix @ z.to(wide).sum(1)
    own = own[:, None].expand(anchors.shape[:2])
    positives = row_dot(anchors, wanted[:, None].expand_as(anchors)) - own * row_dot(anchors, anchors)
    return positives.flatten(), (z.shape[1] * total[:, None] - own).flatten()
