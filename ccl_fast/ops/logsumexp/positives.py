"""What a softmax with the mean of its positives is made of, and its gradient, which is one.

Where several positives prevail and are nearly equal, their weights in the softmax nearly are 1/|P|, and what is left of
the gradient is a small difference. It has to be taken weight by weight, before the products with the rows: of two
products, each of the length of a row, the rounding alone is a per cent of it.
"""

import torch
from torch import Tensor

from ccl_fast.ops.backends import BACKENDS, ContrastBackend, choose_backend
from ccl_fast.ops.differentiable import USE_REFERENCE, Differentiable, GradientOperator
from ccl_fast.ops.ids import groups_of_single_positives
from ccl_fast.ops.logsumexp.reference import contrast_by_relation
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.same_id_similarity import same_group_sums


def contrast_with_positives(
    q: Tensor,
    group: Tensor,
    k: Tensor | None = None,
    k_group: Tensor | None = None,
    *,
    scale: float | Tensor,
    single: Tensor | None = None,
    by_id: bool = False,
    backend: ContrastBackend,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Log-sum-exp of every row's logits, and the sum of those of its positives, the keys of its id.

    .. math::
        \log \sum_{j \in A(i)} e^{s_{ij}}, \qquad \sum_{j:\ y_j = y_i} s_{ij}, \qquad
        s_{ij} = \mathrm{scale} \cdot \langle q_i, k_j \rangle

    Linear memory; checks nothing.

    Args:
        q, k, scale, backend: as in `streaming_logsumexp`.
        group: ``[n]``, with ``k`` also ``k_group`` ``[m]``: the ids y as `groups_of` gives them.
        single: bool ``[n]``, the same for all rows of an id: rows that have no other positive than the one that they
            may have among these keys. It is left out of A(i), which are all keys else. None: there are no such rows.
        by_id: A(i) are the keys of other ids; those of the same id have a sum of their own.

    Returns:
        The log-sum-exp over A(i) and that over the same id (empty if not by id), and the sums of the positives' logits:
        each ``[n]`` float32 (float64 for float64).
    """
    q = in_autocast_dtype(q)
    k = None if k is None else k.to(q.dtype)
    chosen = choose_backend("streaming_logsumexp", backend, q.device, q.dtype)
    scale = scale_tensor(scale, q)
    if chosen == "reference":
        return contrast_by_relation(q, k, scale, group, k_group, single, by_id)
    other, same, positives, _bounded = _CONTRAST(q, k, scale, group, k_group, single, by_id, chosen)
    return other, same, positives


def _forward(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    group: Tensor,
    k_group: Tensor | None,
    single: Tensor | None,
    by_id: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = BACKENDS["streaming_logsumexp"][backend].module
    kinds = (group, k_group) if by_id else groups_of_single_positives(group, k_group, single)
    with without_autocast(q.device):
        same, other, bounded = module.forward(q, k, scale, None, *kinds, by_id, True)
        return other, same if by_id else other.new_empty(0), same_group_sums(q, group, k, k_group) * scale, bounded


def _empty(q, k, scale, group, k_group, single, by_id, backend):
    n, dtype = q.shape[0], accumulation_dtype(q)
    sizes = n, n if by_id else 0, n
    return *(q.new_empty(size, dtype=dtype) for size in sizes), q.new_empty((), dtype=torch.bool)


def _backward(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    group: Tensor,
    k_group: Tensor | None,
    single: Tensor | None,
    other: Tensor,
    same: Tensor,
    bounded: Tensor,
    grad_other: Tensor,
    grad_same: Tensor,
    grad_positives: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = BACKENDS["streaming_logsumexp"][backend].module
    with without_autocast(q.device):
        grads = module.positives_backward(
            q, k, scale, group, k_group, single, same, other, bounded, grad_same, grad_other, grad_positives, needs
        )
    to_q, to_k, to_scale = (q.new_empty(0) if g is None else g.contiguous() for g in grads)
    return to_q, to_k, to_scale


def _empty_gradients(q, k, scale, group, k_group, single, other, same, bounded, *grads_needs_backend):
    needs = grads_needs_backend[3]
    shapes = [(x.shape, x.dtype) if n else ((0,), q.dtype) for x, n in zip((q, k, scale), needs, strict=True)]
    return tuple(q.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


def _save(ctx, inputs, output) -> None:
    *tensors, _by_id, ctx.backend = inputs
    *sums, _positives, bounded = output
    ctx.mark_non_differentiable(bounded)
    ctx.save_for_backward(*tensors, *sums, bounded)


def _gradients(ctx, grad_other: Tensor, grad_same: Tensor, grad_positives: Tensor, _grad_bounded: None):
    needs = list(ctx.needs_input_grad[:3])
    grads = _GRADIENT(*ctx.saved_tensors, grad_other, grad_same, grad_positives, needs, ctx.backend)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *[None] * 5)


_CONTRAST = Differentiable("contrast_with_positives", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator(
    "contrast_with_positives_backward",
    _backward,
    _empty_gradients,
    of="contrast_with_positives",
    instead=USE_REFERENCE,
)
