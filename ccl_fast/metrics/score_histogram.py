"""How the scores of positive and negative pairs are distributed."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ccl_fast.losses.batch import check_queries
from ccl_fast.ops import row_dot, similarity_histogram
from ccl_fast.ops.normalize import normalize_embeddings
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


class ScoreHistogram(NamedTuple):
    """Of the similarities of a batch's pairs; variances are divided by the number of pairs."""

    edges: Tensor  # [bins + 1]
    positives: Tensor  # [bins] int64, counts
    negatives: Tensor  # [bins] int64
    positive_mean: Tensor  # these four: numbers, NaN where there is no pair
    positive_variance: Tensor
    negative_mean: Tensor
    negative_variance: Tensor


@torch.no_grad()
def score_histogram(
    queries: Tensor,
    keys: Tensor,
    *,
    negatives: Tensor | None = None,
    bins: int = 100,
    range: tuple[float, float] = (-1.0, 1.0),
    normalize: bool = True,
) -> ScoreHistogram:
    r"""Count and average the scores of positive and of negative pairs, to watch a training.

    The score of a pair is :math:`\langle q_i, k_j \rangle`, a cosine with ``normalize``. Positives are the pairs
    i = j; negatives the pairs :math:`i \ne j`, or all pairs of a query and a row of ``negatives``. The moments are
    exact, by way of the means and the d x d covariances of queries and keys:

    .. math::
        \mathrm{E}\, \langle q, k \rangle = \langle \bar q, \bar k \rangle, \qquad
        \mathrm{Var}\, \langle q, k \rangle = \bar k^T C_q \bar k + \bar q^T C_k \bar q + \mathrm{tr}\, C_q C_k

    over all pairs, of which i = j is taken away. Memory is linear in n and m. No gradient flows.

    The visualisation of Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation"
    (arXiv:2108.02982), which records for each query the mean and the variance of its negatives' scores.

    Args:
        queries: ``[n, d]``; float64, float32, bfloat16, float16.
        keys: ``[n, d]``; row i is the positive of query i.
        negatives: ``[m, d]``, such as a queue. None: the keys of other samples.
        bins: their number, all of the same width.
        range: the least and the largest edge; scores outside count in the first and the last bin.
        normalize: scale rows to unit length; if not, they are used as they come.

    Cost:
        operators: `similarity_histogram`; moments by D x D covariances.
        units: 1 of N x M x D, and the counting, which takes as long.

    Returns:
        A `ScoreHistogram` on the device of ``queries``, its floating point numbers float32 (float64 for float64).

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.metrics import score_histogram
        >>> scores = score_histogram(torch.eye(4), torch.eye(4), bins=10)
        >>> scores.positive_mean, scores.negative_mean
        (tensor(1.), tensor(0.))
    """
    check_queries(queries, keys, negatives, required=("keys",))
    wide = accumulation_dtype(queries)

    def rows(x: Tensor) -> Tensor:
        return normalize_embeddings(x) if normalize else x

    q, k = rows(queries), rows(keys)
    positives = row_dot(q, k)
    options = {"bins": bins, "range": range}
    with without_autocast(q.device):
        if negatives is None:
            ids = torch.arange(len(q), device=q.device)
            counts = similarity_histogram(q, k, q_ids=ids, k_ids=ids, candidates="other_id", **options)
            mean, variance = _without(positives, *_moments(q.to(wide), k.to(wide)))
        else:
            others = rows(negatives)
            counts = similarity_histogram(q, others, **options)
            mean, variance = _moments(q.to(wide), others.to(wide))
    low, high = range
    return ScoreHistogram(
        torch.linspace(low, high, bins + 1, dtype=wide, device=q.device),
        positives.clamp(low, high).histc(bins, low, high).long(),
        counts,
        positives.mean(),
        (positives - positives.mean()).square().mean(),
        mean,
        variance,
    )


def _moments(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the inner products of all pairs."""
    q_mean, k_mean = q.mean(0), k.mean(0)
    # The products' parts by the mean of either side and by none are uncorrelated: no large numbers cancel.
    q, k = q - q_mean, k - k_mean
    by_both = torch.sum((q.T @ q) * (k.T @ k)) / (len(q) * len(k))
    return q_mean @ k_mean, (q @ k_mean).square().mean() + (k @ q_mean).square().mean() + by_both


def _without(own: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Of n x n numbers, of which the n of the diagonal are taken away."""
    n = len(own)
    rest = n * (n - 1) or math.nan
    rest_mean = (n * n * mean - own.sum()) / rest
    squares = n * n * (variance + (mean - rest_mean).square()) - (own - rest_mean).square().sum()
    return rest_mean, squares.clamp(min=0.0) / rest
