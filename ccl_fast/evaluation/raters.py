"""How well a clustering agrees with what several people make of the same samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ccl_fast.checks import check_sequence, check_tensor, check_vector, whole_numbers
from ccl_fast.errors import ArgumentError


class RaterAgreement(NamedTuple):
    """Mean adjusted Rand indices; 1: the same clusters, 0: as alike as chance makes them.

    Attributes:
        labels: of the labels and each of the raters.
        raters: of each two raters, which is what labels can be expected to reach; NaN of a single one.
    """

    labels: float
    raters: float


def rater_agreement(labels: Tensor, ratings: Tensor | Sequence[Tensor]) -> RaterAgreement:
    r"""Compare a clustering with those of several raters, and these with each other.

    .. math::
        \frac{1}{R} \sum_r \text{ARI}(y, z_r), \qquad \frac{2}{R (R - 1)} \sum_{r < q} \text{ARI}(z_r, z_q)

    ARI is scikit-learn's adjusted Rand index, of the samples that both have put into a cluster.

    Args:
        labels: y, cluster of every sample, integers ``[n]``; below 0: of none.
        ratings: z, of each of R raters the same; a tensor ``[R, n]`` or several ``[n]``.

    Cost: R (R + 1) / 2 tables of counts.

    Returns:
        `RaterAgreement`: of labels with raters, and of raters with each other.

    Raises:
        ArgumentError: an argument has another type or shape, or two have no sample in common.

    Example:
        >>> import torch
        >>> from ccl_fast.evaluation import rater_agreement
        >>> ratings = torch.tensor([[0, 0, 1, 1, 2], [5, 5, 5, 3, -1]])
        >>> of_labels, of_raters = rater_agreement(torch.tensor([1, 1, 0, 0, 0]), ratings)
        >>> round(of_labels, 4), of_raters
        (0.2727, 0.0)

    Paper: Hubert, Arabie, "Comparing partitions", 1985.
    """
    from sklearn.metrics import adjusted_rand_score  # takes long to import

    check_tensor("labels", labels)
    if labels.ndim != 1 or not len(labels):
        raise ArgumentError(f"labels: expected shape [n] with n of at least 1, got {list(labels.shape)}")
    check_sequence("ratings", ratings, "clusterings")
    if not len(ratings):
        raise ArgumentError("ratings: expected at least one rater, got none")
    named = {"labels": labels} | {f"ratings[{r}]": ratings[r] for r in range(len(ratings))}
    for name, of in named.items():
        check_vector(name, of, len(labels))
    clusterings = {name: whole_numbers(of).cpu() for name, of in named.items()}
    for name, of in clusterings.items():
        if of.dtype != torch.int64:
            raise ArgumentError(f"{name}: expected integers, got {of.dtype}")

    def index(one: str, other: str) -> float:
        both = (clusterings[one] >= 0) & (clusterings[other] >= 0)
        if not both.any():
            raise ArgumentError(f"{other}: expected samples in a cluster that {one} have in one too, got none")
        return float(adjusted_rand_score(clusterings[one][both].numpy(), clusterings[other][both].numpy()))

    raters = [name for name in named if name != "labels"]
    of_labels = [index("labels", rater) for rater in raters]
    of_pairs = [index(*pair) for pair in itertools.combinations(raters, 2)]
    return RaterAgreement(fmean(of_labels), fmean(of_pairs) if of_pairs else float("nan"))
