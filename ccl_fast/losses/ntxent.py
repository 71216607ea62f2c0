"""NT-Xent as other packages call it: two views, or rows and their labels."""

from typing import Unpack

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ccl_fast.checks import check_has_values, check_tensor, product_dtype
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions
from ccl_fast.losses.batch import check_queries, check_unassigned, labels_as_ids
from ccl_fast.losses.infonce import InfoNCELoss
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

    def __init__(self, temperature: float = 0.5, *, unassigned: int | None = -1, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        check_unassigned(unassigned)
        self.unassigned = unassigned

    def forward(self, queries: Tensor, keys: Tensor | None = None, *, negatives: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, the first view, or without ``keys`` ``[n, 2, d]``, both; with labels ``[n, d]``, the
                rows, or ``[n, views, d]``. float64, float32, bfloat16 or float16.
            keys: ``[n, d]``, the second view; or ``[n]``, integers, the labels of the rows.
            negatives: ``[m, d]``, a memory bank: it takes the place of the batch's negatives, and the first views alone
                are anchors. Not with labels.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" ``[n, 2]`` for views, ``[n]`` with a
            bank, and with labels a number for each row.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label is below -1 while ``unassigned`` is -1 (on a GPU: an assertion on the device).
        """
        if isinstance(keys, Tensor) and not keys.is_floating_point():
            if negatives is not None:
                raise ArgumentError("negatives: expected None with labels, got a tensor")
            return self._of_labels(queries, keys)
        for name, x in (("queries", queries), ("keys", keys)):
            if x is not None:
                check_tensor(name, x)
        if negatives is not None:
            return self._with_bank(queries, keys, negatives)
        if keys is not None and _same_shape(queries, keys):
            # Two views, not two towers: rows of one view are negatives of each other too.
            queries, keys = torch.stack((queries, keys), dim=1), None
        return super().forward(queries, keys)

    def _with_bank(self, queries: Tensor, keys: Tensor | None, negatives: Tensor) -> Tensor:
        rows = {"queries": queries, "keys": keys}
        _, exchange, _ = self.join_processes(lambda: check_queries(queries, keys, negatives), rows)
        if keys is None:
            queries, keys = queries.unbind(1)
        anchors, scale = self.unit(queries), 1.0 / self.shared(self.temperature, exchange.group)
        rest = streaming_logsumexp(anchors, self.unit(negatives), scale=scale, backend=self.backend)
        losses = cross_entropy(rest, row_dot(anchors, self.unit(keys)) * scale)
        return self.reduce(losses, group=exchange.group)

    def _of_labels(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.process_group is not None:
            raise ArgumentError("keys: expected the second view with process_group, got labels")
        batch = self.prepare(embeddings, labels_as_ids(labels, self.unassigned, alone=True), "keys")
        check_has_values("keys", labels, "which decide how many pairs there are")
        scale = 1.0 / self.temperature
        # Sorted by label the positives of a row are those around it.
        ids, order = batch.ids.sort()
        z = batch.z[order]
        negatives = streaming_logsumexp(z, scale=scale, q_ids=ids, candidates="other_id", backend=self.backend)
        first = torch.searchsorted(ids, ids)
        number = torch.searchsorted(ids, ids, right=True) - first
        ends = number.cumsum(0)
        # How many pairs there are decides how much is computed, so the host must know it, unless all is but traced.
        traced = torch.compiler.is_compiling()
        parts = [(0, z.shape[0])] if traced else _parts(ends.tolist(), max(PAIRS, z.shape[0]))
        sums = [
            _sums_of_pairs(z, negatives, first, number, scale, *part)
            if len(parts) == 1
            else checkpoint(_sums_of_pairs, z, negatives, first, number, scale, *part, use_reentrant=False)
            for part in parts
        ]
        losses = torch.cat(sums) if sums else negatives
        losses = torch.empty_like(losses).index_copy(0, order, losses)
        if self.reduction == "none":
            return losses.view(batch.shape)
        pairs = (number - 1).sum()
        return losses.sum() / (pairs.clamp(min=1) if self.reduction == "mean" else 1)


def _sums_of_pairs(
    z: Tensor, negatives: Tensor, first: Tensor, number: Tensor, scale: float | Tensor, start: int, stop: int
) -> Tensor:
    """For each of the rows [start, stop) the sum of the losses of its pairs."""
    part = slice(start, stop)
    of_row = torch.arange(start, stop, device=z.device).repeat_interleave(number[part])
    ends = torch.nn.functional.pad(number[part].cumsum(0), (1, 0))
    columns = torch.arange(of_row.shape[0], device=z.device) - ends[of_row - start] + first[of_row]
    logits = edge_similarity(z[part], z, ends, columns) * scale
    losses = cross_entropy(negatives[of_row], logits).masked_fill(columns == of_row, 0.0)
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
