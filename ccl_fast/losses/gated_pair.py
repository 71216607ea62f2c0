"""Contrast with the rows of a second class, by a similarity that is gated by the pair of classes."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_matrix, check_same
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids
from ccl_fast.ops import cross_entropy, gated_similarity, map_row_blocks
from ccl_fast.ops.precision import scale_tensor
from ccl_fast.ops.rowwise.pairs import masked_logsumexp


class GatedPairLoss(Loss):
    r"""Draws each row to the rows of its partner class, as far as a gate of both classes lets it see.

    With classes y, partner classes :math:`\bar y` and gates g of the rows,

    .. math::
        \ell_{ij} = \log \Big( 1 + \sum_{l:\ y_l \notin \{y_i, \bar y_i\}} e^{s_{il} - s_{ij}} \Big), \qquad
        s_{ij} = \cos(g_i \odot z_i, g_i \odot z_j) / T

    for all pairs with :math:`y_j = \bar y_i`, in the mean over these; where a row's partner class is its own it is one
    of its own pairs. Gradients flow to embeddings and gates. Similarities are those of `gated_similarity`, some rows
    at a time, so that memory is linear in the rows, instead of N x N x D.

    The pair loss of Hydra (SimLAP), as in the authors' code, whose gates are a sigmoid of a network of the mean of both
    classes' embeddings; the network and how partners are drawn are not here.

    Args:
        temperature: T, > 0; the initial value if learnable.
        learnable_temperature: as in `Loss`.
        reduction: "mean" over the pairs, their "sum", or "none", the sum of each row's pairs. (It normalises always,
            has no backends and runs on one process.)

    Cost:
        operators: `map_row_blocks` of `gated_similarity`.
        units: 8 of N x N x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import GatedPairLoss
        >>> labels, partners = torch.arange(8) % 4, torch.arange(8).flip(0) % 4
        >>> GatedPairLoss()(torch.randn(8, 16), labels, partner_labels=partners, gates=torch.rand(8, 16)).shape
        torch.Size([])
    """

    unsupported = ("normalize", "backend", "process_group", "exchange")

    def __init__(self, temperature: float = 0.1, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)

    def forward(self, embeddings: Tensor, labels: Tensor, *, partner_labels: Tensor, gates: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``; float64, float32, bfloat16, float16.
            labels: ``[n]``, integers of any dtype: y; -1 is a class of no pair, whose rows are negatives of all.
            partner_labels: ``[n]``, likewise: the partner classes; -1 for none.
            gates: ``[n, d]``, floating point: g, such as a sigmoid.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a number for each row, ``[n]``.
            Without a pair it is 0.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
            IndexError: a label is below -1 (on a GPU: an assertion on the device).
        """
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        check_ids("labels", labels, embeddings)
        check_ids("partner_labels", partner_labels, embeddings)
        check_matrix("gates", gates)
        check_floating("gates", gates)
        check_same("gates", gates, "embeddings", embeddings, dtype=False)
        if gates.shape != embeddings.shape:
            expected = f"{list(embeddings.shape)} (that of embeddings)"
            raise ArgumentError(f"gates: expected shape {expected}, got {list(gates.shape)}")
        z, y, partners = self.unit(embeddings), labels.long(), partner_labels.long()
        scale = scale_tensor(1.0 / self.temperature, embeddings)
        of_rows = map_row_blocks(_sums_and_counts, [z, gates, y, partners], [z, y, scale])
        losses, count = of_rows.unbind(1)
        return losses if self.reduction == "none" else self.reduce_total(losses.sum(), count.sum())


def _sums_and_counts(rows: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """For each row the sum of the losses of its pairs, and their number, [r, 2]."""
    z, gates, y, partners = rows
    s = (gated_similarity(z, gates, keys[0]) * keys[2]).to(z.dtype)
    other, is_class = keys[1], keys[1] >= 0
    positive = (other == partners[:, None]) & is_class
    left_out = positive | ((other == y[:, None]) & is_class)
    negatives = masked_logsumexp(s.masked_fill(left_out, -torch.inf))
    losses = cross_entropy(negatives[:, None], s).masked_fill(~positive, 0.0)
    return torch.stack((losses.sum(1), positive.sum(1).to(s.dtype)), 1)
