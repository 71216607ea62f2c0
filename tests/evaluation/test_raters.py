"""Agreement of labels and raters against the formula of the adjusted Rand index by pairs of samples."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

pytest.importorskip("jinja2")  # the extra "train"

from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import rater_agreement


def adjusted_rand_index(a, b):
    """By all pairs of the samples that both have in a cluster (Hubert and Arabie)."""
    kept = [(x, y) for x, y in zip(a, b, strict=True) if x >= 0 and y >= 0]
    pairs = list(itertools.combinations(kept, 2))
    together = [(p[0] == q[0], p[1] == q[1]) for p, q in pairs]
    both, first, second = (sum(f(t) for t in together) for f in (all, lambda t: t[0], lambda t: t[1]))
    expected = Fraction(first * second, len(pairs))
    return float((both - expected) / (Fraction(first + second, 2) - expected))


def test_means_over_raters_and_over_their_pairs():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=random)
    others = torch.randint(4, (3, 60), generator=random)
    ratings = torch.where(torch.rand(3, 60, generator=random) < 0.7, labels, others)
    ratings[1, ::5] = -1  # not rated
    of_labels = [adjusted_rand_index(labels.tolist(), r) for r in ratings.tolist()]
    of_pairs = [adjusted_rand_index(*pair) for pair in itertools.combinations(ratings.tolist(), 2)]
    found = rater_agreement(labels, ratings)
    assert found.labels == pytest.approx(sum(of_labels) / 3)
    assert found.raters == pytest.approx(sum(of_pairs) / 3)
    assert rater_agreement(7 - labels, list(ratings.int() * 2 + (ratings < 0))) == pytest.approx(found)  # names


def test_the_same_clusters_and_a_single_rater():
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert rater_agreement(labels, torch.stack([labels + 3, 9 - labels])) == (1.0, 1.0)
    found = rater_agreement(labels, labels[None])
    assert found.labels == 1.0 and math.isnan(found.raters)


def test_wrong_arguments():
    labels = torch.arange(4)
    for wrong, said in (
        ((labels, labels[None, :3]), r"^ratings\[0\]: expected shape \[4\], got \[3\]"),
        ((labels, torch.zeros(0, 4)), r"^ratings: expected at least one rater, got none"),
        ((labels, torch.zeros(1, 4) + 0.5), r"^ratings\[0\]: expected integers, got torch.float32"),
        ((labels, [labels, -1 - labels]), r"^ratings\[1\]: expected samples in a cluster that labels have"),
        ((labels[:0], labels[None]), r"^labels: expected shape \[n\]"),
        (([0], labels[None]), r"^labels: expected a torch.Tensor"),
        ((labels, 3), r"^ratings: expected a sequence of clusterings"),
    ):
        with pytest.raises(ArgumentError, match=said):
            rater_agreement(*wrong)
