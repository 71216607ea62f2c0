"""InfoNCE whose negatives are weighted by the pair of clusters, with weights that learn."""

import math

import torch
from torch import Tensor, nn

from ccl_fast.checks import check_count, check_floating, check_matrix, check_same, host_knows
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.batch import check_ids, check_queries
from ccl_fast.losses.meow import MEOWLoss
from ccl_fast.ops import row_dot, streaming_logsumexp
from ccl_fast.ops.differentiable import savable
from ccl_fast.ops.precision import accumulation_dtype

# Of a removed key, besides all that the embeddings can bring: exp is 0 there also in float64.
REMOVED = -800.0


class AdaMEOWLoss(MEOWLoss):
    r"""InfoNCE whose negatives have a weight by their cluster and the anchor's.

    .. math::
        \ell(q_i) = \log \sum_{j} w_{y_i y_j} e^{\langle q_i, k_j \rangle / T} - \langle q_i, k_i \rangle / T

    The positive is weighted like all others: all weights times c shift the loss by log c and leave the gradients of the
    embeddings. With ``weigh_positive=False`` it has the weight 1; then with all weights 1 it is InfoNCE, with weights 0
    within a cluster and 1 between two `MEOWLoss`, and weights that learn go to 0. Two uses, as there: views
    ``[n, 2, d]`` and two towers. The logarithms of the weights enter the log-sum-exp as k more dimensions of each
    anchor (its cluster's row of them) against a one of each key (its cluster), so memory is linear in n, and the
    weights get their gradient like the embeddings: in half precision rounded, as the logarithms are.

    The adaptive weights of Yu, Ge, Li, Zhou, "Heterogeneous Graph Contrastive Learning with Meta-path Contexts and
    Adaptively Weighted Negative Samples" (AdaMEOW, arXiv:2212.13847). The authors' code has a weight for each pair of
    nodes, n x n of them, from a network that `PairWeights` applies to clusters: here there is one for each pair of
    clusters. It contrasts in one direction (``symmetric=False``), at T of 0.9 to 1.

    Args:
        temperature: T, > 0; the initial value if learnable.
        symmetric: two towers contrast in both directions (keys are anchors too).
        weigh_positive: the positive has the weight of its cluster with itself in the sum, as in the authors' code; if
            not, it has the weight 1.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. (It runs on one process.)

    Cost:
        operators: LSE of rows of D + K: the logarithms of the weights against the cluster, `candidates="other_id"`
            by sample; the positive.
        units: 4 of N x N x (D + K): views once, N all rows; two towers for each direction.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import AdaMEOWLoss, PairWeights
        >>> centers, cluster_ids = torch.randn(3, 16), torch.arange(8) % 3
        >>> weights = PairWeights(16)(centers)
        >>> AdaMEOWLoss(temperature=0.2)(torch.randn(8, 2, 16), cluster_ids, weights=weights).backward()
    """

    unsupported = ("process_group", "exchange")

    def forward(self, queries: Tensor, cluster_ids: Tensor, *, weights: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            cluster_ids: ``[n]``, integers, from 0 to k - 1, or -1: unassigned, of weight 1 with all samples.
            weights: ``[k, k]``, floating point, not negative: of an anchor's cluster (row) with a negative's (column).
                They get a gradient. A weight of 0 removes the keys and gets none. An anchor that nothing is left for
                contributes 0 and does not count in the mean (with ``weigh_positive=False`` it counts).
            keys: ``[n, d]``; row i is the positive of query i.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per anchor: ``[n, 2]`` for
            views and for two towers in both directions (second column: the keys), else ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is out of range (on a GPU an assertion on the device).
        """
        check_queries(queries, keys)
        _check_weights(weights, queries)
        check_ids("cluster_ids", cluster_ids, queries, weights.shape[0], "clusters with weights")
        samples, scale = torch.arange(queries.shape[0], device=queries.device), 1.0 / self.temperature

        def losses(anchors: Tensor, positives: Tensor, keys: Tensor | None) -> Tensor:
            views = 2 if keys is None else 1
            ids, of_sample = cluster_ids.long().repeat(views), samples.repeat(views)
            logits = row_dot(anchors, positives) * scale
            rows, columns = self._with_weights(anchors, anchors if keys is None else keys, ids, weights)
            among = {}
            if not self.weigh_positive:
                among = {"q_ids": of_sample, "k_ids": of_sample, "candidates": "other_id"}
            elif keys is None:  # all but itself
                each = torch.arange(rows.shape[0], device=rows.device)
                among = {"q_ids": each, "k_ids": each, "candidates": "other_id"}
            weighted = streaming_logsumexp(rows, columns, scale=scale, backend=self.backend, **among)
            found = self._losses(weighted, logits)
            return found.masked_fill(_nothing_left(ids, weights), -torch.inf) if self.weigh_positive else found

        return self._reduced(self.both_directions(queries, keys, losses, self.symmetric))

    def _with_weights(self, anchors: Tensor, keys: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, d + k], whose inner products are theirs plus T log w."""
        if weights.shape[0] == 0:
            return anchors, keys
        wide = accumulation_dtype(anchors)
        weights, unassigned = weights.to(wide), (ids < 0)[:, None]
        # Neither an infinity, which the zeros of the keys would make NaN, nor a gradient through the logarithm of 0.
        removed = weights == 0
        log_weights = self.temperature * weights.masked_fill(removed, 1.0).log()
        rows = torch.where(removed, self._removed(anchors, keys), log_weights)
        anchors_more = rows.index_select(0, ids.clamp(min=0)).masked_fill(unassigned, 0.0)
        keys_more = ids[:, None] == torch.arange(weights.shape[0], device=ids.device)
        return torch.cat((anchors, anchors_more.to(anchors.dtype)), 1), torch.cat((keys, keys_more.to(keys.dtype)), 1)

    @torch.no_grad()
    def _removed(self, anchors: Tensor, keys: Tensor) -> Tensor:
        """What stands for T log 0: no embeddings outweigh it."""
        norms = torch.cat((anchors, keys)).to(accumulation_dtype(anchors)).square().sum(1)
        largest = norms.amax() if norms.shape[0] else norms.sum()
        return (self.temperature * REMOVED - 2.0 * largest).clamp(min=torch.finfo(anchors.dtype).min)


class PairWeights(nn.Module):
    r"""A weight in (0, 1) for each pair of clusters, by a small network of the sum of their centres.

    .. math::
        w_{ab} = \sigma \big( v^\top \tanh(W (a + b) + u) + c \big)

    AdaMEOW's network (arXiv:2212.13847), with the embeddings of two nodes for the centres of two clusters. Its sigmoid
    is 0.5 at the start, more or less.

    Args:
        features: d, of the centres.
        hidden: width.

    Raises:
        ValueError: an argument is no positive integer.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import PairWeights
        >>> PairWeights(features=16)(torch.randn(3, 16)).shape
        torch.Size([3, 3])
    """

    def __init__(self, features: int, hidden: int = 16):
        super().__init__()
        check_count("features", features)
        check_count("hidden", hidden)
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, 1)

    def forward(self, centers: Tensor, key_centers: Tensor | None = None) -> Tensor:
        """Return the weights.

        Args:
            centers: ``[k, d]``, of the anchors' clusters.
            key_centers: ``[k, d]``, of the negatives' (in the other view, say); None for the same.

        Returns:
            ``[k, k]``: the weights of `AdaMEOWLoss`; symmetric without ``key_centers``.
        """
        width = self.first.in_features
        for name, x in (("centers", centers), ("key_centers", centers if key_centers is None else key_centers)):
            check_matrix(name, x, columns=width)
            check_same(name, x, "the network", self.first.weight)
        centers = savable(centers)
        key_centers = centers if key_centers is None else savable(key_centers)
        # Linear before it is added up: k x k x hidden, not k x k x d.
        pairs = self.first(centers)[:, None] + nn.functional.linear(key_centers, self.first.weight)
        return self.second(pairs.tanh()).squeeze(-1).sigmoid()


def _nothing_left(ids: Tensor, weights: Tensor) -> Tensor:
    """Of which rows every key is removed, their positives too: [n] bool."""
    assigned = ids >= 0
    present = torch.zeros(weights.shape[0] + 1, dtype=torch.bool, device=ids.device)
    present[torch.where(assigned, ids, weights.shape[0])] = True  # the last: unassigned keys, which nothing removes
    kept = ((weights > 0) & present[:-1]).any(1) | present[-1]
    return assigned & ~kept[ids.clamp(min=0)] if weights.shape[0] else torch.zeros_like(assigned)


def _check_weights(weights: Tensor, queries: Tensor) -> None:
    check_matrix("weights", weights)
    check_floating("weights", weights)
    check_same("weights", weights, "queries", queries, dtype=False)
    if weights.shape[0] != weights.shape[1]:
        raise ArgumentError(f"weights: expected shape [k, k], got {list(weights.shape)}")
    if host_knows(weights) and weights.numel():
        low, high = (float(x) for x in weights.detach().aminmax())
        if not 0 <= low <= high < math.inf:
            raise ArgumentError(f"weights: expected finite numbers >= 0, got {low:g} to {high:g}")
