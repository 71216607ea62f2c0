"""The streaming log-sum-exp in plain torch, tile by tile: any device, any dtype, linear memory.

Notation: x_ij = scale <q_i, k_j>, b the key bias, and for each row two sums, over the keys of the same id and over
all others. A row's weight on a key in the backward is C_i exp(x_ij + b_j - R_i), where (R, C) is the row's
log-sum-exp and incoming gradient, of the kind that the pair belongs to.

Self-contrast walks the upper triangle only, in both directions: x_ij = x_ji, so a tile serves its rows and its
columns (one half and three halves of a matrix product instead of one and two). So does a pair of blocks of rows that
are anchors of each other, two parts of a larger self-contrast. Where all logits are bounded (`logit_bound`),
exponentials need no shift and are themselves symmetric.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ccl_fast.ops.logsumexp.bound import UNSHIFTED_LIMIT, bounded_on_cpu
from ccl_fast.ops.matmul import matmul_nt
from ccl_fast.ops.precision import accumulation_dtype
from ccl_fast.ops.row_dot import row_dot

# Rows and columns of a tile. Larger tiles waste half of those on the diagonal, smaller ones their calls: on a CPU the
# large ones are better from about 4,096 rows on (benchmarks/LOG.md).
BLOCK, LARGE_BLOCK, LARGE = 512, 1024, 4096
# Tiles are cut between ids from so many rows of an id on, in the mean. Where pairs of one id are not wanted, only of so
# few ids: most tiles are left then, of as many different shapes, for each of which oneDNN prepares and keeps a routine.
LARGE_GROUP, FEW_GROUPS = 128, 4
# Pairs of one id that a row has in the mean, up to which they are listed: a mask of the whole tile costs more.
LISTED_PAIRS = 4
# The same of positives in a tile, of which else a rectangle for each id is added to.
LISTED_POSITIVES = 32
LOG2E = 1.4426950408889634

Pair = tuple[Tensor, Tensor]  # over the same id, over the others


@dataclass
class _Tile:
    rows: slice
    cols: slice
    mirrored: bool  # mutual anchors, off the diagonal of self-contrast: the tile stands for its transpose too
    relation: str  # "same": every pair has one id, "other": none has, "mixed"; of what is wanted and not removed
    cut: bool  # pairs of the kind that is not wanted are removed


class _Problem:
    """The operands in accumulation precision.

    On a CPU they are sorted by id, if there are several tiles, so that most need no mask; but where nothing is unwanted
    but a few pairs of one id, these are listed.
    """

    def __init__(self, q, k, scale, key_bias, q_ids, k_ids, want_same, want_other, bounded, mutual=False):
        dtype = accumulation_dtype(q)
        self.is_self = k is None
        self.mutual = mutual or self.is_self  # the keys are anchors too, of which the rows are keys
        on_cpu = q.device.type == "cpu"
        self.bounded = on_cpu and bool(bounded)
        self.scale = scale
        self.order_q = self.order_k = None
        self.q, self.q_ids = q.to(dtype), q_ids
        self.k, self.k_ids, self.bias = (self.q, q_ids, key_bias) if k is None else (k.to(dtype), k_ids, key_bias)
        self.wanted = {"same": want_same, "other": want_other, "mixed": True}
        # Where one kind alone is wanted the other is removed when a tile is made, and nothing after that needs a mask.
        self.removed = None if want_same == want_other else "other" if want_same else "same"
        block = LARGE_BLOCK if max(len(self.q), len(self.k)) >= LARGE else BLOCK
        # What fits one tile is masked: cheaper than to sort, or to list.
        by_id = on_cpu and q_ids is not None and max(len(self.q), len(self.k)) > block
        self.pairs = _listed_pairs(self.q_ids, self.k_ids, block) if by_id and self.removed == "same" else None
        self.sorted = by_id and self.pairs is None
        if self.sorted and q_ids is not None:
            self.q_ids, self.order_q = q_ids.sort()
            self.q = self.q[self.order_q]
            self.k, self.k_ids, self.order_k = self.q, self.q_ids, self.order_q
            if k is not None:
                self.k_ids, self.order_k = k_ids.sort()
                self.k = k.to(dtype)[self.order_k]
            if key_bias is not None:
                self.bias = key_bias[self.order_k]
        # Where one kind of pairs is not wanted, tiles that end with a large group of one id are of one kind.
        by_group = self.sorted and self.removed is not None

        def blocks(rows: int, ids: Tensor | None) -> list[slice]:
            most_groups = min(rows // LARGE_GROUP, rows if want_same else FEW_GROUPS)
            return _blocks(rows, block, ids if by_group else None, most_groups)

        self.q_blocks = blocks(len(self.q), self.q_ids)
        self.k_blocks = self.q_blocks if k is None else blocks(len(self.k), self.k_ids)
        self.q_range = self._id_ranges(self.q_ids, self.q_blocks)
        self.k_range = self._id_ranges(self.k_ids, self.k_blocks)

    def _id_ranges(self, ids, blocks):
        if not self.sorted:
            return None
        ends = torch.tensor([[block.start, block.stop - 1] for block in blocks], dtype=torch.int64, device=ids.device)
        return ids[ends.reshape(-1, 2)].tolist()

    def tiles(self) -> Iterator[_Tile]:
        """Every tile with a pair that is wanted; of self-contrast the upper triangle."""
        for i, rows in enumerate(self.q_blocks):
            for j, cols in enumerate(self.k_blocks):
                if self.is_self and j < i:
                    continue
                relation = self._relation(i, j)
                if not self.wanted[relation]:
                    continue
                cut = relation == "mixed" and self.removed is not None
                if cut:
                    relation = "same" if self.removed == "other" else "other"
                yield _Tile(rows, cols, self.mutual and not (self.is_self and i == j), relation, cut)

    def _relation(self, i: int, j: int) -> str:
        if self.q_ids is None:
            return "other"
        if self.pairs is not None:
            return "mixed" if (self.q_blocks[i].start, self.k_blocks[j].start) in self.pairs else "other"
        if self.q_range is None or self.k_range is None:
            return "mixed"
        (a, b), (c, d) = self.q_range[i], self.k_range[j]
        if b < c or d < a:
            return "other"
        return "same" if a == b == c == d else "mixed"

    def logits(self, tile: _Tile) -> Tensor:
        """x over the tile, -inf on the diagonal of self-contrast and for pairs that are removed."""
        return self._candidates(matmul_nt(self.q[tile.rows], self.k[tile.cols]).mul_(self.scale), tile)

    def exponentials(self, tile: _Tile) -> Tensor:
        """exp(x) over the tile, of bounded logits; 0 where `logits` has -inf."""
        scaled = self.q[tile.rows] * (self.scale * LOG2E)  # powers of two are faster
        return self._candidates(matmul_nt(scaled, self.k[tile.cols]), tile).exp2_()

    def _candidates(self, x: Tensor, tile: _Tile) -> Tensor:
        if self.is_self and not tile.mirrored:
            x.fill_diagonal_(-torch.inf)
        if not tile.cut:
            return x
        if self.pairs is None:
            mask = self.same_mask(tile)
            return x.masked_fill_(mask if self.removed == "same" else ~mask, -torch.inf)
        rows, columns = self.pairs[tile.rows.start, tile.cols.start]
        place = (rows - tile.rows.start) * x.shape[1] + (columns - tile.cols.start)
        x.view(-1).index_fill_(0, place, -torch.inf)
        return x

    def same_mask(self, tile: _Tile) -> Tensor:
        return self.q_ids[tile.rows, None] == self.k_ids[None, tile.cols]


def _listed_pairs(q_ids: Tensor, k_ids: Tensor, block: int) -> dict[tuple[int, int], tuple[Tensor, Tensor]] | None:
    """List all pairs of one id: rows and columns of each tile that has some, by its first row and column.

    None if there are many.
    """
    ordered, order = k_ids.sort()
    first = torch.searchsorted(ordered, q_ids)
    count = torch.searchsorted(ordered, q_ids, right=True) - first
    ends = count.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total > LISTED_PAIRS * len(q_ids):
        return None
    rows = torch.arange(len(q_ids), device=q_ids.device).repeat_interleave(count, output_size=total)
    columns = order[torch.arange(total, device=q_ids.device) - (ends - count - first)[rows]]
    across = -(-len(k_ids) // block)
    tile, by_tile = (rows // block * across + columns // block).sort()
    rows, columns = rows[by_tile], columns[by_tile]
    tiles, sizes = (x.tolist() for x in tile.unique_consecutive(return_counts=True))
    parts = zip(rows.split(sizes), columns.split(sizes), strict=True)
    return {(t // across * block, t % across * block): part for t, part in zip(tiles, parts, strict=True)}


def _from_sorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


def _blocks(n: int, block: int, ids: Tensor | None, most_groups: int) -> list[slice]:
    """Slices of at most ``block`` rows; none crosses from one id to another if these, sorted, are so few."""
    groups = [0, n]
    if ids is not None and n:
        changes = (ids[1:] != ids[:-1]).nonzero()[:, 0] + 1
        if len(changes) < most_groups:
            groups = [0, *changes.tolist(), n]
    return [
        slice(start, min(start + block, end))
        for first, end in itertools.pairwise(groups)
        for start in range(first, end, block)
    ]


def forward(q, k, scale, key_bias, q_ids, k_ids, want_same, want_other) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps over the same id and over the others, and whether all logits are bounded."""
    bounded = bounded_on_cpu(q, k, scale, key_bias)
    problem = _Problem(q, k, scale, key_bias, q_ids, k_ids, want_same, want_other, bounded)
    of_rows, _ = _logsumexps(problem, want_same, want_other)
    return *of_rows, bounded


def mutual_forward(q, k, scale, q_ids, k_ids, want_same, want_other) -> tuple[Pair, Pair]:
    """Log-sum-exps over the same id and the others: of the rows of q over those of k, and of those of k over q."""
    problem = _Problem(
        q, k, scale, None, q_ids, k_ids, want_same, want_other, bounded_on_cpu(q, k, scale, None), mutual=True
    )
    return _logsumexps(problem, want_same, want_other)


def _logsumexps(problem: _Problem, want_same: bool, want_other: bool) -> tuple[Pair, Pair]:
    """Over the same id and over the others: of the rows, and of the keys where they are anchors too."""
    sums = _UnshiftedSums if problem.bounded else _ShiftedSums
    names = [name for name, want in (("same", want_same), ("other", want_other)) if want]
    of_rows = {name: sums(problem.q, problem.bias) for name in names}
    of_keys = of_rows if problem.is_self else {name: sums(problem.k, None) for name in names}

    for tile in problem.tiles():
        x = problem.exponentials(tile) if problem.bounded else problem.logits(tile)
        mask = problem.same_mask(tile) if tile.relation == "mixed" else None
        for name in names:
            if mask is None and tile.relation != name:
                continue
            wanted = x
            if mask is not None:
                wanted = x.masked_fill(~mask if name == "same" else mask, sums.nothing)
            of_rows[name].add(tile.rows, tile.cols, wanted, 1)
            if tile.mirrored:
                of_keys[name].add(tile.cols, tile.rows, wanted, 0)

    def both(found: dict, order: Tensor | None) -> Pair:
        empty = problem.q.new_empty(0)
        same, other = (_from_sorted(found[name].log(), order) if name in found else empty for name in ("same", "other"))
        return same, other

    return both(of_rows, problem.order_q), both(of_keys, problem.order_k)


class _UnshiftedSums:
    """Sums of exp(x + b) for bounded logits, for every anchor: tiles arrive exponentiated."""

    nothing = 0.0

    def __init__(self, anchors: Tensor, bias: Tensor | None):
        self.total = anchors.new_zeros(len(anchors))
        self.weight = None if bias is None else bias.exp()

    def add(self, anchors: slice, keys: slice, e: Tensor, dim: int) -> None:
        """A tile whose keys lie along ``dim``."""
        if self.weight is None:
            self.total[anchors] += e.sum(dim)
        else:
            self.total[anchors] += (e if dim == 1 else e.T) @ self.weight[keys]

    def log(self) -> Tensor:
        return self.total.log()


class _ShiftedSums:
    """Sums of exp(x + b - maximum) with the running maximum: any logits."""

    nothing = -torch.inf

    def __init__(self, anchors: Tensor, bias: Tensor | None):
        self.maximum = anchors.new_full((len(anchors),), -torch.inf)
        self.total = anchors.new_zeros(len(anchors))
        self.bias = bias

    def add(self, anchors: slice, keys: slice, x: Tensor, dim: int) -> None:
        """A tile whose keys lie along ``dim``."""
        if self.bias is not None:
            x = x + self.bias[keys].unsqueeze(1 - dim)
        maximum = torch.maximum(self.maximum[anchors], x.amax(dim))
        shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
        self.total[anchors] *= (self.maximum[anchors] - shift).exp_()
        self.total[anchors] += (x - shift.unsqueeze(dim)).exp_().sum(dim)
        self.maximum[anchors] = maximum

    def log(self) -> Tensor:
        return self.maximum + self.total.log()


def backward(
    q, k, scale, key_bias, q_ids, k_ids, same, other, bounded, grad_same, grad_other, needs,
    dtype=None, positives=None, single=None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``dtype``: of the gradients of q and k; that of q if not named.

    ``positives``: gradients of a further number of each row, the sum of its logits with the keys of its id, which is
    not among the log-sum-exp's where a row is ``single``.
    """
    problem = _Problem(q, k, scale, key_bias, q_ids, k_ids, same.numel() > 0, other.numel() > 0, bounded)
    anchors = (same, other, grad_same, grad_other)
    need_q, need_k, need_scale, need_bias = needs
    to_q, to_k, to_bias = _weighted_sums(
        problem,
        anchors,
        anchors if problem.is_self else None,
        need_q or need_scale,
        need_k and not problem.is_self,
        need_bias,
        None if positives is None else _Positives(problem, positives, positives if problem.is_self else None, single),
    )
    grad_q = grad_scale = None
    if to_q is not None and need_scale:
        # In self-contrast every product <z_i, z_j> is met from both its ends.
        grad_scale = row_dot(to_q, problem.q).sum() * (0.5 if problem.is_self else 1.0)
    dtype = dtype or q.dtype
    if to_q is not None and need_q:
        grad_q = _from_sorted(to_q.mul_(scale), problem.order_q).to(dtype)
    grad_k = None if to_k is None else _from_sorted(to_k.mul_(scale), problem.order_k).to(dtype)
    grad_bias = None if to_bias is None else _from_sorted(to_bias, problem.order_k)
    return grad_q, grad_k, grad_scale, grad_bias


def positives_backward(
    q, k, scale, ids, k_ids, single, same, other, bounded, grad_same, grad_other, grad_positives, needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of `contrast_with_positives`: a weight and what a positive takes from it are one number before any product."""
    if same.numel():
        single = None
    else:  # one sum over all, from which a single positive is left out
        same, grad_same = other, grad_other
    sums = (same, other, bounded, grad_same, grad_other)
    return backward(q, k, scale, None, ids, k_ids, *sums, [*needs, False], None, grad_positives, single)[:3]


def mutual_gradients(
    q, k, scale, q_ids, k_ids, of_q, of_k, needs, dtype=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of two blocks of rows that are anchors of each other, and of nothing else: the gradients of q, k and the scale.

    ``of_q``, ``of_k``: (same, other, grad_same, grad_other).
    """
    need_q, need_k, need_scale = needs
    wanted = of_q[0].numel() > 0, of_q[1].numel() > 0
    problem = _Problem(q, k, scale, None, q_ids, k_ids, *wanted, bounded_on_cpu(q, k, scale, None), mutual=True)
    to_q, to_k, _ = _weighted_sums(problem, of_q, of_k, need_q or need_scale, need_k, False)
    dtype, grad_q, to_scale = dtype or q.dtype, None, None
    if to_q is not None and need_scale:
        to_scale = row_dot(to_q, problem.q).sum()
    if to_q is not None and need_q:
        grad_q = _from_sorted(to_q.mul_(scale), problem.order_q).to(dtype)
    grad_k = None if to_k is None else _from_sorted(to_k.mul_(scale), problem.order_k).to(dtype)
    return grad_q, grad_k, to_scale


def mutual_backward(q, k, scale, q_ids, k_ids, of_q, of_k, positives=None) -> tuple[Tensor, Tensor]:
    """Of two blocks of rows that are anchors of each other: gradients of q, and of half the scale.

    That of q is from its own sums and from those of k, in accumulation precision; of the products' share of the
    gradient of the scale it is half: the other half is k's.

    ``of_q``, ``of_k``: (same, other, grad_same, grad_other), with the log-sum-exps over all blocks.
    ``positives``: those of `backward`, of q and of k.
    """
    wanted = of_q[0].numel() > 0, of_q[1].numel() > 0
    problem = _Problem(q, k, scale, None, q_ids, k_ids, *wanted, bounded_on_cpu(q, k, scale, None), mutual=True)
    more = None if positives is None else _Positives(problem, *positives)
    to_q, _, _ = _weighted_sums(problem, of_q, of_k, True, False, False, more)
    assert to_q is not None
    to_scale = row_dot(to_q, problem.q).sum() / 2
    return _from_sorted(to_q.mul_(scale), problem.order_q), to_scale


class _Positives:
    """What is added to the weights of pairs of one id: their sum and a positive's weight nearly cancel.

    Two products, whose difference is taken later, would leave the rounding of both. Where rows are sorted by id, pairs
    of one id are rectangles of a tile, which need no mask.

    Args:
        of_rows: [n], added to a row's weights on the keys of its id.
        of_keys: [m], the same of keys that are anchors too.
        single: bool [n], rows whose pair has no other weight; the same for both rows of a pair.
    """

    def __init__(self, problem: _Problem, of_rows: Tensor, of_keys: Tensor | None, single: Tensor | None = None):
        def ordered(x: Tensor, order: Tensor | None) -> Tensor:
            return x if order is None else x[order]

        self.problem = problem
        self.of_rows = ordered(of_rows.to(problem.q.dtype), problem.order_q)
        self.of_keys = None if of_keys is None else ordered(of_keys.to(problem.q.dtype), problem.order_k)
        self.single = None if single is None else ordered(single, problem.order_q)
        if problem.sorted:
            self.first = torch.searchsorted(problem.k_ids, problem.q_ids)
            self.last = torch.searchsorted(problem.k_ids, problem.q_ids, right=True)

    def add_to(self, w: Tensor, tile: _Tile) -> None:
        if tile.relation == "other":
            return
        if self.problem.sorted:
            first, last = (x[tile.rows].clamp(tile.cols.start, tile.cols.stop) for x in (self.first, self.last))
            self._add_by_ranges(w, tile, first - tile.cols.start, last - tile.cols.start)
        else:
            mask = self.problem.same_mask(tile)
            if self.single is not None:
                w.masked_fill_(mask & self.single[tile.rows, None], 0.0)
            more = self.of_rows[tile.rows, None]
            w += torch.where(mask, more if self.of_keys is None else more + self.of_keys[tile.cols], 0.0)
        if self.problem.is_self and not tile.mirrored:
            w.fill_diagonal_(0.0)

    def _add_by_ranges(self, w: Tensor, tile: _Tile, first: Tensor, last: Tensor) -> None:
        """Of every row the columns of its id: first to last - 1."""
        count = last - first
        if self.single is not None:
            rows, columns = _pairs_of_ranges(first, count * self.single[tile.rows])
            w.view(-1).index_fill_(0, rows * w.shape[1] + columns, 0.0)
        of_rows, of_keys = self.of_rows[tile.rows], None if self.of_keys is None else self.of_keys[tile.cols]
        if int(count.sum()) <= LISTED_POSITIVES * len(count):
            rows, columns = _pairs_of_ranges(first, count)
            more = of_rows[rows] if of_keys is None else of_rows[rows] + of_keys[columns]
            w.view(-1).index_add_(0, rows * w.shape[1] + columns, more)
            return
        rectangles, lengths = torch.stack((first, last)).unique_consecutive(dim=1, return_counts=True)
        row = 0
        for start, stop, length in zip(*rectangles.tolist(), lengths.tolist(), strict=True):
            rectangle = w[row : row + length, start:stop]
            rectangle += of_rows[row : row + length, None]
            if of_keys is not None:
                rectangle += of_keys[start:stop]
            row += length


def _pairs_of_ranges(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pairs of every row with ``count`` columns from its first on."""
    ends = count.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    rows = torch.arange(len(count), device=count.device).repeat_interleave(count, output_size=total)
    return rows, torch.arange(total, device=count.device) - (ends - count - first)[rows]


def _weighted_sums(
    problem: _Problem,
    of_rows,
    of_keys,
    need_q: bool,
    need_k: bool,
    need_bias: bool,
    positives: _Positives | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """sum_j W_ij k_j for the rows, sum_i W_ij q_i for the keys and sum_i W_ij for the bias, all in sorted order.

    ``of_rows``, and where keys are anchors too ``of_keys``: log-sum-exps and their gradients, as in `mutual_backward`.
    """
    rows = _anchors(problem, of_rows, problem.order_q)
    keys = rows if problem.is_self else None if of_keys is None else _anchors(problem, of_keys, problem.order_k)
    # They are taken transposed, [d, n], as both products with W are fast that way.
    q_columns = problem.q.T.contiguous()
    k_columns = q_columns if problem.is_self else problem.k.T.contiguous()
    to_q = torch.zeros_like(q_columns) if need_q else None
    to_k = to_q if problem.is_self else torch.zeros_like(k_columns) if need_k else None
    to_bias = torch.zeros_like(problem.bias) if need_bias and problem.bias is not None else None
    for tile in problem.tiles():
        w = _weights(problem, tile, rows, keys, to_bias)
        if positives is not None:
            positives.add_to(w, tile)
        if to_q is not None:
            to_q[:, tile.rows] += matmul_nt(k_columns[:, tile.cols], w)
        if to_k is not None and (tile.mirrored or not problem.is_self):
            to_k[:, tile.cols] += matmul_nt(q_columns[:, tile.rows], w.T)
    if problem.is_self:
        to_k = None
    to_q, to_k = (None if x is None else x.T.contiguous() for x in (to_q, to_k))
    return to_q, to_k, to_bias


def _anchors(problem: _Problem, of_anchors, order: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """(R, C) of the module's notation for both kinds; R = inf, nothing, without candidates.

    Unshifted, C holds exp(-R).
    """
    same, other, grad_same, grad_other = of_anchors
    n, anchors = max(len(same), len(other)), {}
    for name, lse, grad in (("same", same, grad_same), ("other", other, grad_other)):
        if name == "other" and other is same:  # both kinds are in one sum
            anchors[name] = anchors["same"]
            continue
        if lse.numel() == 0:
            anchors[name] = problem.q.new_full((n,), torch.inf), problem.q.new_zeros(n)
            continue
        empty = lse == -torch.inf
        reference = lse.masked_fill(empty, torch.inf)
        coefficient = grad.to(lse.dtype).masked_fill(empty, 0.0)
        if order is not None:
            reference, coefficient = reference[order], coefficient[order]
        if problem.bounded:
            # R is below the bound only where no candidate is here, but among other rows: nothing is multiplied by it.
            coefficient *= (-reference).clamp_(max=UNSHIFTED_LIMIT).exp_()
        anchors[name] = reference, coefficient
    return anchors


def _weights(problem: _Problem, tile: _Tile, rows: dict, keys: dict | None, to_bias: Tensor | None) -> Tensor:
    """W over the tile: the rows' weights on the keys and, where those are anchors too, theirs on the rows."""
    differ = rows["same"] is not rows["other"]
    mask = problem.same_mask(tile) if differ and tile.relation == "mixed" else None

    def spread(anchors: dict, part: int, index: slice, dim: int) -> Tensor:
        """R (part 0) or C (part 1) of the anchors at `index`, of the kind of each pair, along the tile's dim."""
        same, other = (anchors[name][part][index].unsqueeze(dim) for name in ("same", "other"))
        if mask is not None:
            return torch.where(mask, same, other)
        return same if tile.relation == "same" else other

    mirror = None
    if problem.bounded:
        e = problem.exponentials(tile)
        own = spread(rows, 1, tile.rows, 1)
        if keys is not None:
            mirror = spread(keys, 1, tile.cols, 0)
        if problem.bias is None:
            return e.mul_(own if mirror is None else own + mirror)
        own = e * own * problem.bias[tile.cols].exp()
        if mirror is not None:
            mirror = e * mirror * problem.bias[tile.rows, None].exp()
    else:
        x = problem.logits(tile)
        bias = x.new_zeros(problem.k.shape[0]) if problem.bias is None else problem.bias
        # A weight is at most 1: where rounding of huge logits says otherwise it would explode.
        own = (x + bias[tile.cols]).sub_(spread(rows, 0, tile.rows, 1)).clamp_(max=0).exp_()
        own *= spread(rows, 1, tile.rows, 1)
        if keys is not None:
            of_rows = bias[tile.rows, None] if problem.is_self else 0.0  # of two blocks none has a bias
            mirror = (x + of_rows).sub_(spread(keys, 0, tile.cols, 0)).clamp_(max=0).exp_()
            mirror *= spread(keys, 1, tile.cols, 0)
    if to_bias is not None:
        to_bias[tile.cols] += own.sum(0)
        if tile.mirrored and mirror is not None:
            to_bias[tile.rows] += mirror.sum(1)
    return own if mirror is None else own.add_(mirror)
