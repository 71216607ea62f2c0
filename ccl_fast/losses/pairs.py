"""Lists of pairs of rows: those of a miner, as pytorch-metric-learning's, or the entries of a sparse matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from ccl_fast.checks import assert_on_device, check_floating, check_same, check_tensor, host_knows
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.batch import check_references
from ccl_fast.ops import edge_similarity
from ccl_fast.ops.differentiable import savable

LAYOUTS = (torch.sparse_coo, torch.sparse_csr)


class Pairs(NamedTuple):
    """Listed pairs: row ``rows[e]``, int64, ascending, with ``columns[e]``, int64."""

    rows: Tensor
    columns: Tensor

    @property
    def diagonal(self) -> Tensor:
        """Which are a row with itself."""
        return self.rows == self.columns

    def logits(self, q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
        """Return the scaled similarities of all, in O(pairs) memory."""
        starts = torch.searchsorted(self.rows, torch.arange(len(q) + 1, device=q.device))
        return edge_similarity(q, k, starts, self.columns) * scale

    def sums(self, x: Tensor, n: int) -> Tensor:
        """Return the sum ``[n]`` over each row's pairs."""
        return x.new_zeros(n).index_add(0, self.rows, x)

    def logsumexp(self, logits: Tensor, n: int, weights: Tensor | None = None) -> Tensor:
        """Return log sum w e^s ``[n]`` over each row's pairs; -inf, with zero gradient, where there is none, w > 0."""
        if weights is not None:
            logits = logits.masked_fill(weights == 0, -torch.inf)
        largest = logits.new_full((n,), -torch.inf).scatter_reduce(0, self.rows, logits.detach(), "amax")
        empty = largest == -torch.inf
        largest = largest.masked_fill(empty, 0.0)
        terms = (logits - largest[self.rows]).exp()
        total = self.sums(terms if weights is None else weights * terms, n)
        return (total.masked_fill(empty, 1.0).log() + largest).masked_fill(empty, -torch.inf)


def entries(matrix: Tensor) -> tuple[Pairs, Tensor]:
    """Pairs and weights of the entries of a sparse matrix, CSR or COO."""
    matrix = matrix.detach()
    if matrix.layout == torch.sparse_coo:
        matrix = matrix.coalesce()
        (rows, columns), weights = matrix.indices(), matrix.values()
    else:
        columns, weights = matrix.col_indices().long(), matrix.values()
        rows = torch.arange(matrix.shape[0], device=columns.device)
        rows = rows.repeat_interleave(matrix.crow_indices().diff(), output_size=columns.shape[0])
    # A copy: torch.compile knows no strides of a view of a sparse tensor.
    return Pairs(savable(rows), savable(columns)), weights.clone()


def check_graph(name: str, x: Tensor, nodes: int | None = None) -> None:
    """Check a square sparse matrix of weights >= 0; on a GPU the device tells of a wrong weight, later."""
    check_tensor(name, x, sparse=True)
    if x.layout not in LAYOUTS:
        raise ArgumentError(f"{name}: expected a sparse tensor, CSR or COO, got layout {x.layout}")
    check_floating(name, x)
    shape = list(x.shape)
    nodes = shape[0] if nodes is None else nodes
    if shape != [nodes, nodes]:
        raise ArgumentError(f"{name}: expected shape [{nodes}, {nodes}], got {shape}")
    if x.sparse_dim() != 2:
        raise ArgumentError(f"{name}: expected two sparse dimensions, got {x.sparse_dim()}")
    weights = x._values() if x.layout == torch.sparse_coo else x.values()
    message = f"{name}: expected weights >= 0"
    are_weights = (weights >= 0).all()
    if not host_knows(are_weights):
        assert_on_device(are_weights, message)
    elif not are_weights:
        raise ArgumentError(f"{message}, got a smallest of {weights.min():g}")


def positive_and_negative_pairs(
    indices_tuple, embeddings: Tensor, ref_emb: Tensor | None, distinct: bool
) -> tuple[Pairs, Pairs]:
    """Return the pairs of a miner's tuple, which is checked, with the rows and their references.

    Args:
        indices_tuple: (anchors, positives, anchors, negatives) or triplets (anchors, positives, negatives), int64.
        distinct: a pair that is listed several times counts once.
    """
    is_tuple = isinstance(indices_tuple, tuple | list)
    if not is_tuple or len(indices_tuple) not in (3, 4):
        got = f"{len(indices_tuple)} of them" if is_tuple else type(indices_tuple).__name__
        raise ArgumentError(f"indices_tuple: expected a tuple of 3 or 4 vectors of indices, got {got}")
    check_references(embeddings, ref_emb)
    q, k = embeddings, embeddings if ref_emb is None else ref_emb
    vectors = [_indices(f"indices_tuple[{place}]", x, q) for place, x in enumerate(indices_tuple)]
    if len(vectors) == 3:
        vectors.insert(2, vectors[0])
    found: list[Pairs] = []
    for kind, rows, columns in (("positives", *vectors[:2]), ("negatives", *vectors[2:])):
        if len(rows) != len(columns):
            raise ArgumentError(f"indices_tuple: expected an anchor for each of {len(columns)} {kind}, got {len(rows)}")
        _check_range("anchors", rows, len(q))
        _check_range(kind, columns, len(k))
        if distinct:
            numbers = torch.unique(rows * len(k) + columns)
            rows, columns = numbers // len(k), numbers % len(k)
            if found and bool(torch.isin(numbers, found[0].rows * len(k) + found[0].columns).any()):
                raise ArgumentError("indices_tuple: expected each pair among the positives or the negatives, got both")
        else:
            rows, order = rows.sort(stable=True)
            columns = columns[order]
        found.append(Pairs(rows, columns))
    return found[0], found[1]


def _check_range(what: str, x: Tensor, size: int) -> None:
    """Waits for the device, as the miner did that found the pairs; what lies outside would be read all the same."""
    if len(x) and (int(x.min()) < 0 or int(x.max()) >= size):
        raise IndexError(f"indices_tuple: expected {what} 0 to {size - 1}, got {x.min():d} to {x.max():d}")


def _indices(name: str, x, q: Tensor) -> Tensor:
    check_tensor(name, x)
    if x.ndim != 1 or (len(x) and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)):
        raise ArgumentError(f"{name}: expected integers of one dimension, got {x.dtype} {list(x.shape)}")
    check_same(name, x, "the embeddings", q, dtype=False)
    return x.long()  # those of an empty list come in the dtype of the labels
