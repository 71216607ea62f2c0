"""LinearSeparation against scikit-learn's parts put together, its invariances, and what it is for."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler, minmax_scale

from ccl_fast.errors import ArgumentError
from ccl_fast.ood import LinearSeparation, Mahalanobis, NearestNeighbor, auroc
from ccl_fast.ood.detector import FeatureDetector
from ccl_fast.ood.folds import scores_of_unseen

pytestmark = pytest.mark.usefixtures("one_thread")


def mixture(seed=0, inside=300, outside=40, d=8):
    """Rows about a plane's one side, some of them beyond it, and which these are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inside + outside, d, generator=generator, dtype=torch.float64)
    is_outlier = torch.arange(len(x)) >= inside
    x[:, :2] += torch.where(is_outlier, 1.2, -1.2)[:, None]
    return x, is_outlier


class Given(FeatureDetector):
    """A seed whose scores are a function of the features: of the sum of the first two, and noise."""

    def __init__(self, unmap=lambda x: x, factor=1.0):
        self.unmap, self.factor = unmap, factor
        super().__init__()

    def _fit(self, x, y):
        pass

    def _score(self, x):
        x = self.unmap(x)
        return self.factor * (x[:, 0] + x[:, 1] + 2.5 * (40 * x[:, 3]).sin())


def by_scikit_learn(x, scores, posterior=0.95, random_state=0):
    """As the authors have it, on given scores."""
    unit = minmax_scale(scores)[:, None]
    gmm = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=random_state).fit(unit)
    noisy = gmm.predict_proba(unit)[:, 0]
    noisy = 1 - noisy if gmm.means_[0] < gmm.means_[1] else noisy
    standard = StandardScaler().fit_transform(x)
    plane = LogisticRegression(C=np.inf, max_iter=1000, class_weight="balanced").fit(standard, noisy > posterior)
    return plane.decision_function(standard), (noisy > posterior).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("posterior", (0.5, 0.95))
def test_the_parts_of_scikit_learn(seed, posterior):
    x, _ = mixture(seed)
    detector = LinearSeparation(seed=NearestNeighbor(k=3), posterior=posterior, random_state=seed).fit_features(x)
    scores = scores_of_unseen(NearestNeighbor(k=3), x, None, 5, seed)
    expected, trusted = by_scikit_learn(x.numpy(), scores.numpy(), posterior, seed)
    np.testing.assert_allclose(detector.predict_features(x).numpy(), expected, rtol=1e-7, atol=1e-7)
    assert 0 < detector.trusted == trusted < len(x)


def test_affine_maps_of_features_and_scores_change_nothing():
    x, _ = mixture(inside=250, outside=150)
    expected = LinearSeparation(seed=Given()).fit_features(x).predict_features(x)
    turn = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for seed, mapped in (
        (Given(lambda x: (x + 1) / 3), 3 * x - 1),
        (Given(lambda x: (x - 5) @ turn.inverse()), x @ turn + 5),
        (Given(factor=7.0), x),
    ):
        found = LinearSeparation(seed=seed).fit_features(mapped).predict_features(mapped)
        assert (found - expected).norm() <= 5e-3 * expected.norm()  # as far as the regression iterates


def test_it_finds_more_than_its_seed():
    x, is_outlier = mixture(inside=600, outside=200)
    scores = Given().fit_features(x).predict_features(x)
    of_all = LinearSeparation(seed=Given()).fit_features(x).predict_features(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[:500], order[500:]
    of_new = LinearSeparation(seed=Given()).fit_features(x[seen]).predict_features(x[unseen])
    assert auroc(of_all, is_outlier) > auroc(scores, is_outlier) + 0.02
    assert auroc(of_new, is_outlier[unseen]) > auroc(scores[unseen], is_outlier[unseen]) + 0.02


def test_each_row_is_scored_by_a_seed_that_has_not_seen_it():
    x = torch.randn(20, 4)
    assert (scores_of_unseen(NearestNeighbor(), x, None, 20, 0) > 0).all()  # leave-one-out
    assert scores_of_unseen(NearestNeighbor(), torch.cat((x, x)), None, 40, 0).max() < 1e-6


def test_ids_reach_the_seed_and_rows_below_zero_do_not_count():
    x, _ = mixture()
    ids = (x[:, 2] > 0).long()
    by_ids = LinearSeparation(seed=Mahalanobis(n_clusters=1)).fit_features(x, ids).predict_features(x)
    assert not torch.allclose(by_ids, LinearSeparation(seed=Mahalanobis()).fit_features(x).predict_features(x))
    some = torch.cat((x, 9 + x[:5])), torch.cat((ids, torch.full((5,), -1)))
    torch.testing.assert_close(LinearSeparation(seed=Mahalanobis()).fit_features(*some).predict_features(x), by_ids)


def test_errors_name_the_argument():
    for given, message in (
        ({"seed": "knn"}, r"seed: expected a detector of features, got str"),
        ({"posterior": 1}, r"posterior: expected a number between 0 and 1, got 1"),
        ({"folds": 1}, r"folds: expected an integer >= 2, got 1"),
        ({"random_state": -1}, r"random_state: expected an integer >= 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            LinearSeparation(**given)
    with pytest.raises(ArgumentError, match=r"x: expected rows of which the seed's scores set some apart.*got 0 of 12"):
        LinearSeparation().fit_features(torch.ones(12, 3))
    with pytest.raises(ArgumentError, match=r"x: expected at least folds=5 rows, got 4"):
        LinearSeparation().fit_features(torch.randn(4, 3))
