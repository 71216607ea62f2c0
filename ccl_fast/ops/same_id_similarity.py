"""Sums over the same-id pairs of a batch, in O(n d): "same id" is an equivalence relation, so no mask is needed."""

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_matrix, check_same, check_vector
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable
from ccl_fast.ops.ids import place_of_first
from ccl_fast.ops.precision import accumulation_dtype
from ccl_fast.ops.row_dot import row_dot

# Rows of another part of the batch that are brought to accumulation precision at once.
PART_ROWS = 8192


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

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or device.
    """
    check_matrix("z", z)
    check_floating("z", z)
    check_vector("ids", ids, z.shape[0])
    check_same("ids", ids, "z", z, dtype=False)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ArgumentError(f"ids: expected integers, got {ids.dtype}")
    ordered, ids = ids.sort().values, ids.contiguous()
    group, end = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)
    return _SIMILARITY(z, group), (end - group - 1).to(accumulation_dtype(z))


def _similarity(z: Tensor, group: Tensor) -> Tensor:
    x = _accumulated(z)
    return row_dot(_group_sums(x, group).sub_(x), x)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor, None]:
    z, group = ctx.saved_tensors
    return _gradient(z, group, grad).to(z.dtype), None


# Keeps z and the ids only; autograd would keep three more arrays of the size of z.
_SIMILARITY = Differentiable("same_id_similarity", _similarity, _save, _gradients)


def same_group_sums(q: Tensor, group: Tensor, k: Tensor | None = None, k_group: Tensor | None = None) -> Tensor:
    """Sum of every row's inner products with the keys of its group (None: with the other rows), in O((n + m) d).

    Groups are those of `groups_of`. Not differentiable.
    """
    if k is None or k_group is None:
        return _similarity(q, group)
    return row_dot(_by_group(q.shape[0] + k.shape[0], _accumulated(k), k_group)[group], q)


def same_group_gradients(
    q: Tensor,
    k: Tensor | None,
    group: Tensor,
    k_group: Tensor | None,
    scale: Tensor,
    grad: Tensor,
    needs: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and the scale, in accumulation precision, given those of `same_group_sums` times the scale."""
    need_q, need_k, need_scale = needs[:3]
    to_k = None
    if k is None or k_group is None:
        to_q = _gradient(q, group, grad)
        share = 0.5
    else:
        groups = q.shape[0] + k.shape[0]
        to_q = grad[:, None] * _by_group(groups, _accumulated(k), k_group)[group]
        share = 1.0
        if need_k:
            to_k = _by_group(groups, grad[:, None] * q, group)[k_group] * scale
    to_scale = row_dot(to_q, q).sum() * share if need_scale else None
    return to_q.mul_(scale) if need_q else None, to_k, to_scale


def same_id_similarity_gradient(z: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """Gradient of z in `same_id_similarity`, given that of the sums: [n, d] in accumulation precision."""
    return _gradient(z, place_of_first(ids), grad)


def _gradient(z: Tensor, group: Tensor, grad: Tensor) -> Tensor:
    x, g = _accumulated(z), grad[:, None]
    # d/dz_i of sum_j g_j <z_j, S_j - z_j>: as the anchor g_i (S - z_i), as another's positive (G - g_i z_i).
    grad_z = g * _group_sums(x, group).sub_(x)
    weighted = g * x
    return grad_z.add_(_group_sums(weighted, group).sub_(weighted))


def _group_sums(x: Tensor, group: Tensor) -> Tensor:
    """For each row the sum of the rows of its group."""
    return torch.zeros_like(x).index_add_(0, group, x)[group]


def mutual_similarity(z: Tensor, ids: Tensor, others: Tensor, other_ids: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The same between two parts of a batch, z [n, d], n > 0, and others [m, d], which share no row.

    Sums and counts of the rows of z over the others, and of the others over z. Not differentiable. Memory O(n d + m).
    """
    group, other_group = _groups_of_first(ids, other_ids)
    x = _accumulated(z)
    ones, other_ones = x.new_ones(z.shape[0]), x.new_ones(others.shape[0])
    own_sums, sums = _by_group(z.shape[0], x, group), x.new_zeros(z.shape[0] + 1, z.shape[1])
    of_others = torch.empty_like(other_ones)
    for part, y in _parts(others):
        sums.index_add_(0, other_group[part], y)
        of_others[part] = row_dot(own_sums[other_group[part]], y)
    counts = _by_group(z.shape[0], other_ones, other_group)[group]
    return (row_dot(sums[group], x), counts), (of_others, _by_group(z.shape[0], ones, group)[other_group])


def mutual_similarity_gradient(
    z: Tensor, ids: Tensor, grad: Tensor, others: Tensor, other_ids: Tensor, other_grad: Tensor
) -> Tensor:
    """Gradient of z in `mutual_similarity`, given those of both sums: [n, d] in accumulation precision."""
    group, other_group = _groups_of_first(ids, other_ids)
    sums, weighted = (torch.zeros(z.shape[0] + 1, z.shape[1], dtype=grad.dtype, device=z.device) for _ in range(2))
    for part, y in _parts(others):
        sums.index_add_(0, other_group[part], y)
        weighted.index_add_(0, other_group[part], other_grad[part, None] * y)
    return (grad[:, None] * sums[group]).add_(weighted[group])


def _groups_of_first(ids: Tensor, other_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers below n for the ids [n], n > 0; for the others those of the same id, and n if there is none."""
    group = place_of_first(ids)
    ordered, order = ids.sort()
    place = torch.searchsorted(ordered, other_ids).clamp_(max=ids.shape[0] - 1)
    return group, torch.where(ordered[place] == other_ids, group[order[place]], ids.shape[0])


def _by_group(n: int, x: Tensor, group: Tensor) -> Tensor:
    """Sums of the rows of each group 0 ... n."""
    return x.new_zeros(n + 1, *x.shape[1:]).index_add_(0, group, x)


def _parts(x: Tensor):
    """Some rows after the others, in accumulation precision."""
    for start in range(0, x.shape[0], PART_ROWS):
        part = slice(start, start + PART_ROWS)
        yield part, _accumulated(x[part])


def _accumulated(z: Tensor) -> Tensor:
    return z.to(accumulation_dtype(z))
