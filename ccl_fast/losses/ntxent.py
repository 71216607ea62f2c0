"""NT-Xent as other packages call it: two views, or rows and their labels."""

from typing import Unpack

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ccl_fast.checks import check_has_values, check_tensor, product_dtype
from ccl_fast.errors import ArgumentError
from ccl_fast.losses import processes
from ccl_fast.losses.base import CommonOptions
from ccl_fast.losses.batch import (
    check_unassigned,
    ids_of_references,
    labels_as_ids,
)
from ccl_fast.losses.infonce import InfoNCELoss
from ccl_fast.losses.pairs import positive_and_negative_pairs
from ccl_fast.ops import cross_entropy, edge_similarity, row_dot, streaming_logsumexp

# Pairs of one label that are held at a time, at least; of more of them each part is computed anew in the backward.
PAIRS = 1 << 20


class NTXentLoss(InfoNCELoss):
    r"""The normalised, temperature-scaled cross-entropy of SimCLR, with the calls that other packages have.

    .. math::
        \ell(a, p) = \log \Big( e^{s_{ap}} + \sum_{j \in N(a)} e^{s_{aj}} \Big) - s_{ap}, \qquad
        s_{ij} = \langle z_i, z_j \rangle / T

    - ``loss(view0, view1)`` is lightly's `NTXentLoss`: p is the other view of a's sample, N(a) all other rows of both
      views, and the mean is over the rows of both.
    - ``loss(view0, view1, negatives=bank)`` is that of lightly's with a memory bank: a are the rows of ``view0`` alone,
      N(a) those of the bank alone (MoCo).
    - ``loss(embeddings, labels)`` is pytorch-metric-learning's `NTXentLoss`: p is every other row of a's label, one at
      a time, N(a) are the rows of other labels, and the mean is over all pairs (a, p). So a positive is no rival of
      another one, as it is in `SupConLoss`; with two rows of each label it is NT-Xent.

    Memory is linear in the rows. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations"
    (SimCLR, arXiv:2002.05709); Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective" (2016).

    Args:
        temperature: T, > 0; the initial value if learnable. (lightly's default is 0.5, pytorch-metric-learning's 0.07.)
        unassigned: the label of rows that have none, -1: they have no positives and are negatives of all. With None
            every label is a class, also those below 0, as in pytorch-metric-learning.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`; "none" gives with
            labels the sum of each row's pairs. Several processes take views, not labels.

    Cost:
        operators: LSE; with labels LSE, `candidates="other_id"`, and `edge_similarity` of the P pairs of one label,
            some at a time.
        units: 2 of N x N x D; with labels and 3 P x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast import NTXentLoss
        >>> view0, view1, bank = torch.randn(8, 16), torch.randn(8, 16), torch.randn(32, 16)
        >>> loss_fn = NTXentLoss(0.5)
        >>> loss, moco = loss_fn(view0, view1), loss_fn(view0, view1, negatives=bank)
        >>> loss_fn(torch.cat((view0, view1)), torch.arange(16) % 3).shape
        torch.Size([])
    """

    _names = ("embeddings", "labels")

    def __init__(self, temperature: float = 0.5, *, unassigned: int | None = -1, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        check_unassigned(unassigned)
        self.unassigned = unassigned

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``, the first view, or without ``labels`` ``[n, 2, d]``, both; with labels ``[n, d]``,
                the rows, or ``[n, views, d]``. float64, float32, bfloat16 or float16.
            labels: ``[n, d]``, the second view; or ``[n]``, the labels of the rows, of any integer dtype, bool, or
                whole numbers of a floating one.
            indices_tuple: a miner's (anchors, positives, anchors, negatives), or triplets (anchors, positives,
                negatives), int64 vectors: the pairs (a, p) and N(a), as often as they are listed, whatever the labels.
            ref_emb: ``[m, d]``, references, which get a gradient too: p and N(a) are of these.
            ref_labels: ``[m]``, as ``labels``; required with references, unless there is a tuple.
            negatives: ``[m, d]``, a memory bank: it takes the place of the batch's negatives, and the first views alone
                are anchors. Not with labels.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" ``[n, 2]`` for views, ``[n]`` with a
            bank, and with labels or a tuple a number for each row.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label is below -1 while ``unassigned`` is -1 (on a GPU: an assertion on the device), or an
                index of the tuple is none of a row.
        """
        of_labels = isinstance(labels, Tensor) and labels.ndim == 1
        given = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels}
        pairs = ["labels"] * of_labels + [name for name, value in given.items() if value is not None]
        if pairs:
            if negatives is not None:
                raise ArgumentError(f"negatives: expected None with {pairs[0]}, got a tensor")
            if self.process_group is not None:
                processes.refuse(self, pairs[0])
            if indices_tuple is not None:
                return self._of_pairs(embeddings, indices_tuple, ref_emb)
            return self._of_labels(embeddings, labels, ref_emb, ref_labels)
        for name, x in (("embeddings", embeddings), ("labels", labels)):
            if x is not None:
                check_tensor(name, x)
        if negatives is not None:
            return self._with_bank(embeddings, labels, negatives)
        if labels is not None and _same_shape(embeddings, labels):
            # Two views, not two towers: rows of one view are negatives of each other too.
            if self.process_group is None:
                self._check(embeddings, labels, None)
                in_one_tile = self.of_views_in_one_tile(embeddings, labels)
                if in_one_tile is not None:
                    return in_one_tile
            embeddings, labels = torch.stack((embeddings, labels), dim=1), None
        return super().forward(embeddings, labels)

    def _with_bank(self, queries: Tensor, keys: Tensor | None, negatives: Tensor) -> Tensor:
        rows = dict(zip(self._names, (queries, keys), strict=True))
        _, exchange, _ = self.join_processes(lambda: self._check(queries, keys, negatives), rows)
        if keys is None:
            queries, keys = queries.unbind(1)
        anchors, scale = self.unit(queries), 1.0 / self.shared(self.temperature, exchange.group)
        rest = streaming_logsumexp(anchors, self.unit(negatives), scale=scale, backend=self.backend)
        losses = cross_entropy(rest, row_dot(anchors, self.unit(keys)) * scale)
        return self.reduce(losses, group=exchange.group)

    def _of_labels(
        self, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None
    ) -> Tensor:
        scale = 1.0 / self.temperature
        among = {"scale": scale, "candidates": "other_id", "backend": self.backend}
        # Sorted by label the positives of a row are those around it, or a run of the references.
        if ref_emb is None:
            if ref_labels is not None:
                raise ArgumentError("ref_emb: expected rows [m, d] with ref_labels, got None")
            assert labels is not None
            batch = self.prepare(embeddings, labels_as_ids(labels, embeddings, self.unassigned), "labels")
            (ids, order), shape = batch.ids.sort(), batch.shape
            q = k = batch.z[order]
            k_ids, negatives = ids, streaming_logsumexp(q, q_ids=ids, **among)
        else:
            ids, k_ids = ids_of_references(embeddings, labels, ref_emb, ref_labels, self.unassigned)
            (ids, order), (k_ids, order_of_keys), shape = ids.sort(), k_ids.sort(), ids.shape
            q, k = self.unit(embeddings)[order], self.unit(ref_emb)[order_of_keys]
            negatives = streaming_logsumexp(q, k, q_ids=ids, k_ids=k_ids, **among)
        check_has_values("labels", ids, "which decide how many pairs there are")
        first = torch.searchsorted(k_ids, ids)
        number = torch.searchsorted(k_ids, ids, right=True) - first
        ends = number.cumsum(0)
        # How many pairs there are decides how much is computed, so the host must know it, unless all is but traced.
        traced = torch.compiler.is_compiling()
        parts = [(0, q.shape[0])] if traced else _parts(ends.tolist(), max(PAIRS, q.shape[0]))
        sums = [
            _sums_of_pairs(q, k, negatives, first, number, scale, *part)
            if len(parts) == 1
            else checkpoint(_sums_of_pairs, q, k, negatives, first, number, scale, *part, use_reentrant=False)
            for part in parts
        ]
        losses = torch.cat(sums) if sums else negatives
        losses = torch.empty_like(losses).index_copy(0, order, losses)
        return self._mean_over_pairs(losses.view(shape), number.sum() - (q.shape[0] if q is k else 0))

    def _of_pairs(self, embeddings: Tensor, indices_tuple: tuple[Tensor, ...], ref_emb: Tensor | None) -> Tensor:
        positive, negative = positive_and_negative_pairs(indices_tuple, embeddings, ref_emb, distinct=False)
        q, scale = self.unit(embeddings), 1.0 / self.temperature
        k = q if ref_emb is None else self.unit(ref_emb)
        rest = negative.logsumexp(negative.logits(q, k, scale), len(q))
        losses = cross_entropy(rest[positive.rows], positive.logits(q, k, scale))
        return self._mean_over_pairs(positive.sums(losses, len(q)), len(positive.rows))

    def _mean_over_pairs(self, losses: Tensor, pairs: Tensor | int) -> Tensor:
        """Losses of rows, each the sum of its pairs', as the reduction wants them."""
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / (pairs.clamp(min=1) if isinstance(pairs, Tensor) else max(pairs, 1))


def _sums_of_pairs(
    q: Tensor,
    k: Tensor,
    negatives: Tensor,
    first: Tensor,
    number: Tensor,
    scale: float | Tensor,
    start: int,
    stop: int,
) -> Tensor:
    """For each of the rows [start, stop) the sum of the losses of its pairs."""
    part = slice(start, stop)
    of_row = torch.arange(start, stop, device=q.device).repeat_interleave(number[part])
    ends = torch.nn.functional.pad(number[part].cumsum(0), (1, 0))
    columns = torch.arange(of_row.shape[0], device=q.device) - ends[of_row - start] + first[of_row]
    logits = edge_similarity(q[part], k, ends, columns) * scale
    losses = cross_entropy(negatives[of_row], logits)
    if q is k:
        losses = losses.masked_fill(columns == of_row, 0.0)
    return losses.new_zeros(stop - start).index_add(0, of_row - start, losses)


def _parts(ends: list[int], most: int) -> list[tuple[int, int]]:
    """Runs of rows of up to so many pairs, and at least one row, given where the pairs of each row end."""
    parts, start, begin = [], 0, 0
    for row, end in enumerate(ends):
        if end - begin > most and row > start:
            parts.append((start, row))
            start, begin = row, ends[row - 1]
    return [*parts, (start, len(ends))] if ends else parts


def _same_shape(a, b) -> bool:
    if not isinstance(a, Tensor) or a.ndim != 2 or a.shape != b.shape:
        return False
    return product_dtype(a) == product_dtype(b) and a.device == b.device
