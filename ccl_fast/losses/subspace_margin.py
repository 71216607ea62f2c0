"""A margin loss of each cluster's rows, in the cluster's own slice of the embedding."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_matrix, check_not_negative
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids
from ccl_fast.ops import edge_similarity, map_row_blocks, streaming_topk
from ccl_fast.ops.ids import separate_unassigned
from ccl_fast.ops.precision import accumulation_dtype

# Squared distances below this are taken for it, as the gradient of a distance is not finite at 0.
LEAST_SQUARE = 1e-12


class SubspaceMarginLoss(Loss):
    r"""Margin loss of pairs of a label, each with the anchor's nearest negative beyond some distance.

    With distances :math:`d_{ij} = |z_i - z_j|` of unit rows, P(i) the other rows of label i, and :math:`d^-_i` the
    least distance to a row of another label that is at least :math:`\delta` (without such a row its term is 0),

    .. math::
        \ell_{ij} = \max(0, d_{ij} - \beta + \alpha) + \max(0, \beta - d^-_i + \alpha), \qquad j \in P(i)

    in the mean over all pairs. Given clusters, embeddings are num_slices slices side by side, one for each cluster: its
    rows are compared with each other alone, in the cluster's slice, scaled to unit length by itself. When rows are
    clustered anew slices follow their clusters if these are renamed after the last ones:
    ``align_clusters(ids, last_ids, k)[ids]``. Memory is linear in the rows.

    The loss of dynamic subspace learners (divide and conquer by clusters), as in the authors' code.

    Args:
        temperature: it has none, so nothing but 1.
        boundary: beta, >= 0, between distances of one label and of others.
        margin: alpha, >= 0.
        least_distance: delta, >= 0: nearer negatives are passed over.
        num_slices: the number of clusters; 1: the whole embedding is the only slice.
        reduction: "mean" over pairs, their "sum", or "none", the sum of each row's pairs. Of the other options of
            `Loss` it can honour none.

    Cost:
        operators: for each slice `streaming_topk` with a ceiling of similarities, and positives by `map_row_blocks`.
        units: 5 of N x N x D / num_slices for equal clusters, and the selection.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import SubspaceMarginLoss
        >>> labels, clusters = torch.arange(12) % 3, torch.arange(12) // 6
        >>> SubspaceMarginLoss(num_slices=2)(torch.randn(12, 16), labels, clusters).shape
        torch.Size([])
    """

    unsupported = ("temperature", "learnable_temperature", "normalize", "backend", "process_group", "exchange")

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        boundary: float = 1.2,
        margin: float = 0.2,
        least_distance: float = 0.5,
        num_slices: int = 1,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        for name, value in (("boundary", boundary), ("margin", margin), ("least_distance", least_distance)):
            check_not_negative(name, value)
        check_count("num_slices", num_slices)
        self.boundary, self.margin, self.least_distance = boundary, margin, least_distance
        self.num_slices = num_slices

    def forward(self, embeddings: Tensor, labels: Tensor, cluster_ids: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``, d a multiple of num_slices; float64, float32, bfloat16, float16.
            labels: ``[n]``, integers of any dtype; -1 is a label of its own.
            cluster_ids: ``[n]``, likewise, below num_slices; -1 is in no cluster. Required of several slices.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a number for each row, ``[n]``.
            Without a pair it is 0.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
            IndexError: a label or a cluster is out of range (on a GPU: an assertion on the device).
        """
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        check_ids("labels", labels, embeddings)
        if embeddings.shape[1] % self.num_slices:
            raise ArgumentError(
                f"embeddings: expected a multiple of {self.num_slices} columns, got {embeddings.shape[1]}"
            )
        if cluster_ids is None:
            if self.num_slices > 1:
                raise ArgumentError(f"cluster_ids: expected integers [n] with {self.num_slices} slices, got None")
            cluster_ids = torch.zeros_like(labels)
        check_ids("cluster_ids", cluster_ids, embeddings, self.num_slices, "slices")
        y = separate_unassigned(labels.long())
        slices = embeddings.unflatten(1, (self.num_slices, -1))
        sums = embeddings.new_zeros(embeddings.shape[0], 2, dtype=accumulation_dtype(embeddings))
        for c in range(self.num_slices):
            rows = (cluster_ids == c).nonzero().flatten()
            sums = sums.index_add(0, rows, self._of_cluster(self.unit(slices[rows, c]), y[rows]).to(sums.dtype))
        losses, count = sums.unbind(1)
        return losses if self.reduction == "none" else self.reduce_total(losses.sum(), count.sum())

    def _of_cluster(self, z: Tensor, y: Tensor) -> Tensor:
        """For each row the sum of the losses of its pairs, and their number, [r, 2]."""
        numbers = torch.arange(z.shape[0], device=z.device)
        of_positives = map_row_blocks(self._positives, [z, y, numbers], [z, y, numbers])
        # |x - y|^2 = 2 - 2 <x, y>; at least 0 are all, also those whose product rounds to more than 1.
        ceiling = 1 - self.least_distance**2 / 2 if self.least_distance else None
        nearest = streaming_topk(z, topk=1, q_ids=y, candidates="other_id", ceiling=ceiling)[1].flatten()
        starts = torch.arange(z.shape[0] + 1, device=z.device)
        distance = _distance(edge_similarity(z, z, starts, nearest.clamp(min=0)))
        of_negative = (self.boundary - distance + self.margin).clamp(min=0).masked_fill(nearest < 0, 0.0)
        losses, count = of_positives.unbind(1)
        return torch.stack((losses + count * of_negative, count), 1)

    def _positives(self, rows: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        z, y, numbers = rows
        positive = (y[:, None] == keys[1]) & (numbers[:, None] != keys[2])
        losses = (_distance(z @ keys[0].T) - self.boundary + self.margin).clamp(min=0).masked_fill(~positive, 0.0)
        return torch.stack((losses.sum(1), positive.sum(1).to(losses.dtype)), 1)


def _distance(similarity: Tensor) -> Tensor:
    return (2 - 2 * similarity).clamp(min=LEAST_SQUARE).sqrt()
