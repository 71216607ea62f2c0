"""The largest similarity of each row to the keys of each id, without the matrix of similarities."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_ids, check_matrix, check_same
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.ids import check_ids_below
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, without_autocast
from ccl_fast.ops.rowwise.blocks import block_rows, blocks_of
from ccl_fast.ops.rowwise.half_product import factor, product

# Keys of a tile, in whole ids: so many that a product is a fast one. Entries of a gradient's sparse matrix at a time.
TILE_KEYS, ENTRIES = 4096, 1 << 18


def max_by_id(q: Tensor, k: Tensor, k_ids: Tensor, *, num_ids: int | None = None) -> Tensor:
    r"""Largest similarity of every row to the keys of every id.

    .. math::
        M_{ic} = \max_{j:\ y_j = c} \langle q_i, k_j \rangle

    Some rows meet the keys of some ids at a time: memory is linear in n, m and the result, whose places of the largest
    are kept for the gradient. This flows to ``q`` and to the key that is largest (of equal ones to one of them) alone,
    in O(n K d); a second derivative raises.

    Args:
        q: ``[n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        k: ``[m, d]``, same dtype and device.
        k_ids: y ``[m]``, int32 or int64, from 0 to K - 1; a key whose id is below 0 is left out.
        num_ids: K. None: the largest id + 1, for which the host waits for a GPU.

    Returns:
        ``[n, K]``, float32 (float64 for float64 input); -inf, with zero gradient, for an id without keys.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        IndexError: an id is not less than ``num_ids`` (on a GPU: an assertion on the device).

    Example:
        >>> import torch
        >>> from ccl_fast.ops import max_by_id
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> max_by_id(torch.tensor([[3.0, 4.0]]), keys, torch.tensor([0, 0, 1]))
        tensor([[ 4., -3.]])
    """
    check_matrix("q", q)
    check_floating("q", q)
    check_matrix("k", k, columns=q.shape[1])
    check_same("k", k, "q", q)
    check_ids("k_ids", k_ids, k)
    k_ids = k_ids.long()
    if num_ids is None:
        num_ids = max(int(k_ids.max()) + 1, 0) if k_ids.shape[0] else 0
    else:
        check_count("num_ids", num_ids, least=0)
        check_ids_below("k_ids", k_ids, num_ids, "num_ids")
    q = in_autocast_dtype(q)
    return _MAXIMUM(q, k.to(q.dtype), k_ids, num_ids)[0]


# ---- one operator forward, one backward ----


def _forward(q: Tensor, k: Tensor, k_ids: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """The largest similarities, and the keys that have them (-1: there is none)."""
    with without_autocast(q.device):
        values, keys = _empty(q, k, k_ids, num_ids)
        values.fill_(-torch.inf)
        keys.fill_(-1)
        for ids, of_ids, are_keys in _tiles(k_ids, num_ids):
            tile = factor(k[of_ids.flatten()])
            for rows in blocks_of(q.shape[0], block_rows(tile.shape[0], q.device)):
                x = product(factor(q[rows]), tile).view(-1, *of_ids.shape).masked_fill_(~are_keys, -torch.inf)
                largest, place = x.max(2)
                values[rows, ids] = largest
                keys[rows, ids] = of_ids.expand(len(place), -1, -1).gather(2, place[:, :, None])[:, :, 0].int()
        return values, keys


def _tiles(k_ids: Tensor, num_ids: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids [g] that have about as many keys, these [g, length], and which of them there are: the rest is padding."""
    counts = (k_ids + 1).clamp_(min=0).bincount(minlength=num_ids + 1)  # those without an id first
    order, starts = k_ids.sort(stable=True).indices, counts.cumsum(0)[:-1]
    lengths, ids = counts[1:].sort(descending=True, stable=True)
    sizes, first = lengths.tolist(), 0
    while first < num_ids and sizes[first]:
        length, last = sizes[first], first + 1
        while last < num_ids and (last + 1 - first) * length <= TILE_KEYS and 2 * sizes[last] >= length:
            last += 1
        own, place = ids[first:last], torch.arange(length, device=k_ids.device)
        are_keys = place < lengths[first:last, None]
        places = torch.where(are_keys, starts[own, None] + place, starts[own, None])
        yield own, order[places], are_keys
        first = last


def _empty(q: Tensor, k: Tensor, k_ids: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    values = q.new_empty(q.shape[0], num_ids, dtype=accumulation_dtype(q))
    return values, torch.empty_like(values, dtype=torch.int32)


def _backward(q: Tensor, k: Tensor, keys: Tensor, grad: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Products with the sparse matrix [n, m] that has the gradient where a row's largest keys are."""
    with without_autocast(q.device):
        (n, width), m = keys.shape, k.shape[0]
        to_q, to_k = (grad.new_zeros(x.shape if need else 0) for x, need in zip((q, k), needs, strict=True))
        for rows in blocks_of(n if m and width else 0, max(1, ENTRIES // max(width, 1))):
            own, columns = keys[rows], keys[rows].clamp(min=0).flatten().long()
            entries = grad[rows].masked_fill(own < 0, 0.0).flatten()
            lines = torch.arange(own.shape[0], device=q.device).repeat_interleave(width)
            options = {"device": q.device, "check_invariants": False}
            if needs[0]:
                pairs = torch.sparse_coo_tensor(torch.stack((lines, columns)), entries, (own.shape[0], m), **options)
                to_q[rows] = torch.sparse.mm(pairs, k.to(grad.dtype))
            if needs[1]:
                pairs = torch.sparse_coo_tensor(torch.stack((columns, lines)), entries, (m, own.shape[0]), **options)
                to_k += torch.sparse.mm(pairs, q[rows].to(grad.dtype))
        return to_q.to(q.dtype), to_k.to(k.dtype)


def _empty_gradients(q, k, keys, grad, needs):
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip((q, k), needs, strict=True))


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _gradients(ctx, grad: Tensor, _of_keys: None):
    needs = list(ctx.needs_input_grad[:2])
    grads = _GRADIENT(*ctx.saved_tensors, grad, needs)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), None, None)


_MAXIMUM = Differentiable("max_by_id", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator("max_by_id_backward", _backward, _empty_gradients, of="max_by_id")
