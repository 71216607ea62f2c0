"""Triton kernels of the streaming log-sum-exp.

All work on base-2 logits x_ij = log2(e) (scale <q_i, k_j> + b_j), accumulate in float32, take any strides and any D
(padded in the tile; above BLOCK_D the products loop over chunks), index rows with 64 bits, and never read the host.

Which path is right can depend on values that only the device knows (a learned temperature, the norms). Such kernels
come in pairs, both are launched, and each returns at once unless the flag at `bounded_ptr` has the value that it
serves (`RUN_IF_BOUNDED`).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_tile(ptr, index, count, d0, stride_row, stride_col, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `index` of a [count, D] matrix from column d0 on; zeros outside of it."""
    col = d0 + tl.arange(0, BLOCK_D)
    mask = (index < count)[:, None] & (col < D)[None, :]
    offset = index.to(tl.int64)[:, None] * stride_row + col.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def _products(
    q, q_ptr, k_ptr, rows, cols, n, m, q_row, q_col, k_row, k_col,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j> over a tile. D <= BLOCK_D: q is the loaded tile of rows; else both are loaded chunk by chunk."""
    if D <= BLOCK_D:
        k = _load_tile(k_ptr, cols, m, 0, k_row, k_col, D, BLOCK_D)
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            qd = _load_tile(q_ptr, rows, n, d0, q_row, q_col, D, BLOCK_D)
            kd = _load_tile(k_ptr, cols, m, d0, k_row, k_col, D, BLOCK_D)
            acc = tl.dot(qd, tl.trans(kd), acc, input_precision=PRECISION)
        return acc


@triton.jit
def _load_rows_once(q_ptr, rows, n, q_row, q_col, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile of rows that stays on chip; where it does not fit `_products` ignores it."""
    if D <= BLOCK_D:
        return _load_tile(q_ptr, rows, n, 0, q_row, q_col, D, BLOCK_D)
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
def _column_blocks(row_block, m, IS_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which column blocks of a row block need a mask: those on the diagonal [low, high) and the ragged last.

    Returns (low, high, full, fast, masked): blocks [0, low) and [high, full), `fast` in all, need none.
    """
    full = m // BLOCK_N
    low, high = 0, 0
    if IS_SELF:
        low = tl.minimum(row_block * BLOCK_M // BLOCK_N, full)
        high = tl.minimum(tl.cdiv((row_block + 1) * BLOCK_M, BLOCK_N), tl.cdiv(m, BLOCK_N))
    fast = low + tl.maximum(full - high, 0)
    return low, high, full, fast, tl.cdiv(m, BLOCK_N) - fast


@triton.jit
def _fast_block(t, low, high):
    return tl.where(t < low, t, t - low + high)


@triton.jit
def _masked_block(t, low, high, full):
    return tl.where(t < high - low, low + t, tl.maximum(full, high) + t - (high - low))


# ---- forward ----


@triton.jit
def _forward_tile(
    top_same, total_same, top_other, total_other,
    q, row_ids, block, rows, q_ptr, k_ptr, bias_ptr, k_ids_ptr, scale, n, m, q_row, q_col, k_row, k_col,
    IS_SELF: tl.constexpr, MASKED: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _products(
        q, q_ptr, k_ptr, rows, cols, n, m, q_row, q_col, k_row, k_col, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION
    ) * scale  # fmt: skip
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < m, other=0.0)[None, :] * LOG2E
    if MASKED:
        x = tl.where(_is_candidate(rows, cols, m, IS_SELF), x, -float("inf"))
    if k_ids_ptr is None:
        top = tl.maximum(top_other, tl.max(x, 1))
        shift = _shift(top)
        total_other = total_other * tl.exp2(top_other - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
        top_other = top
    else:
        # A pair is in one of the two sums: one exponential, shifted by the maximum of the sum it belongs to.
        same = row_ids[:, None] == tl.load(k_ids_ptr + cols, mask=cols < m, other=0)[None, :]
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
    q_ptr, k_ptr, scale_ptr, bias_ptr, q_ids_ptr, k_ids_ptr, same_ptr, other_ptr, bounded_ptr,
    n, m, q_row, q_col, k_row, k_col,
    IS_SELF: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a block of rows with a running maximum: any logits, every column (1 unit).

    With `bounded_ptr` it runs only if the flag is down.
    """
    if bounded_ptr is not None:  # noqa: SIM102 (decided when compiling; the load is not)
        if tl.load(bounded_ptr) != 0:
            return
    row_block = tl.program_id(0)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_rows_once(q_ptr, rows, n, q_row, q_col, D, BLOCK_D)
    scale = tl.load(scale_ptr) * LOG2E
    row_ids = rows
    if q_ids_ptr is not None:
        row_ids = tl.load(q_ids_ptr + rows, mask=rows < n, other=0)
    top_same = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    top_other = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total_same = tl.zeros((BLOCK_M,), tl.float32)
    total_other = tl.zeros((BLOCK_M,), tl.float32)
    low, high, full, fast, masked = _column_blocks(row_block, m, IS_SELF, BLOCK_M, BLOCK_N)
    for t in range(fast):
        top_same, total_same, top_other, total_other = _forward_tile(
            top_same, total_same, top_other, total_other,
            q, row_ids, _fast_block(t, low, high), rows, q_ptr, k_ptr, bias_ptr, k_ids_ptr, scale, n, m,
            q_row, q_col, k_row, k_col, IS_SELF, False, WANT_SAME, WANT_OTHER,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    for t in range(masked):
        top_same, total_same, top_other, total_other = _forward_tile(
            top_same, total_same, top_other, total_other,
            q, row_ids, _masked_block(t, low, high, full), rows, q_ptr, k_ptr, bias_ptr, k_ids_ptr, scale, n, m,
            q_row, q_col, k_row, k_col, IS_SELF, True, WANT_SAME, WANT_OTHER,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    if WANT_SAME:
        tl.store(same_ptr + rows, (top_same + tl.log2(total_same)) * LN2, mask=rows < n)
    if WANT_OTHER:
        tl.store(other_ptr + rows, (top_other + tl.log2(total_other)) * LN2, mask=rows < n)


@triton.jit
def _triangle_tile(
    total_same, total_other,
    q, row_ids, col_block, rows, z_ptr, ids_ptr, same_ptr, other_ptr, scale, n, z_row, z_col,
    DIAGONAL: tl.constexpr, MASKED: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = col_block * BLOCK + tl.arange(0, BLOCK)
    x = _products(
        q, z_ptr, z_ptr, rows, cols, n, n, z_row, z_col, z_row, z_col, D, BLOCK_D, BLOCK, BLOCK, PRECISION
    ) * scale  # fmt: skip
    e = tl.exp2(x)
    if MASKED:
        e = tl.where(_is_candidate(rows, cols, n, True), e, 0.0)
    if ids_ptr is None:
        total_other += tl.sum(e, 1)
        if not DIAGONAL:
            tl.atomic_add(other_ptr + cols, tl.sum(e, 0), mask=cols < n, sem="relaxed")
    else:
        same = row_ids[:, None] == tl.load(ids_ptr + cols, mask=cols < n, other=0)[None, :]
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
    z_ptr, scale_ptr, ids_ptr, same_ptr, other_ptr, bounded_ptr, n, z_row, z_col, chunk,
    WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums (not yet logarithms) of self-contrast for bounded logits, upper triangle only (half a unit).

    A program takes up to `chunk` blocks to the right of the diagonal in one row of blocks. A tile adds its row sums
    to the rows and its column sums to the columns; the outputs must come zeroed. Runs only if the flag is up.
    """
    if tl.load(bounded_ptr) == 0:
        return
    blocks = tl.cdiv(n, BLOCK)
    row_block = tl.program_id(0) % blocks
    first = row_block + tl.program_id(0) // blocks * chunk
    if first >= blocks:
        return
    last = tl.minimum(first + chunk, blocks)
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    q = _load_rows_once(z_ptr, rows, n, z_row, z_col, D, BLOCK_D)
    scale = tl.load(scale_ptr) * LOG2E
    row_ids = rows
    if ids_ptr is not None:
        row_ids = tl.load(ids_ptr + rows, mask=rows < n, other=0)
    total_same = tl.zeros((BLOCK,), tl.float32)
    total_other = tl.zeros((BLOCK,), tl.float32)
    if first == row_block:
        total_same, total_other = _triangle_tile(
            total_same, total_other, q, row_ids, row_block, rows, z_ptr, ids_ptr, same_ptr, other_ptr, scale, n,
            z_row, z_col, True, True, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK, PRECISION,
        )  # fmt: skip
    inner_last = tl.minimum(last, n // BLOCK)
    for col_block in range(tl.maximum(first, row_block + 1), inner_last):
        total_same, total_other = _triangle_tile(
            total_same, total_other, q, row_ids, col_block, rows, z_ptr, ids_ptr, same_ptr, other_ptr, scale, n,
            z_row, z_col, False, False, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK, PRECISION,
        )  # fmt: skip
    for col_block in range(tl.maximum(tl.maximum(first, row_block + 1), inner_last), last):
        total_same, total_other = _triangle_tile(
            total_same, total_other, q, row_ids, col_block, rows, z_ptr, ids_ptr, same_ptr, other_ptr, scale, n,
            z_row, z_col, False, True, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK, PRECISION,
        )  # fmt: skip
    if WANT_SAME:
        tl.atomic_add(same_ptr + rows, total_same, mask=rows < n, sem="relaxed")
    if WANT_OTHER:
        tl.atomic_add(other_ptr + rows, total_other, mask=rows < n, sem="relaxed")


# ---- backward ----


@triton.jit
def _anchor(lse_ptr, grad_ptr, index, count, UNSHIFTED: tl.constexpr):
    """(R, C) of anchors: a pair weighs C exp2(x - R), nothing (R = inf) without candidates. Unshifted: C exp2(-R)."""
    lse = tl.load(lse_ptr + index, mask=index < count, other=-float("inf")) * LOG2E
    grad = tl.load(grad_ptr + index, mask=index < count, other=0.0)
    empty = lse == -float("inf")
    reference, coefficient = tl.where(empty, float("inf"), lse), tl.where(empty, 0.0, grad)
    if UNSHIFTED:
        coefficient = coefficient * tl.exp2(-reference)
    return reference, coefficient


@triton.jit
def _anchors(
    same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, index, count,
    WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr, UNSHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ref_same = tl.full((BLOCK,), float("inf"), tl.float32)
    ref_other = ref_same
    coef_same = tl.zeros((BLOCK,), tl.float32)
    coef_other = coef_same
    if WANT_SAME:
        ref_same, coef_same = _anchor(same_ptr, grad_same_ptr, index, count, UNSHIFTED)
    if WANT_OTHER:
        ref_other, coef_other = _anchor(other_ptr, grad_other_ptr, index, count, UNSHIFTED)
    return ref_same, coef_same, ref_other, coef_other


@triton.jit
def _spread(same, of_same, of_other, AXIS: tl.constexpr, HAS_IDS: tl.constexpr):
    """A number per anchor over a tile: that of the kind, same or other, that the pair is of."""
    if HAS_IDS:
        return tl.where(same, tl.expand_dims(of_same, AXIS), tl.expand_dims(of_other, AXIS))
    else:
        return tl.expand_dims(of_other, AXIS)


@triton.jit
def _weigh(
    x, row_index, col_index, n_rows, n_cols, row_ids, ids_ptr, bias_ptr,
    ref_same, coef_same, ref_other, coef_other,
    same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, col_anchor,
    ROW_ANCHORS: tl.constexpr, COL_ANCHORS: tl.constexpr, UNSHIFTED: tl.constexpr, IS_SELF: tl.constexpr,
    MASKED: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W over a tile of base-2 products x: the weights of the row anchors on the columns, of the column anchors on
    the rows, or both. The bias belongs to the side that are the keys. The anchors' numbers for column 0 are at
    `col_anchor`."""
    HAS_IDS: tl.constexpr = ids_ptr is not None
    same = x < 0  # a placeholder where there are no ids
    if HAS_IDS:
        same = row_ids[:, None] == tl.load(ids_ptr + col_index, mask=col_index < n_cols, other=0)[None, :]
    if COL_ANCHORS:
        cref_same, ccoef_same, cref_other, ccoef_other = _anchors(
            same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, col_index + col_anchor, n_cols + col_anchor,
            WANT_SAME, WANT_OTHER, UNSHIFTED, BLOCK_N,
        )  # fmt: skip
    if UNSHIFTED:
        # exp2(x_ij) = exp2(x_ji): one exponential serves both anchors of the pair. No bias on this path.
        w = tl.exp2(x) * (
            _spread(same, coef_same, coef_other, 1, HAS_IDS) + _spread(same, ccoef_same, ccoef_other, 0, HAS_IDS)
        )
    else:
        # A weight is at most 1: where rounding of huge logits says otherwise it would explode.
        w = tl.zeros_like(x)
        if ROW_ANCHORS:
            logit = x - _spread(same, ref_same, ref_other, 1, HAS_IDS)
            if bias_ptr is not None:
                logit += tl.load(bias_ptr + col_index, mask=col_index < n_cols, other=0.0)[None, :] * LOG2E
            w += tl.exp2(tl.minimum(logit, 0.0)) * _spread(same, coef_same, coef_other, 1, HAS_IDS)
        if COL_ANCHORS:
            logit = x - _spread(same, cref_same, cref_other, 0, HAS_IDS)
            if bias_ptr is not None:
                logit += tl.load(bias_ptr + row_index, mask=row_index < n_rows, other=0.0)[:, None] * LOG2E
            w += tl.exp2(tl.minimum(logit, 0.0)) * _spread(same, ccoef_same, ccoef_other, 0, HAS_IDS)
    if MASKED:
        w = tl.where(_is_candidate(row_index, col_index, n_cols, IS_SELF), w, 0.0)
    return w


@triton.jit
def _backward_tile(
    acc, bias_grad,
    a, row_ids, block, rows, b_ptr, b_ids_ptr, bias_ptr, same_ptr, other_ptr, grad_same_ptr, grad_other_ptr,
    col_anchor, ref_same, coef_same, ref_other, coef_other, scale, n_rows, n_cols, b_row, b_col,
    IS_SELF: tl.constexpr, ROW_ANCHORS: tl.constexpr, COL_ANCHORS: tl.constexpr, UNSHIFTED: tl.constexpr,
    MASKED: tl.constexpr, SUM_WEIGHTS: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b = _load_tile(b_ptr, cols, n_cols, 0, b_row, b_col, D, BLOCK_D)
    x = tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale
    w = _weigh(
        x, rows, cols, n_rows, n_cols, row_ids, b_ids_ptr, bias_ptr, ref_same, coef_same, ref_other, coef_other,
        same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, col_anchor,
        ROW_ANCHORS, COL_ANCHORS, UNSHIFTED, IS_SELF, MASKED, WANT_SAME, WANT_OTHER, BLOCK_N,
    )  # fmt: skip
    if SUM_WEIGHTS:
        bias_grad += tl.sum(w, 1)
    return tl.dot(w.to(b.dtype), b, acc, input_precision=PRECISION), bias_grad


@triton.jit
def backward_rows(
    a_ptr, b_ptr, scale_ptr, out_scale_ptr, bias_ptr, a_ids_ptr, b_ids_ptr,
    same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, out_ptr, scale_grad_ptr, bias_grad_ptr, bounded_ptr,
    n_rows, n_cols, col_anchor, a_row, a_col, b_row, b_col, out_row,
    IS_SELF: tl.constexpr, ROW_ANCHORS: tl.constexpr, COL_ANCHORS: tl.constexpr, RUN_IF_BOUNDED: tl.constexpr,
    WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of rows of `a` against all of `b`: out = out_scale sum_j W_ij b_j (2 units).

    Row anchors: a are the queries, b the keys. Column anchors: a are the keys. Both: self-contrast, or two parts of
    one; then the numbers of the column anchors follow those of the rows, from `col_anchor` on. Also, where asked for,
    the row's share sum_j W_ij <a_i, b_j> of the gradient of the scale, and sum_j W_ij, that of the bias.
    """
    if bounded_ptr is not None:  # noqa: SIM102 (decided when compiling; the load is not)
        if (tl.load(bounded_ptr) != 0) != RUN_IF_BOUNDED:
            return
    row_block = tl.program_id(0)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    a = _load_tile(a_ptr, rows, n_rows, 0, a_row, a_col, D, BLOCK_D)
    scale = tl.load(scale_ptr) * LOG2E
    row_ids = rows
    if a_ids_ptr is not None:
        row_ids = tl.load(a_ids_ptr + rows, mask=rows < n_rows, other=0)
    ref_same, coef_same, ref_other, coef_other = _anchors(
        same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, rows, n_rows,
        WANT_SAME and ROW_ANCHORS, WANT_OTHER and ROW_ANCHORS, RUN_IF_BOUNDED, BLOCK_M,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bias_grad = tl.zeros((BLOCK_M,), tl.float32)
    low, high, full, fast, masked = _column_blocks(row_block, n_cols, IS_SELF, BLOCK_M, BLOCK_N)
    for t in range(fast):
        acc, bias_grad = _backward_tile(
            acc, bias_grad, a, row_ids, _fast_block(t, low, high), rows, b_ptr, b_ids_ptr, bias_ptr,
            same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, col_anchor, ref_same, coef_same, ref_other, coef_other,
            scale, n_rows, n_cols, b_row, b_col, IS_SELF, ROW_ANCHORS, COL_ANCHORS, RUN_IF_BOUNDED, False,
            bias_grad_ptr is not None, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    for t in range(masked):
        acc, bias_grad = _backward_tile(
            acc, bias_grad, a, row_ids, _masked_block(t, low, high, full), rows, b_ptr, b_ids_ptr, bias_ptr,
            same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, col_anchor, ref_same, coef_same, ref_other, coef_other,
            scale, n_rows, n_cols, b_row, b_col, IS_SELF, ROW_ANCHORS, COL_ANCHORS, RUN_IF_BOUNDED, True,
            bias_grad_ptr is not None, WANT_SAME, WANT_OTHER, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    inside = rows < n_rows
    if scale_grad_ptr is not None:
        tl.store(scale_grad_ptr + rows, tl.sum(acc * a.to(tl.float32), 1), mask=inside)
    if bias_grad_ptr is not None:
        tl.store(bias_grad_ptr + rows, bias_grad, mask=inside)
    if out_ptr is not None:
        col = tl.arange(0, BLOCK_D)
        out = (acc * tl.load(out_scale_ptr)).to(out_ptr.dtype.element_ty)
        offset = rows.to(tl.int64)[:, None] * out_row + col[None, :]
        tl.store(out_ptr + offset, out, mask=inside[:, None] & (col < D)[None, :])


@triton.jit(do_not_specialize=["row_start", "col_start"])
def backward_weights(
    q_ptr, k_ptr, scale_ptr, bias_ptr, q_ids_ptr, k_ids_ptr, same_ptr, other_ptr, grad_same_ptr, grad_other_ptr,
    out_ptr, n, m, col_anchor, row_start, col_start, row_stop, q_row, q_col, k_row, k_col, out_row,
    IS_SELF: tl.constexpr, COL_ANCHORS: tl.constexpr, WANT_SAME: tl.constexpr, WANT_OTHER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W itself, rows [row_start, row_stop) by columns [col_start, m), for a library's matrix product to multiply.

    For D where an accumulator [BLOCK_M, D] does not fit on chip. Rows are anchors; in self-contrast columns may be too.
    """
    # Columns on the first axis of the grid: the second ends at 65,535 blocks.
    rows = row_start + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_start + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr) * LOG2E
    q = _load_rows_once(q_ptr, rows, n, q_row, q_col, D, BLOCK_D)
    x = _products(
        q, q_ptr, k_ptr, rows, cols, n, m, q_row, q_col, k_row, k_col, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION
    ) * scale  # fmt: skip
    row_ids = rows
    if q_ids_ptr is not None:
        row_ids = tl.load(q_ids_ptr + rows, mask=rows < n, other=0)
    ref_same, coef_same, ref_other, coef_other = _anchors(
        same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, rows, n, WANT_SAME, WANT_OTHER, False, BLOCK_M
    )
    w = _weigh(
        x, rows, cols, n, m, row_ids, k_ids_ptr, bias_ptr, ref_same, coef_same, ref_other, coef_other,
        same_ptr, other_ptr, grad_same_ptr, grad_other_ptr, col_anchor,
        True, COL_ANCHORS, False, IS_SELF, True, WANT_SAME, WANT_OTHER, BLOCK_N,
    )  # fmt: skip
    offset = (rows - row_start).to(tl.int64)[:, None] * out_row + (cols - col_start)[None, :]
    mask = (rows < row_stop)[:, None] & (cols < m)[None, :]
    tl.store(out_ptr + offset, w.to(out_ptr.dtype.element_ty), mask=mask)
