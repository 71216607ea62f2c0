"""Triton kernels of the streaming log-sum-exp.

All work on base-2 logits x_ij = log2(e) (scale <q_i, k_j> + b_j), accumulate in float32, take contiguous rows of any
D at any distance (padded in the tile; above BLOCK_D the products loop over chunks), index them with 64 bits, and never
read the host.

Which path is right can depend on values that only the device knows (a learned temperature, the norms). Such kernels
come in pairs, both are launched, and each returns at once unless the flag at `bounded_ptr` has the value that it
serves (`RUN_IF_BOUNDED`).

Where only pairs of different ids count, `skip_ptr` [2, rows] names for every row some keys [first, last) that all have
its id. A block of rows of one id passes over the tiles among them: no product, no exponential.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EVERY_CACHE = tl.constexpr("")  # of a load; a bare string is no default for Triton 3.6


@triton.jit
def _load_tile(
    ptr, first, count, d0, stride, WHOLE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CACHE: tl.constexpr = EVERY_CACHE,
):  # fmt: skip
    """BLOCK rows of a [count, D] matrix from row `first` and column d0 on; zeros outside of it. WHOLE: no row is."""
    row, col = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # 64 bits for the tile's beginning alone: what is within it is the same for every tile.
    at = ptr + tl.cast(first, tl.int64) * stride + d0 + (row[:, None] * stride + col[None, :])
    if WHOLE and D % BLOCK_D == 0:
        return tl.load(at, cache_modifier=CACHE)
    else:
        inside = (first + row < count)[:, None] & (d0 + col < D)[None, :]
        return tl.load(at, mask=inside, other=0.0, cache_modifier=CACHE)


@triton.jit
def _load(ptr, index, count, WHOLE: tl.constexpr):
    """Numbers `index` of [count]; zeros outside of it."""
    if WHOLE:
        return tl.load(ptr + index)
    else:
        return tl.load(ptr + index, mask=index < count, other=0)


@triton.jit
def _products(
    q, q_ptr, k_ptr, first_row, first_col, n, m, q_row, k_row, WHOLE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j> over a tile. D <= BLOCK_D: q is the loaded tile of rows; else both are loaded chunk by chunk."""
    if D <= BLOCK_D:
        k = _load_tile(k_ptr, first_col, m, 0, k_row, WHOLE, BLOCK_N, D, BLOCK_D)
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            qd = _load_tile(q_ptr, first_row, n, d0, q_row, False, BLOCK_M, D, BLOCK_D)
            kd = _load_tile(k_ptr, first_col, m, d0, k_row, WHOLE, BLOCK_N, D, BLOCK_D)
            acc = tl.dot(qd, tl.trans(kd), acc, input_precision=PRECISION)
        return acc


@triton.jit
def _load_rows_once(q_ptr, first_row, n, q_row, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile of rows that stays on chip; where it does not fit `_products` ignores it."""
    if D <= BLOCK_D:
        return _load_tile(q_ptr, first_row, n, 0, q_row, False, BLOCK_M, D, BLOCK_D)
    else:
        return 0


@triton.jit
def _shift(top):
    """A finite shift for a running maximum: rows that have met nothing yet shift by zero."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _is_candidate(rows, cols, m, IS_SELF: tl.constexpr):
    valid = (cols < m)[None, :]
    if IS_SELF:
        valid = valid & (rows[:, None] != cols[None, :])
    return valid


@triton.jit
def _skipped(skip_ptr, ids_ptr, row_ids, rows, first_row, n):
    """Keys [start, stop) that all have the one id of all these rows; none if the rows have several."""
    one_id = tl.min(((row_ids == tl.load(ids_ptr + first_row)) | (rows >= n)).to(tl.int32), 0)
    start = tl.load(skip_ptr + first_row)
    return start, tl.where(one_id != 0, tl.load(skip_ptr + n + first_row), start)


@triton.jit
def _whole_blocks(start, stop, m, BLOCK_N: tl.constexpr):
    """The column blocks [first, last) that have no key outside of [start, stop)."""
    first = tl.cdiv(start, BLOCK_N)
    return first, tl.maximum(first, tl.where(stop == m, tl.cdiv(m, BLOCK_N), stop // BLOCK_N))


@triton.jit
def _column_blocks(
    first_row, rows, n, m, row_ids, ids_ptr, skip_ptr,
    IS_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which column blocks a row block visits, and which of them need a mask: those on the diagonal and the ragged last.

    Returns (low, high, skip, resume, full, fast, masked): blocks [0, low) and [high, full), `fast` in all, need none;
    [low, skip), [resume, high) and the ragged one, `masked` in all, do; [skip, resume) are not visited.
    """
    blocks, full = tl.cdiv(m, BLOCK_N), m // BLOCK_N
    low, high = 0, 0
    if IS_SELF:
        low = tl.minimum(first_row // BLOCK_N, full)
        high = tl.minimum(tl.cdiv(first_row + BLOCK_M, BLOCK_N), blocks)
    skip, resume = low, low
    if skip_ptr is not None:
        start, stop = _skipped(skip_ptr, ids_ptr, row_ids, rows, first_row, n)
        first, last = _whole_blocks(start, stop, m, BLOCK_N)
        found = first < last
        skip, resume = tl.where(found, first, low), tl.where(found, last, low)
        if IS_SELF:  # the rows are among the keys of their id: the diagonal has at most a block at either end besides
            low, high = tl.minimum(low, skip), tl.maximum(high, resume)
        else:
            low, high = skip, resume
    fast = low + tl.maximum(full - high, 0)
    return low, high, skip, resume, full, fast, blocks - fast - (resume - skip)


@triton.jit
def _fast_block(t, low, high):
    return tl.where(t < low, t, t - low + high)


@triton.jit
def _masked_block(t, low, high, skip, resume, full):
    before, both = skip - low, skip - low + high - resume
    return tl.where(t < before, low + t, tl.where(t < both, resume + t - before, full))


@triton.jit
def _part(count):
    """The share [first, last) of `count` blocks of this program: the second axis of the grid divides them."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    return count * part // parts, count * (part + 1) // parts


# ---- forward ----


@triton.jit
def _forward_tile(
    top_same, total_same, top_other, total_other,
    q, row_ids, block, first_row, q_ptr, k_ptr, bias_ptr, k_ids_ptr, scale, n, m, q_row, k_row,
    IS_SELF: tl.constexpr, MASKED: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, cols = first_row + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _products(
        q, q_ptr, k_ptr, first_row, block * BLOCK_N, n, m, q_row, k_row, not MASKED,
        D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    ) * scale  # fmt: skip
    if bias_ptr is not None:
        x += _load(bias_ptr, cols, m, not MASKED)[None, :] * LOG2E
    if MASKED:
        x = tl.where(_is_candidate(rows, cols, m, IS_SELF), x, -float("inf"))
    if k_ids_ptr is None:
        top = tl.maximum(top_other, tl.max(x, 1))
        shift = _shift(top)
        total_other = total_other * tl.exp2(top_other - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
        top_other = top
    else:
        # A pair is in one of the two sums: one exponential, shifted by the maximum of the sum it belongs to.
        same = row_ids[:, None] == _load(k_ids_ptr, cols, m, not MASKED)[None, :]
        new_same, new_other = top_same, top_other
        if WANT_SAME:
            new_same = tl.maximum(top_same, tl.max(tl.where(same, x, -float("inf")), 1))
        if WANT_OTHER:
            new_other = tl.maximum(top_other, tl.max(tl.where(same, -float("inf"), x), 1))
        shift_same, shift_other = _shift(new_same), _shift(new_other)
        e = tl.exp2(x - tl.where(same, shift_same[:, None], shift_other[:, None]))
        if WANT_SAME:
            total_same = total_same * tl.exp2(top_same - shift_same) + tl.sum(tl.where(same, e, 0.0), 1)
        if WANT_OTHER:
            total_other = total_other * tl.exp2(top_other - shift_other) + tl.sum(tl.where(same, 0.0, e), 1)
        top_same, top_other = new_same, new_other
    return top_same, total_same, top_other, total_other


@triton.jit
def forward_rows(
    q_ptr, k_ptr, scale_ptr, bias_ptr, q_ids_ptr, k_ids_ptr, skip_ptr, same_ptr, other_ptr, bounded_ptr,
    n, m, q_row, k_row,
    IS_SELF: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a block of rows with a running maximum: any logits, every column (1 unit).

    With `bounded_ptr` it runs only if the flag is down. The second axis of the grid divides the keys: a row of the
    outputs [parts, n] for each part.
    """
    if bounded_ptr is not None:  # noqa: SIM102 (decided when compiling; the load is not)
        if tl.load(bounded_ptr) != 0:
            return
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q = _load_rows_once(q_ptr, first_row, n, q_row, BLOCK_M, D, BLOCK_D)
    scale = tl.load(scale_ptr) * LOG2E
    row_ids = rows
    if q_ids_ptr is not None:
        row_ids = tl.load(q_ids_ptr + rows, mask=rows < n, other=0)
    top_same = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    top_other = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total_same = tl.zeros((BLOCK_M,), tl.float32)
    total_other = tl.zeros((BLOCK_M,), tl.float32)
    low, high, skip, resume, full, fast, masked = _column_blocks(
        first_row, rows, n, m, row_ids, q_ids_ptr, skip_ptr, IS_SELF, BLOCK_M, BLOCK_N
    )
    first, last = _part(fast)
    for t in range(first, last):
        top_same, total_same, top_other, total_other = _forward_tile(
            top_same, total_same, top_other, total_other,
            q, row_ids, _fast_block(t, low, high), first_row, q_ptr, k_ptr, bias_ptr, k_ids_ptr, scale, n, m,
            q_row, k_row, IS_SELF, False, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    first, last = _part(masked)
    for t in range(first, last):
        top_same, total_same, top_other, total_other = _forward_tile(
            top_same, total_same, top_other, total_other,
            q, row_ids, _masked_block(t, low, high, skip, resume, full), first_row, q_ptr, k_ptr, bias_ptr, k_ids_ptr,
            scale, n, m, q_row, k_row, IS_SELF, True, WANT_SAME, WANT_OTHER,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    to = tl.program_id(1).to(tl.int64) * n + rows
    if WANT_SAME:
        tl.store(same_ptr + to, (top_same + tl.log2(total_same)) * LN2, mask=rows < n)
    if WANT_OTHER:
        tl.store(other_ptr + to, (top_other + tl.log2(total_other)) * LN2, mask=rows < n)


@triton.jit
def _triangle_tile(
    total_same, total_other,
    q, row_ids, col_block, first_row, z_ptr, ids_ptr, same_ptr, other_ptr, scale, n, z_row,
    DIAGONAL: tl.constexpr, MASKED: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, cols = first_row + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _products(
        q, z_ptr, z_ptr, first_row, col_block * BLOCK_N, n, n, z_row, z_row, not MASKED,
        D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    ) * scale  # fmt: skip
    e = tl.exp2(x)
    if MASKED:
        e = tl.where(_is_candidate(rows, cols, n, True), e, 0.0)
    if ids_ptr is None:
        total_other += tl.sum(e, 1)
        if not DIAGONAL:
            tl.atomic_add(other_ptr + cols, tl.sum(e, 0), mask=cols < n, sem="relaxed")
    else:
        same = row_ids[:, None] == _load(ids_ptr, cols, n, not MASKED)[None, :]
        if WANT_SAME:
            e_same = tl.where(same, e, 0.0)
            total_same += tl.sum(e_same, 1)
            if not DIAGONAL:
                tl.atomic_add(same_ptr + cols, tl.sum(e_same, 0), mask=cols < n, sem="relaxed")
        if WANT_OTHER:
            e_other = tl.where(same, 0.0, e)
            total_other += tl.sum(e_other, 1)
            if not DIAGONAL:
                tl.atomic_add(other_ptr + cols, tl.sum(e_other, 0), mask=cols < n, sem="relaxed")
    return total_same, total_other


@triton.jit
def forward_triangle(
    z_ptr, scale_ptr, ids_ptr, skip_ptr, same_ptr, other_ptr, bounded_ptr, n, z_row, chunk,
    WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums (not yet logarithms) of self-contrast for bounded logits, upper triangle only (half a unit).

    BLOCK_M is a multiple of BLOCK_N. A program takes up to `chunk` column blocks of one row block, from the diagonal
    on. A tile adds its row sums to the rows and, right of the diagonal, its column sums to the columns; the outputs
    must come zeroed. Runs only if the flag is up.
    """
    if tl.load(bounded_ptr) == 0:
        return
    ACROSS: tl.constexpr = BLOCK_M // BLOCK_N
    row_blocks, blocks = tl.cdiv(n, BLOCK_M), tl.cdiv(n, BLOCK_N)
    row_block = tl.program_id(0) % row_blocks
    first = row_block * ACROSS + tl.program_id(0) // row_blocks * chunk
    if first >= blocks:
        return
    last = tl.minimum(first + chunk, blocks)
    first_row = row_block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_ids = rows
    if ids_ptr is not None:
        row_ids = tl.load(ids_ptr + rows, mask=rows < n, other=0)
    if skip_ptr is not None:
        # The rows' own id: what is passed over begins at the diagonal or before.
        start, stop = _skipped(skip_ptr, ids_ptr, row_ids, rows, first_row, n)
        _, resume = _whole_blocks(start, stop, n, BLOCK_N)
        first = tl.maximum(first, resume)
        if first >= last:
            return
    q = _load_rows_once(z_ptr, first_row, n, z_row, BLOCK_M, D, BLOCK_D)
    scale = tl.load(scale_ptr) * LOG2E
    total_same = tl.zeros((BLOCK_M,), tl.float32)
    total_other = tl.zeros((BLOCK_M,), tl.float32)
    right = tl.minimum(tl.maximum(first, (row_block + 1) * ACROSS), last)
    for col_block in range(first, right):
        total_same, total_other = _triangle_tile(
            total_same, total_other, q, row_ids, col_block, first_row, z_ptr, ids_ptr, same_ptr, other_ptr,
            scale, n, z_row, True, True, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    ragged = tl.maximum(right, tl.minimum(last, n // BLOCK_N))
    for col_block in range(right, ragged):
        total_same, total_other = _triangle_tile(
            total_same, total_other, q, row_ids, col_block, first_row, z_ptr, ids_ptr, same_ptr, other_ptr,
            scale, n, z_row, False, False, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    for col_block in range(ragged, last):
        total_same, total_other = _triangle_tile(
            total_same, total_other, q, row_ids, col_block, first_row, z_ptr, ids_ptr, same_ptr, other_ptr,
            scale, n, z_row, False, True, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    if WANT_SAME:
        tl.atomic_add(same_ptr + rows, total_same, mask=rows < n, sem="relaxed")
    if WANT_OTHER:
        tl.atomic_add(other_ptr + rows, total_other, mask=rows < n, sem="relaxed")


@triton.jit
def combine_parts(lse_ptr, sums_ptr, bounded_ptr, out_ptr, n, parts, BLOCK: tl.constexpr):
    """Log-sum-exps [n] of those over parts of the keys [parts, n]; where there is a flag and it is up, of sums [n]."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    if bounded_ptr is not None:  # noqa: SIM102 (decided when compiling; the load is not)
        if tl.load(bounded_ptr) != 0:
            tl.store(out_ptr + index, tl.log2(tl.load(sums_ptr + index, mask=inside, other=1.0)) * LN2, mask=inside)
            return
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        lse = tl.load(lse_ptr + part * n + index, mask=inside, other=0.0) * LOG2E
        new = tl.maximum(top, lse)
        shift = _shift(new)
        total = total * tl.exp2(top - shift) + tl.exp2(lse - shift)
        top = new
    tl.store(out_ptr + index, (top + tl.log2(total)) * LN2, mask=inside)


# ---- backward ----


@triton.jit
def prepare_anchors(lse_ptr, grad_ptr, bounded_ptr, reference_ptr, weight_ptr, n, BLOCK: tl.constexpr):
    """(R, C) of anchors: a pair weighs C exp2(x - R), nothing (C = 0) without candidates.

    Where the flag is up C exp2(-R) takes the place of C: there a pair weighs C exp2(x), and no tile has to compute
    exp2(-R) anew.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + index, mask=index < n, other=0.0)
    weight = tl.load(grad_ptr + index, mask=index < n, other=0.0)
    empty = lse == -float("inf")
    reference = tl.where(empty, 0.0, lse * LOG2E)
    weight = tl.where(empty, 0.0, weight)
    if bounded_ptr is not None:
        weight = tl.where(tl.load(bounded_ptr) != 0, weight * tl.exp2(-reference), weight)
    tl.store(reference_ptr + index, reference, mask=index < n)
    tl.store(weight_ptr + index, weight, mask=index < n)


@triton.jit
def _anchors(
    ref_same_ptr, weight_same_ptr, ref_other_ptr, weight_other_ptr, index, count, WHOLE: tl.constexpr,
    WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr, UNSHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(R, C) over the same id and over the others: zeros where nobody asked. Unshifted there is no use for R."""
    ref_same = tl.zeros((BLOCK,), tl.float32)
    weight_same, ref_other, weight_other = ref_same, ref_same, ref_same
    if WANT_SAME:
        weight_same = _load(weight_same_ptr, index, count, WHOLE)
        if not UNSHIFTED:
            ref_same = _load(ref_same_ptr, index, count, WHOLE)
    if WANT_OTHER:
        weight_other = _load(weight_other_ptr, index, count, WHOLE)
        if not UNSHIFTED:
            ref_other = _load(ref_other_ptr, index, count, WHOLE)
    return ref_same, weight_same, ref_other, weight_other


@triton.jit
def _spread(same, of_same, of_other, AXIS: tl.constexpr, HAS_IDS: tl.constexpr):
    """A number per anchor over a tile: that of the kind, same or other, that the pair is of."""
    if HAS_IDS:
        return tl.where(same, tl.expand_dims(of_same, AXIS), tl.expand_dims(of_other, AXIS))
    else:
        return tl.expand_dims(of_other, AXIS)


@triton.jit
def _at_most_one(logit):
    """exp2 of what is at most 0: where rounding of huge logits says otherwise a weight would explode. NaN stays."""
    return tl.exp2(tl.minimum(logit, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _weigh(
    x, row_index, col_index, n_rows, n_cols, row_ids, ids_ptr, bias_ptr,
    ref_same, weight_same, ref_other, weight_other,
    ref_same_ptr, weight_same_ptr, ref_other_ptr, weight_other_ptr,
    ROW_ANCHORS: tl.constexpr, COL_ANCHORS: tl.constexpr, UNSHIFTED: tl.constexpr, IS_SELF: tl.constexpr,
    MASKED: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W over a tile of base-2 products x: the weights of the row anchors on the columns, of the column anchors (whose
    numbers are behind the pointers) on the rows, or both. The bias belongs to the side that are the keys."""
    HAS_IDS: tl.constexpr = ids_ptr is not None
    same = x < 0  # a placeholder where there are no ids
    if HAS_IDS:
        same = row_ids[:, None] == _load(ids_ptr, col_index, n_cols, not MASKED)[None, :]
    if COL_ANCHORS:
        c_ref_same, c_weight_same, c_ref_other, c_weight_other = _anchors(
            ref_same_ptr, weight_same_ptr, ref_other_ptr, weight_other_ptr, col_index, n_cols, not MASKED,
            WANT_SAME, WANT_OTHER, UNSHIFTED, BLOCK_N,
        )  # fmt: skip
    if UNSHIFTED:
        # exp2(x_ij) = exp2(x_ji): one exponential serves both anchors of the pair. No bias on this path.
        w = tl.exp2(x) * (
            _spread(same, weight_same, weight_other, 1, HAS_IDS)
            + _spread(same, c_weight_same, c_weight_other, 0, HAS_IDS)
        )
    else:
        w = tl.zeros_like(x)
        if ROW_ANCHORS:
            logit = x - _spread(same, ref_same, ref_other, 1, HAS_IDS)
            if bias_ptr is not None:
                logit += _load(bias_ptr, col_index, n_cols, not MASKED)[None, :] * LOG2E
            w += _at_most_one(logit) * _spread(same, weight_same, weight_other, 1, HAS_IDS)
        if COL_ANCHORS:
            logit = x - _spread(same, c_ref_same, c_ref_other, 0, HAS_IDS)
            if bias_ptr is not None:
                logit += _load(bias_ptr, row_index, n_rows, False)[:, None] * LOG2E
            w += _at_most_one(logit) * _spread(same, c_weight_same, c_weight_other, 0, HAS_IDS)
    if MASKED:
        w = tl.where(_is_candidate(row_index, col_index, n_cols, IS_SELF), w, 0.0)
    return w


@triton.jit
def _backward_tile(
    acc, bias_grad,
    a, row_ids, block, rows, b_ptr, b_ids_ptr, bias_ptr, ref_same, weight_same, ref_other, weight_other,
    b_ref_same_ptr, b_weight_same_ptr, b_ref_other_ptr, b_weight_other_ptr, scale, n_rows, n_cols, b_row,
    IS_SELF: tl.constexpr, ROW_ANCHORS: tl.constexpr, COL_ANCHORS: tl.constexpr, UNSHIFTED: tl.constexpr,
    MASKED: tl.constexpr, SUM_WEIGHTS: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b = _load_tile(b_ptr, block * BLOCK_N, n_cols, 0, b_row, not MASKED, BLOCK_N, D, BLOCK_D)
    x = tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale
    w = _weigh(
        x, rows, cols, n_rows, n_cols, row_ids, b_ids_ptr, bias_ptr, ref_same, weight_same, ref_other, weight_other,
        b_ref_same_ptr, b_weight_same_ptr, b_ref_other_ptr, b_weight_other_ptr,
        ROW_ANCHORS, COL_ANCHORS, UNSHIFTED, IS_SELF, MASKED, WANT_SAME, WANT_OTHER, BLOCK_N,
    )  # fmt: skip
    if SUM_WEIGHTS:
        bias_grad += tl.sum(w, 1)
    return tl.dot(w.to(b.dtype), b, acc, input_precision=PRECISION), bias_grad


@triton.jit
def _row_products(acc, a_ptr, first_row, n_rows, a_row, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """sum_d acc_id a_id for every row i.

    Kept, `a` would take registers beside the accumulator through all loops, and they spill: it is read anew, and where
    it is wide in halves. Past the first cache, lest the compiler makes one read of this and the first.
    """
    if BLOCK_D <= 128:
        a = _load_tile(a_ptr, first_row, n_rows, 0, a_row, False, BLOCK_M, D, BLOCK_D, ".cg")
        return tl.sum(acc * a.to(tl.float32), 1)
    else:
        HALF: tl.constexpr = BLOCK_D // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        a_low = _load_tile(a_ptr, first_row, n_rows, 0, a_row, False, BLOCK_M, D, HALF, ".cg")
        of_low = tl.sum(low * a_low.to(tl.float32), 1)
        a_high = _load_tile(a_ptr, first_row, n_rows, HALF, a_row, False, BLOCK_M, D, HALF, ".cg")
        return of_low + tl.sum(high * a_high.to(tl.float32), 1)


@triton.jit
def backward_rows(
    a_ptr, b_ptr, scale_ptr, out_scale_ptr, bias_ptr, a_ids_ptr, b_ids_ptr, skip_ptr,
    a_ref_same_ptr, a_weight_same_ptr, a_ref_other_ptr, a_weight_other_ptr,
    b_ref_same_ptr, b_weight_same_ptr, b_ref_other_ptr, b_weight_other_ptr,
    out_ptr, scale_grad_ptr, bias_grad_ptr, bounded_ptr, n_rows, n_cols, a_row, b_row, out_row,
    IS_SELF: tl.constexpr, ROW_ANCHORS: tl.constexpr, COL_ANCHORS: tl.constexpr, RUN_IF_BOUNDED: tl.constexpr,
    WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of rows of `a` against all of `b`: out = out_scale sum_j W_ij b_j (2 units).

    Row anchors: a are the queries, b the keys. Column anchors: a are the keys. Both: self-contrast, or two parts of
    one. Also, where asked for, the row's share sum_j W_ij <a_i, b_j> of the gradient of the scale, and sum_j W_ij,
    that of the bias. The second axis of the grid divides b: an output [n_rows, ...] for each part.
    """
    if bounded_ptr is not None:  # noqa: SIM102 (decided when compiling; the load is not)
        if (tl.load(bounded_ptr) != 0) != RUN_IF_BOUNDED:
            return
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    a = _load_tile(a_ptr, first_row, n_rows, 0, a_row, False, BLOCK_M, D, BLOCK_D)
    scale = tl.load(scale_ptr) * LOG2E
    row_ids = rows
    if a_ids_ptr is not None:
        row_ids = tl.load(a_ids_ptr + rows, mask=rows < n_rows, other=0)
    ref_same, weight_same, ref_other, weight_other = _anchors(
        a_ref_same_ptr, a_weight_same_ptr, a_ref_other_ptr, a_weight_other_ptr, rows, n_rows, False,
        WANT_SAME and ROW_ANCHORS, WANT_OTHER and ROW_ANCHORS, RUN_IF_BOUNDED, BLOCK_M,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bias_grad = tl.zeros((BLOCK_M,), tl.float32)
    low, high, skip, resume, full, fast, masked = _column_blocks(
        first_row, rows, n_rows, n_cols, row_ids, a_ids_ptr, skip_ptr, IS_SELF, BLOCK_M, BLOCK_N
    )
    first, last = _part(fast)
    for t in range(first, last):
        acc, bias_grad = _backward_tile(
            acc, bias_grad, a, row_ids, _fast_block(t, low, high), rows, b_ptr, b_ids_ptr, bias_ptr,
            ref_same, weight_same, ref_other, weight_other,
            b_ref_same_ptr, b_weight_same_ptr, b_ref_other_ptr, b_weight_other_ptr,
            scale, n_rows, n_cols, b_row, IS_SELF, ROW_ANCHORS, COL_ANCHORS, RUN_IF_BOUNDED, False,
            bias_grad_ptr is not None, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    first, last = _part(masked)
    for t in range(first, last):
        acc, bias_grad = _backward_tile(
            acc, bias_grad, a, row_ids, _masked_block(t, low, high, skip, resume, full), rows, b_ptr, b_ids_ptr,
            bias_ptr, ref_same, weight_same, ref_other, weight_other,
            b_ref_same_ptr, b_weight_same_ptr, b_ref_other_ptr, b_weight_other_ptr,
            scale, n_rows, n_cols, b_row, IS_SELF, ROW_ANCHORS, COL_ANCHORS, RUN_IF_BOUNDED, True,
            bias_grad_ptr is not None, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    inside = rows < n_rows
    to = tl.program_id(1).to(tl.int64) * n_rows + rows
    if bias_grad_ptr is not None:
        tl.store(bias_grad_ptr + to, bias_grad, mask=inside)
    if out_ptr is not None:
        col = tl.arange(0, BLOCK_D)
        out = (acc * tl.load(out_scale_ptr)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + to[:, None] * out_row + col[None, :], out, mask=inside[:, None] & (col < D)[None, :])
    if scale_grad_ptr is not None:
        shares = _row_products(acc, a_ptr, first_row, n_rows, a_row, BLOCK_M, D, BLOCK_D)
        tl.store(scale_grad_ptr + to, shares, mask=inside)


@triton.jit(do_not_specialize=["row_start", "col_start"])
def backward_weights(
    q_ptr, k_ptr, scale_ptr, bias_ptr, q_ids_ptr, k_ids_ptr, skip_ptr,
    q_ref_same_ptr, q_weight_same_ptr, q_ref_other_ptr, q_weight_other_ptr,
    k_ref_same_ptr, k_weight_same_ptr, k_ref_other_ptr, k_weight_other_ptr,
    out_ptr, n, m, row_start, col_start, row_stop, q_row, k_row, out_row,
    IS_SELF: tl.constexpr, COL_ANCHORS: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W itself, rows [row_start, row_stop) by columns [col_start, m), for a library's matrix product to multiply.

    For D where an accumulator [BLOCK_M, D] does not fit on chip. Rows are anchors; in self-contrast columns may be too.
    """
    # Columns on the first axis of the grid: the second ends at 65,535 blocks.
    first_row = row_start + tl.program_id(1) * BLOCK_M
    first_col = col_start + tl.program_id(0) * BLOCK_N
    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    at = out_ptr + (rows - row_start).to(tl.int64)[:, None] * out_row + (cols - col_start)[None, :]
    inside = (rows < row_stop)[:, None] & (cols < m)[None, :]
    row_ids = rows
    if q_ids_ptr is not None:
        row_ids = tl.load(q_ids_ptr + rows, mask=rows < n, other=0)
    if skip_ptr is not None:
        start, stop = _skipped(skip_ptr, q_ids_ptr, row_ids, rows, first_row, n)
        if (first_col >= start) & (tl.minimum(first_col + BLOCK_N, m) <= stop):
            tl.store(at, tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty), mask=inside)
            return
    scale = tl.load(scale_ptr) * LOG2E
    q = _load_rows_once(q_ptr, first_row, n, q_row, BLOCK_M, D, BLOCK_D)
    x = _products(
        q, q_ptr, k_ptr, first_row, first_col, n, m, q_row, k_row, False, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION
    ) * scale  # fmt: skip
    ref_same, weight_same, ref_other, weight_other = _anchors(
        q_ref_same_ptr, q_weight_same_ptr, q_ref_other_ptr, q_weight_other_ptr, rows, n, False,
        WANT_SAME, WANT_OTHER, False, BLOCK_M,
    )  # fmt: skip
    w = _weigh(
        x, rows, cols, n, m, row_ids, k_ids_ptr, bias_ptr, ref_same, weight_same, ref_other, weight_other,
        k_ref_same_ptr, k_weight_same_ptr, k_ref_other_ptr, k_weight_other_ptr,
        True, COL_ANCHORS, False, IS_SELF, True, WANT_SAME, WANT_OTHER, BLOCK_N,
    )  # fmt: skip
    tl.store(at, w.to(out_ptr.dtype.element_ty), mask=inside)
