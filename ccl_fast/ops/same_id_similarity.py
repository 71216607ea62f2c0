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
    return _SameIdSimilarity.apply(z, group), _counts(group, group, z) - 1


class _SameIdSimilarity(torch.autograd.Function):
    """Keeps z and the ids only; autograd would keep three more arrays of the size of z."""

    @staticmethod
    def forward(ctx, z, group):
        ctx.save_for_backward(z, group)
        x = _accumulated(z)
        return row_dot(_sums(x, group, group).sub_(x), x)

    @staticmethod
    def backward(ctx, grad):
        z, group = ctx.saved_tensors
        return _gradient(z, group, grad).to(z.dtype), None


def same_id_similarity_gradient(z: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """Gradient of z in `same_id_similarity`, given that of the sums: [n, d] in accumulation precision."""
    return _gradient(z, consecutive_ids(ids), grad)


def _gradient(z: Tensor, group: Tensor, grad: Tensor) -> Tensor:
    x, g = _accumulated(z), grad[:, None]
    # d/dz_i of sum_j g_j <z_j, S_j - z_j>: as the anchor g_i (S - z_i), as another's positive (G - g_i z_i).
    grad_z = g * _sums(x, group, group).sub_(x)
    weighted = g * x
    return grad_z.add_(_sums(weighted, group, group).sub_(weighted))


def pair_similarity(z: Tensor, ids: Tensor, others: Tensor, other_ids: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The same between two parts of a batch, z [n, d] and others [m, d], which share no row: sums and counts of the
    rows of z over the others, and of the others over z. Not differentiable."""
    group, other_group = _common_groups(ids, other_ids)
    x, y = _accumulated(z), _accumulated(others)
    return (
        (row_dot(_sums(y, other_group, group), x), _counts(other_group, group, z)),
        (row_dot(_sums(x, group, other_group), y), _counts(group, other_group, z)),
    )


def pair_similarity_gradient(
    z: Tensor, ids: Tensor, grad: Tensor, others: Tensor, other_ids: Tensor, other_grad: Tensor
) -> Tensor:
    """Gradient of z in `pair_similarity`, given those of both sums: [n, d] in accumulation precision."""
    group, other_group = _common_groups(ids, other_ids)
    y = _accumulated(others)
    as_anchor = grad[:, None] * _sums(y, other_group, group)
    return as_anchor.add_(_sums(other_grad[:, None] * y, other_group, group))


def _common_groups(ids: Tensor, other_ids: Tensor) -> tuple[Tensor, Tensor]:
    groups = consecutive_ids(torch.cat((ids, other_ids)))
    return groups[: len(ids)], groups[len(ids) :]


def _sums(x: Tensor, group: Tensor, of: Tensor) -> Tensor:
    """The sum of the rows of x of each group named in ``of``; groups are below the number of all rows."""
    groups = len(of) if group is of else len(group) + len(of)
    return x.new_zeros(groups, x.shape[1]).index_add_(0, group, x)[of]


def _counts(group: Tensor, of: Tensor, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    ones = torch.ones(len(group), dtype=dtype, device=like.device)
    return _sums(ones[:, None], group, of)[:, 0]


def _accumulated(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
