"""Contrast of sets of vectors by the late interaction of their members (MaxSim)."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_has_values, check_matrix, check_same
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids
from ccl_fast.ops import cross_entropy, max_by_id
from ccl_fast.ops.rowwise.pairs import masked_logsumexp


class MaxSimLoss(Loss):
    r"""InfoNCE of sets of vectors: a query's similarity to a document is the sum over its vectors of their best match.

    .. math::
        s_{ab} = \sum_{i:\ x_i = a} \max_{j:\ y_j = b} \langle q_i, d_j \rangle, \qquad
        \ell_a = \log \sum_b e^{s_{ab} / T} - s_{aa} / T

    with q, d unit vectors, x and y the numbers of their queries and documents; document a is query a's positive, all
    others are its negatives. The matrix of all pairs of vectors never exists: memory is linear in the vectors, and in
    those of the queries times the documents. A second derivative of the vectors raises.

    Late interaction is that of Khattab and Zaharia, "ColBERT" (arXiv:2004.12832). With vectors that are means of a
    sequence's clusters it is CRISP, Veneroso et al., "CRISP: Clustering multi-vector representations for denoising and
    pruning" (arXiv:2505.11471): :func:`ccl_fast.clustering.pool_by_clusters` makes them.

    Args:
        temperature: T, > 0; the initial value if learnable.
        learnable_temperature, normalize, reduction: as in `Loss`. (It runs on one process, and has one backend.)

    Cost:
        operators: `max_by_id`, and sums over each query's rows.
        units: 1 of N x M x D for N vectors of queries and M of documents; the gradient takes N x (documents) x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import MaxSimLoss
        >>> queries, keys = torch.randn(6, 16), torch.randn(40, 16)  # of 3 queries, and of 3 documents
        >>> loss = MaxSimLoss()(queries, keys, query_ids=torch.arange(6) // 2, key_ids=torch.arange(40) % 3)
        >>> loss.shape
        torch.Size([])
    """

    unsupported = ("backend", "process_group", "exchange")

    def __init__(self, temperature: float = 1.0, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)

    def forward(
        self, queries: Tensor, keys: Tensor, *, query_ids: Tensor, key_ids: Tensor, num_ids: int | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, vectors of all queries; float64, float32, bfloat16 or float16.
            keys: ``[m, d]``, vectors of all documents.
            query_ids: ``[n]``, integers: the query of each vector, 0, 1, ...; -1: of none, such as padding.
            key_ids: ``[m]``, likewise the document.
            num_ids: how many queries and documents there are. None: the largest number + 1, for which the host waits
                for a GPU.

        Returns:
            The loss, float32 (float64 for float64 input), the mean over the queries that have a vector and whose
            document has one. With reduction "none" ``[num_ids]``; 0 where there is no such pair.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: an id is below -1 or not less than ``num_ids`` (on a GPU: an assertion on the device).
        """
        check_matrix("queries", queries)
        check_floating("queries", queries)
        check_matrix("keys", keys, columns=queries.shape[1])
        check_same("keys", keys, "queries", queries)
        if num_ids is not None:
            check_count("num_ids", num_ids, least=0)
        for name, ids, rows in (("query_ids", query_ids, queries), ("key_ids", key_ids, keys)):
            check_ids(name, ids, rows, num_ids, "sets")
            if num_ids is None:
                check_has_values(name, ids, "which are counted without num_ids")
        query_ids, key_ids = query_ids.long(), key_ids.long()
        number = num_ids
        if number is None:
            number = max((int(ids.max()) + 1 for ids in (query_ids, key_ids) if ids.shape[0]), default=0)
        best = max_by_id(self.unit(queries), self.unit(keys), key_ids, num_ids=number)
        # What belongs to no query is summed in a last row.
        own = torch.where(query_ids < 0, number, query_ids)
        are_documents = _occur(key_ids, number)
        sums = best.new_zeros(number + 1, number).index_add(0, own, best.masked_fill(~are_documents, 0.0))[:number]
        logits = (sums / self.temperature).masked_fill(~are_documents, -torch.inf)
        is_pair = are_documents & _occur(query_ids, number)
        own_logits = torch.where(is_pair, sums.diagonal() / self.temperature, 0.0)
        others = logits.masked_fill(torch.eye(number, dtype=torch.bool, device=sums.device), -torch.inf)
        return self.reduce(cross_entropy(masked_logsumexp(others), own_logits), is_pair)


def _occur(ids: Tensor, number: int) -> Tensor:
    """Whether each of 0 to number - 1 is among the ids."""
    counts = torch.zeros(number + 1, device=ids.device).index_add(0, ids + 1, torch.ones(len(ids), device=ids.device))
    return counts[1:] > 0
