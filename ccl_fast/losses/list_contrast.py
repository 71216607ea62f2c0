"""Contrast with listed rows alone: a few positives and negatives of each."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_matrix, check_vector
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_id_range, check_integers
from ccl_fast.ops import cross_entropy, edge_similarity
from ccl_fast.ops.rowwise.pairs import masked_logsumexp


class ListContrastLoss(Loss):
    r"""Contrasts each row with those on its lists of positives and of negatives.

    .. math::
        \ell_i = - \log \frac{\sum_{j \in P(i)} e^{s_{ij}}}{\sum_{j \in P(i) \cup N(i)} e^{s_{ij}}}, \qquad
        s_{ij} = \langle z_i, z_j \rangle / T

    With the lists of `segment_neighbors` it is the list form of CSSL (Yu et al., "Improving Long Document Topic
    Segmentation Models With Enhanced Coherence Modeling", arXiv:2310.11772); with all other rows on the lists
    `SupConLoss(form="inside")`.

    Args:
        temperature: T, > 0; the initial value if learnable.
        learnable_temperature, normalize, reduction: as in `Loss`. (It has no backends, and runs on one process.)

    Cost:
        operators: `edge_similarity`.
        units: 3 P x D for the P listed pairs.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import ListContrastLoss, segment_neighbors
        >>> topics = torch.tensor([0, 0, 0, 1, 1, 2, 2])
        >>> positives, negatives = segment_neighbors(topics, 1, 3)
        >>> ListContrastLoss()(torch.randn(7, 16), positives=positives, negatives=negatives).shape
        torch.Size([])
    """

    unsupported = ("backend", "process_group", "exchange")

    def __init__(self, temperature: float = 0.1, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)

    def forward(self, embeddings: Tensor, *, positives: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``; float64, float32, bfloat16, float16.
            positives: ``[n, k]``, integers: numbers of rows; -1 is none.
            negatives: ``[n, l]``, likewise.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per row, ``[n]``. A row
            without a positive has the loss 0 and does not count in the mean.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
            IndexError: a number is that of no row, and not -1 (on a GPU: an assertion on the device).
        """
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        for name, x in (("positives", positives), ("negatives", negatives)):
            _check_lists(name, x, embeddings)
        z, n = self.unit(embeddings), embeddings.shape[0]
        lists = torch.cat((positives, negatives), 1).long()
        starts = torch.arange(n + 1, device=z.device) * lists.shape[1]
        # What is on no list is asked for all the same, as row 0: how many are is the host's not to know.
        s = edge_similarity(z, z, starts, lists.clamp(min=0).flatten()).view(lists.shape) / self.temperature
        s = s.masked_fill(lists < 0, -torch.inf)
        of_positives, of_negatives = (masked_logsumexp(x) for x in s.tensor_split([positives.shape[1]], dim=1))
        has_positive = (positives >= 0).any(1)
        return self.reduce(cross_entropy(of_negatives, of_positives.masked_fill(~has_positive, 0.0)), has_positive)


def _check_lists(name: str, x: Tensor, rows: Tensor) -> None:
    check_matrix(name, x)
    check_integers(name, x, rows)
    if x.shape[0] != rows.shape[0]:
        raise ArgumentError(f"{name}: expected {rows.shape[0]} rows, got {x.shape[0]}")
    check_id_range(name, x, rows.shape[0], "rows")


def segment_neighbors(ids: Tensor, preceding: int, following: int) -> tuple[Tensor, Tensor]:
    """List, for each row of a sequence in segments, rows before it in its segment, and rows after the segment.

    Those of CSSL: of a text's sentences the nearest preceding ones of their topic are positives, and the first
    ones of the following topics negatives. (Its authors have 1 and 3.) Time and memory are O(n (k + l)).

    Args:
        ids: ``[n]``, integers: a segment is a run of equal ones.
        preceding: k, at least 1.
        following: l, at least 1.

    Returns:
        ``[n, k]`` and ``[n, l]`` int64: numbers of rows, the nearest first; -1 where there is none.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import segment_neighbors
        >>> before, after = segment_neighbors(torch.tensor([0, 0, 1, 1, 2]), 1, 2)
        >>> before.flatten().tolist(), after.tolist()
        ([-1, 0, -1, 2, -1], [[2, 3], [2, 3], [4, -1], [4, -1], [-1, -1]])
    """
    check_vector("ids", ids, ids.numel() if isinstance(ids, Tensor) else 0)
    check_integers("ids", ids, ids)
    check_count("preceding", preceding)
    check_count("following", following)
    n, numbers = ids.shape[0], torch.arange(ids.shape[0], device=ids.device)
    begins = torch.ones(n, dtype=torch.bool, device=ids.device)
    begins[1:] = ids[1:] != ids[:-1]
    segment = begins.long().cumsum(0)
    first = torch.searchsorted(segment, segment)
    end = torch.searchsorted(segment, segment, right=True)
    before = numbers[:, None] - 1 - torch.arange(preceding, device=ids.device)
    after = end[:, None] + torch.arange(following, device=ids.device)
    return before.masked_fill(before < first[:, None], -1), after.masked_fill(after >= n, -1)
