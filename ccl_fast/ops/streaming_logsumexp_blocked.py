"""The streaming log-sum-exp in plain torch, tile by tile: any device, any dtype, linear memory.

Notation: x_ij = scale <q_i, k_j>, b the key bias, and for each row two sums, over the keys of the same id and over
all others. A row's weight on a key in the backward is C_i exp(x_ij + b_j - R_i), where (R, C) is the row's
log-sum-exp and incoming gradient, of the kind that the pair belongs to.

Self-contrast walks the upper triangle only, in both directions: x_ij = x_ji, so a tile serves its rows and its
columns (one half and three halves of a matrix product instead of one and two). Where all logits are bounded
(`logit_bound`), exponentials need no shift and are themselves symmetric.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ccl_fast.ops.cpu_product import times_transposed
from ccl_fast.ops.logit_bound import logits_are_bounded
from ccl_fast.ops.row_dot import row_dot

# Rows and columns of a tile. Larger tiles waste half of those on the diagonal, smaller ones their calls: on a CPU the
# large ones are better from about 4,096 rows on (benchmarks/LOG.md).
BLOCK, LARGE_BLOCK, LARGE = 512, 1024, 4096
# Mean rows of an id from which on tiles are cut between ids.
LARGE_GROUP = 128
LOG2E = 1.4426950408889634


@dataclass
class _Tile:
    rows: slice
    cols: slice
    mirrored: bool  # self-contrast, off the diagonal: the tile stands for its transpose too
    relation: str  # "same": every pair has one id, "other": none has, "mixed"


class _Problem:
    """The operands in accumulation precision and, on a CPU, sorted by id, so that most tiles need no mask."""

    def __init__(self, q, k, scale, key_bias, q_ids, k_ids, want_same, want_other, bounded):
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.is_self = k is None
        on_cpu = q.device.type == "cpu"
        self.bounded = on_cpu and bool(bounded)
        self.scale = scale
        self.order_q = self.order_k = None
        self.q, self.q_ids = q.to(dtype), q_ids
        self.k, self.k_ids, self.bias = (self.q, q_ids, key_bias) if k is None else (k.to(dtype), k_ids, key_bias)
        if q_ids is not None and on_cpu:
            self.q_ids, self.order_q = q_ids.sort()
            self.q = self.q[self.order_q]
            self.k, self.k_ids, self.order_k = self.q, self.q_ids, self.order_q
            if k is not None:
                self.k_ids, self.order_k = k_ids.sort()
                self.k = k.to(dtype)[self.order_k]
            if key_bias is not None:
                self.bias = key_bias[self.order_k]
        self.wanted = {"same": want_same, "other": want_other, "mixed": True}
        block = LARGE_BLOCK if max(len(self.q), len(self.k)) >= LARGE else BLOCK
        # Where one kind of pairs is not wanted, tiles that end with a large group of one id are of one kind.
        by_group = q_ids is not None and on_cpu and not (want_same and want_other)
        self.q_blocks = _blocks(len(self.q), block, self.q_ids if by_group else None)
        self.k_blocks = self.q_blocks if k is None else _blocks(len(self.k), block, self.k_ids if by_group else None)
        self.q_range = self._id_ranges(self.q_ids, self.q_blocks)
        self.k_range = self._id_ranges(self.k_ids, self.k_blocks)

    def _id_ranges(self, ids, blocks):
        if ids is None or self.order_q is None:
            return None
        ends = torch.tensor([[block.start, block.stop - 1] for block in blocks], dtype=torch.int64).reshape(-1, 2)
        return ids[ends].tolist()

    def tiles(self) -> Iterator[_Tile]:
        """Every tile with a pair that is wanted; of self-contrast the upper triangle."""
        for i, rows in enumerate(self.q_blocks):
            for j, cols in enumerate(self.k_blocks):
                if self.is_self and j < i:
                    continue
                relation = self._relation(i, j)
                if self.wanted[relation]:
                    yield _Tile(rows, cols, self.is_self and i != j, relation)

    def _relation(self, i: int, j: int) -> str:
        if self.q_ids is None:
            return "other"
        if self.q_range is None:
            return "mixed"
        (a, b), (c, d) = self.q_range[i], self.k_range[j]
        if b < c or d < a:
            return "other"
        return "same" if a == b == c == d else "mixed"

    def logits(self, tile: _Tile) -> Tensor:
        """x over the tile, -inf on the diagonal of self-contrast."""
        return self._without_diagonal(times_transposed(self.q[tile.rows], self.k[tile.cols]).mul_(self.scale), tile)

    def exponentials(self, tile: _Tile) -> Tensor:
        """exp(x) over the tile, of bounded logits; 0 on the diagonal of self-contrast."""
        scaled = self.q[tile.rows] * (self.scale * LOG2E)  # powers of two are faster
        return self._without_diagonal(times_transposed(scaled, self.k[tile.cols]), tile).exp2_()

    def _without_diagonal(self, x: Tensor, tile: _Tile) -> Tensor:
        return x.fill_diagonal_(-torch.inf) if self.is_self and not tile.mirrored else x

    def same_mask(self, tile: _Tile) -> Tensor:
        return self.q_ids[tile.rows, None] == self.k_ids[None, tile.cols]

    def rows_to_sorted(self, x: Tensor) -> Tensor:
        return x if self.order_q is None else x[self.order_q]

    def rows_from_sorted(self, x: Tensor) -> Tensor:
        return x if self.order_q is None else torch.empty_like(x).index_copy_(0, self.order_q, x)

    def keys_from_sorted(self, x: Tensor) -> Tensor:
        return x if self.order_k is None else torch.empty_like(x).index_copy_(0, self.order_k, x)


def _blocks(n: int, block: int, ids: Tensor | None) -> list[slice]:
    """Slices of at most ``block`` rows; none crosses from one id to another if the groups of sorted ids are large."""
    groups = [0, n]
    if ids is not None and n:
        changes = ((ids[1:] != ids[:-1]).nonzero()[:, 0] + 1).tolist()
        if (len(changes) + 1) * LARGE_GROUP <= n:
            groups = [0, *changes, n]
    return [
        slice(start, min(start + block, end))
        for first, end in itertools.pairwise(groups)
        for start in range(first, end, block)
    ]


def forward(q, k, scale, key_bias, q_ids, k_ids, want_same, want_other) -> tuple[Tensor, Tensor, Tensor]:
    # On a CPU a branch on a value is free. On a GPU it would stall the queue: take the general path.
    on_cpu = q.device.type == "cpu"
    bounded = logits_are_bounded(q, k, scale, key_bias) if on_cpu else scale.new_zeros((), dtype=torch.bool)
    problem = _Problem(q, k, scale, key_bias, q_ids, k_ids, want_same, want_other, bounded)
    sums = _UnshiftedSums if problem.bounded else _ShiftedSums
    totals = {name: sums(problem) for name, want in (("same", want_same), ("other", want_other)) if want}

    for tile in problem.tiles():
        x = problem.exponentials(tile) if problem.bounded else problem.logits(tile)
        mask = problem.same_mask(tile) if tile.relation == "mixed" else None
        for name, total in totals.items():
            if mask is not None:
                total.add(tile, x.masked_fill(~mask if name == "same" else mask, total.nothing))
            elif tile.relation == name:
                total.add(tile, x)
    empty = problem.q.new_empty(0)
    lse = {name: problem.rows_from_sorted(total.log()) for name, total in totals.items()}
    return lse.get("same", empty), lse.get("other", empty), bounded


class _UnshiftedSums:
    """Row sums of exp(x + b) for bounded logits: tiles arrive exponentiated."""

    nothing = 0.0

    def __init__(self, problem: _Problem):
        self.total = problem.q.new_zeros(problem.q.shape[0])
        self.weight = None if problem.bias is None else problem.bias.exp()

    def add(self, tile: _Tile, e: Tensor) -> None:
        self.total[tile.rows] += e.sum(1) if self.weight is None else e @ self.weight[tile.cols]
        if tile.mirrored:
            self.total[tile.cols] += e.sum(0) if self.weight is None else self.weight[tile.rows] @ e

    def log(self) -> Tensor:
        return self.total.log()


class _ShiftedSums:
    """Row sums of exp(x + b - maximum) with the running maximum: any logits."""

    nothing = -torch.inf

    def __init__(self, problem: _Problem):
        n = problem.q.shape[0]
        self.maximum, self.total = problem.q.new_full((n,), -torch.inf), problem.q.new_zeros(n)
        self.bias = problem.bias

    def add(self, tile: _Tile, x: Tensor) -> None:
        self._merge(tile.rows, x if self.bias is None else x + self.bias[tile.cols], 1)
        if tile.mirrored:
            self._merge(tile.cols, x if self.bias is None else x + self.bias[tile.rows, None], 0)

    def _merge(self, rows: slice, x: Tensor, dim: int) -> None:
        maximum = torch.maximum(self.maximum[rows], x.amax(dim))
        shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
        self.total[rows] *= (self.maximum[rows] - shift).exp_()
        self.total[rows] += (x - shift.unsqueeze(dim)).exp_().sum(dim)
        self.maximum[rows] = maximum

    def log(self) -> Tensor:
        return self.maximum + self.total.log()


def backward(
    q, k, scale, key_bias, q_ids, k_ids, same, other, bounded, grad_same, grad_other, needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    problem = _Problem(q, k, scale, key_bias, q_ids, k_ids, same.numel() > 0, other.numel() > 0, bounded)
    rows = {"same": _row_weights(problem, same, grad_same), "other": _row_weights(problem, other, grad_other)}
    need_q, need_k, need_scale, need_bias = needs
    need_q = need_q or need_scale
    need_k = need_k and not problem.is_self
    # Gradients before the factor `scale`: sum_j W_ij k_j for the rows and sum_i W_ij q_i for the keys. They are [d, n],
    # transposed, as both products with W are fast that way.
    q_columns = problem.q.T.contiguous()
    k_columns = q_columns if problem.is_self else problem.k.T.contiguous()
    to_q = torch.zeros_like(q_columns) if need_q else None
    to_k = to_q if problem.is_self else torch.zeros_like(k_columns) if need_k else None
    to_bias = torch.zeros_like(problem.bias) if need_bias else None

    for tile in problem.tiles():
        w = _weights(problem, tile, rows, to_bias)
        if need_q:
            to_q[:, tile.rows] += times_transposed(k_columns[:, tile.cols], w)
        if (need_q and tile.mirrored) or need_k:
            to_k[:, tile.cols] += times_transposed(q_columns[:, tile.rows], w.T)

    to_q = None if to_q is None else to_q.T.contiguous()
    grad_scale = None
    if need_scale:
        # In self-contrast every product <z_i, z_j> is met from both its ends.
        grad_scale = row_dot(to_q, problem.q).sum() * (0.5 if problem.is_self else 1.0)
    grad_q = problem.rows_from_sorted(to_q.mul_(scale)).to(q.dtype) if needs[0] else None
    grad_k = problem.keys_from_sorted(to_k.T.contiguous().mul_(scale)).to(k.dtype) if need_k else None
    grad_bias = problem.keys_from_sorted(to_bias) if need_bias else None
    return grad_q, grad_k, grad_scale, grad_bias


def _row_weights(problem: _Problem, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) of the module's notation; R = inf, nothing, without candidates. Unshifted, C holds exp(-R)."""
    if lse.numel() == 0:
        n = problem.q.shape[0]
        return problem.q.new_full((n,), torch.inf), problem.q.new_zeros(n)
    empty = lse == -torch.inf
    reference = problem.rows_to_sorted(lse.masked_fill(empty, torch.inf))
    coefficient = problem.rows_to_sorted(grad.to(lse.dtype).masked_fill(empty, 0.0))
    return (reference, coefficient * (-reference).exp()) if problem.bounded else (reference, coefficient)


def _weights(problem: _Problem, tile: _Tile, rows: dict, to_bias: Tensor | None) -> Tensor:
    """W over the tile: the rows' weights on the keys and, in self-contrast, the keys' weights on the rows."""
    mask = problem.same_mask(tile) if tile.relation == "mixed" else None

    def spread(part: int, index: slice, dim: int) -> Tensor:
        """R (part 0) or C (part 1) of the rows at `index`, of the kind of each pair, along the tile's dim."""
        same, other = (rows[name][part][index].unsqueeze(dim) for name in ("same", "other"))
        if mask is not None:
            return torch.where(mask, same, other)
        return same if tile.relation == "same" else other

    mirror = None
    if problem.bounded:
        e = problem.exponentials(tile)
        own = spread(1, tile.rows, 1)
        if problem.is_self:
            mirror = spread(1, tile.cols, 0)
        if problem.bias is None:
            return e.mul_(own if mirror is None else own + mirror)
        own = e * own * problem.bias[tile.cols].exp()
        if problem.is_self:
            mirror = e * mirror * problem.bias[tile.rows, None].exp()
    else:
        x = problem.logits(tile)
        bias = x.new_zeros(problem.k.shape[0]) if problem.bias is None else problem.bias
        # A weight is at most 1: where rounding of huge logits says otherwise it would explode.
        own = (x + bias[tile.cols]).sub_(spread(0, tile.rows, 1)).clamp_(max=0).exp_().mul_(spread(1, tile.rows, 1))
        if problem.is_self:
            mirror = (x + bias[tile.rows, None]).sub_(spread(0, tile.cols, 0)).clamp_(max=0).exp_()
            mirror *= spread(1, tile.cols, 0)
    if to_bias is not None:
        to_bias[tile.cols] += own.sum(0)
        if tile.mirrored:
            to_bias[tile.rows] += mirror.sum(1)
    return own if mirror is None else own.add_(mirror)
