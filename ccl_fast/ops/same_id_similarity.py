"""Sums over the same-id pairs of a batch, in O(n d): "same id" is an equivalence relation, so no mask is needed."""

import torch
from torch import Tensor

from ccl_fast.ops.ids import consecutive_ids
from ccl_fast.ops.row_dot import row_dot


def same_id_similarity(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sum of a row's inner products with the other rows of its id, and their number.

    .. math::
        \sum_{j \ne i,\ y_j = y_i} \langle z_i, z_j \rangle = \langle z_i, S_{y_i} - z_i \rangle, \qquad
        S_c = \sum_{j:\ y_j = c} z_j

    Args:
        z: ``[n, d]`` floating point; sums are taken in float32 (float64 for float64).
        ids: ``[n]`` integers, any values.

    Returns:
        The sums ``[n]`` float32 (float64 for float64) and the counts ``[n]`` of the same dtype.
    """
    group = consecutive_ids(ids)
    counts = torch.zeros(z.shape[0], dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    counts = counts.index_add(0, group, torch.ones_like(counts))[group] - 1
    return _SameIdSimilarity.apply(z, group), counts


class _SameIdSimilarity(torch.autograd.Function):
    """Keeps z and the ids only; autograd would keep three more arrays of the size of z."""

    @staticmethod
    def forward(ctx, z, group):
        ctx.save_for_backward(z, group)
        x = _accumulated(z)
        return row_dot(_group_sums(x, group).sub_(x), x)

    @staticmethod
    def backward(ctx, grad):
        z, group = ctx.saved_tensors
        x, g = _accumulated(z), grad[:, None]
        # d/dz_i of sum_j g_j <z_j, S_j - z_j>: as the anchor g_i (S - z_i), as another's positive (G - g_i z_i).
        grad_z = g * _group_sums(x, group).sub_(x)
        weighted = g * x
        return grad_z.add_(_group_sums(weighted, group).sub_(weighted)).to(z.dtype), None


def _group_sums(x: Tensor, group: Tensor) -> Tensor:
    """For each row the sum of the rows of its group."""
    return torch.zeros_like(x).index_add_(0, group, x)[group]


def _accumulated(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
