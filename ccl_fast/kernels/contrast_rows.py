"""Triton kernels of a contrast's rows: a loss of their sums with its derivatives, and the rows' gradient.

A program for each row, which it has whole. In plain torch they are some fifty small kernels.
"""

import triton
import triton.language as tl


@triton.jit
def _log_of_one_more(x):
    """log(1 + e^x) to rounding."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) = 2 artanh(e / (2 + e)): where e is small 1 + e would round it away.
    t = e / (2.0 + e)
    s = t * t
    series = 2.0 * t * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11))))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.5, series, tl.log(1.0 + e))


@triton.jit
def _share(x, total):
    """e^(x - total); 0 where there is no x."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - total))


@triton.jit
def row_losses(
    z_ptr, centers_ptr, sums_ptr, ids_ptr, group_ptr, others_ptr, scale_ptr, center_scale_ptr, rest_ptr,
    to_centers_ptr, found_ptr, slopes_ptr, dots_ptr, n, d, center_weight, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every row's loss, whether it has a positive (in `found` [2, n]), and its derivatives (in `slopes` [4, n]).

    They are those by the log-sum-exp over the rows, by that over the centres, and by the products <z, S - z> with the
    positives and <z, c> with the row's own centre, which are kept in `dots` [2, n] if that is given. `others` is the
    number of positives; a single one is not in the rows' log-sum-exp. Without centres three pointers are None.
    """
    row, col = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK)
    inside = col < d
    z = tl.load(z_ptr + row * d + col, mask=inside, other=0.0).to(tl.float32)
    sums = tl.load(sums_ptr + tl.load(group_ptr + row).to(tl.int64) * d + col, mask=inside, other=0.0)
    dot, scale = tl.sum(z * (sums - z), 0), tl.load(scale_ptr)
    count, rest, positives = tl.load(others_ptr + row).to(tl.float32), tl.load(rest_ptr + row), scale * dot
    single = count == 1.0
    if centers_ptr is None:
        only, total, of_partner, of_center = single, count, 0.0, 0.0
        mean = positives / tl.maximum(count, 1.0)
        above = rest - mean
        of_rest = 1.0
    else:
        own = tl.load(ids_ptr + row).to(tl.int64)
        assigned = own >= 0
        center = tl.load(centers_ptr + own * d + col, mask=inside & assigned, other=0.0).to(tl.float32)
        own_dot, center_scale = tl.sum(z * center, 0), tl.load(center_scale_ptr)
        own_logit, weight = center_scale * own_dot, tl.where(assigned, center_weight, 0.0)
        total = count + weight
        mean = (positives + weight * own_logit) / tl.where(total > 0.0, total, 1.0)
        # What was left out comes back to the sum, but for the one positive of a row that has no other.
        only = tl.where(single, weight == 0.0, (count == 0.0) & (weight > 0.0))
        partner = tl.where(single & (only == 0), positives, float("-inf"))
        joins = assigned & ((only == 0) | single)
        own_term, others = tl.where(joins, own_logit, float("-inf")), tl.load(to_centers_ptr + row)
        # NaN, where there is one, must not vanish in the maximum.
        largest = tl.maximum(tl.maximum(rest, others), tl.maximum(partner, own_term))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        sum_of_terms = (
            tl.exp(rest - shift) + tl.exp(others - shift) + tl.exp(partner - shift) + tl.exp(own_term - shift)
        )
        logsumexp = shift + tl.log(sum_of_terms)
        above = logsumexp - mean
        of_rest, of_others = _share(rest, logsumexp), _share(others, logsumexp)
        of_partner, of_center = _share(partner, logsumexp), _share(own_term, logsumexp)
    present = total > 0.0
    loss = tl.where(only, _log_of_one_more(above), above)
    # Of softplus it is the sigmoid.
    slope = tl.where(only, 1.0 / (1.0 + tl.exp(-above)), 1.0)
    slope = tl.where(present, slope, 0.0)
    of_mean = 1.0 / tl.where(present, total, 1.0)
    tl.store(found_ptr + row, tl.where(present, loss, 0.0))
    tl.store(found_ptr + n + row, present.to(tl.float32))
    tl.store(slopes_ptr + row, tl.where(present, slope * of_rest, 0.0))
    tl.store(slopes_ptr + 2 * n + row, slope * scale * (of_partner - of_mean))
    if dots_ptr is not None:
        tl.store(dots_ptr + row, dot)
    if centers_ptr is not None:
        tl.store(slopes_ptr + n + row, tl.where(present, slope * of_others, 0.0))
        tl.store(slopes_ptr + 3 * n + row, slope * center_scale * (of_center - weight * of_mean))
        if dots_ptr is not None:
            tl.store(dots_ptr + n + row, own_dot)


@triton.jit
def row_gradients(
    z_ptr, unit_ptr, inverse_ptr, centers_ptr, sums_ptr, weighted_ptr, ids_ptr, group_ptr, slopes_ptr, to_z_ptr,
    from_centers_ptr, out_ptr, n, d, to_z_row, from_centers_row, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of embeddings: of z from both log-sum-exps and from what `row_losses` multiplies, then of z = x / |x|.

    A row is an anchor with its positives, g (S - z), and a positive of others: `weighted` are the sums of g z.
    """
    row, col = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK)
    inside = col < d
    z = tl.load(z_ptr + row * d + col, mask=inside, other=0.0).to(tl.float32)
    of_group = tl.load(group_ptr + row).to(tl.int64) * d + col
    sums = tl.load(sums_ptr + of_group, mask=inside, other=0.0)
    weighted = tl.load(weighted_ptr + of_group, mask=inside, other=0.0)
    slope = tl.load(slopes_ptr + 2 * n + row)
    grad = tl.load(to_z_ptr + row * to_z_row + col, mask=inside, other=0.0)
    grad += slope * (sums - z) + (weighted - slope * z)
    if centers_ptr is not None:
        own = tl.load(ids_ptr + row).to(tl.int64)
        center = tl.load(centers_ptr + own * d + col, mask=inside & (own >= 0), other=0.0).to(tl.float32)
        grad += tl.load(from_centers_ptr + row * from_centers_row + col, mask=inside, other=0.0)
        grad += tl.load(slopes_ptr + 3 * n + row) * center
    unit = tl.load(unit_ptr + row * d + col, mask=inside, other=0.0)
    grad = (grad - tl.sum(grad * unit, 0) * unit) * tl.load(inverse_ptr + row)
    tl.store(out_ptr + row * d + col, grad, mask=inside)
