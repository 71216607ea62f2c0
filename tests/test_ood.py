"""Detectors against their formulas in float64, metrics against scikit-learn on asymmetric data."""

import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from ccl_fast.ood import Mahalanobis, NearestCenter, NearestNeighbor, auroc, detectors, fpr95


def scored(seed: int, n_id: int = 90, n_ood: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    """Few, skewed OOD samples: swapping the classes or the sign changes every metric."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.cat([torch.randn(n_id, generator=generator), 1 + torch.randn(n_ood, generator=generator).exp()])
    order = torch.randperm(len(scores), generator=generator)
    return scores[order], (torch.arange(len(scores)) >= n_id)[order]


def fpr_at_95(is_positive, scores):
    false_positive_rate, true_positive_rate, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return false_positive_rate[(true_positive_rate >= 0.95).argmax()]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed):
    scores, is_ood = scored(seed)
    assert auroc(scores, is_ood) == pytest.approx(roc_auc_score(is_ood, scores))
    assert auroc(scores, is_ood) > 0.7
    as_ood, as_id = fpr95(scores, is_ood, positive="ood"), fpr95(scores, is_ood, positive="id")
    assert as_ood == pytest.approx(fpr_at_95(is_ood, scores))
    assert as_id == pytest.approx(fpr_at_95(~is_ood, -scores))
    assert as_ood != pytest.approx(as_id)


def test_metrics_count_ties_and_ignore_the_scale():
    scores, is_ood = scored(0)
    coarse = scores.round()
    assert auroc(coarse, is_ood) == pytest.approx(roc_auc_score(is_ood, coarse))
    assert fpr95(coarse, is_ood, positive="id") == pytest.approx(fpr_at_95(~is_ood, -coarse))
    for transformed in (scores + 100, 1e-6 * scores, scores.double() * 1e6):  # saturates a sigmoid
        assert auroc(transformed.double(), is_ood) == pytest.approx(roc_auc_score(is_ood, transformed))
    assert auroc(torch.zeros(10), torch.arange(10) < 3) == 0.5
    assert auroc(is_ood.float(), is_ood) == 1
    assert fpr95(is_ood.float(), is_ood, positive="ood") == 0


def test_wrong_arguments_of_metrics():
    scores, is_ood = scored(0)
    with pytest.raises(ValueError, match=r"^positive: expected .* got 'in'"):
        fpr95(scores, is_ood, positive="in")
    with pytest.raises(ValueError, match=r"^is_ood: expected both"):
        auroc(scores, torch.ones_like(is_ood))
    with pytest.raises(ValueError, match=r"^is_ood: expected bool"):
        auroc(scores, is_ood.float())
    with pytest.raises(ValueError, match=r"^scores: expected numbers, got NaN"):
        auroc(scores * float("nan"), is_ood)
    with pytest.raises(ValueError, match=r"^scores: expected a floating-point"):
        auroc(scores.long(), is_ood)


@pytest.fixture
def features():
    """Training features of three clusters of different size and shape, and others."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 60 + [1] * 40 + [2] * 20)
    stretch = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    center = 3 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    x = center[y] + stretch[y] * torch.randn(len(y), 6, generator=generator, dtype=torch.float64)
    new = 3 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    return x, y, new


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)


@pytest.mark.parametrize("k", [1, 4])
def test_nearest_neighbor(features, k, monkeypatch):
    x, _, new = features
    expected = 1 - cosine(new, x).sort(1, descending=True).values[:, k - 1]
    torch.testing.assert_close(NearestNeighbor(k).fit_features(x).predict_features(new), expected)
    monkeypatch.setattr(detectors, "BLOCK_ENTRIES", 500)
    torch.testing.assert_close(NearestNeighbor(k).fit_features(x).predict_features(new), expected)


def test_nearest_center(features):
    x, y, new = features
    unit = x / x.norm(dim=1, keepdim=True)
    centers = torch.stack([unit[y == c].mean(0) for c in range(3)])
    expected = 1 - cosine(new, centers).amax(1)
    torch.testing.assert_close(NearestCenter().fit_features(x, y).predict_features(new), expected)


def test_mahalanobis(features):
    x, y, new = features
    unit, new_unit = (v / v.norm(dim=1, keepdim=True) for v in (x, new))
    standard, new_standard = ((v - unit.mean(0)) / unit.std(0, correction=0) for v in (unit, new_unit))
    distances = []
    for c in range(3):
        cluster = standard[y == c]
        centered = cluster - cluster.mean(0)
        covariance = centered.T @ centered / len(cluster)
        shrunk = 0.8 * covariance + 0.2 * covariance.trace() / 6 * torch.eye(6, dtype=torch.float64)
        difference = new_standard - cluster.mean(0)
        distances.append(((difference @ shrunk.inverse()) * difference).sum(1))
    expected = torch.stack(distances).amin(0)
    torch.testing.assert_close(Mahalanobis(shrinkage=0.2).fit_features(x, y).predict_features(new), expected)


@pytest.mark.parametrize(
    "detector", [NearestNeighbor(), NearestCenter(3), Mahalanobis(3)], ids=lambda d: type(d).__name__
)
def test_higher_is_more_outlying_and_lengths_do_not_count(features, detector):
    x, _, new = features
    assert detector.fit_features(x) is detector
    inside, outside = detector.predict_features(x), detector.predict_features(new)
    is_ood = torch.arange(len(x) + len(new)) >= len(x)
    assert auroc(torch.cat([inside, outside]), is_ood) > 0.9
    torch.testing.assert_close(detector.predict_features(5 * new), outside)


def test_mahalanobis_survives_a_cluster_of_one(features):
    x, y, new = features
    y = y.clone()
    y[0] = 7
    assert Mahalanobis().fit_features(x, y).predict_features(new).isfinite().all()


def test_wrong_arguments_of_detectors(features):
    x, y, _ = features
    with pytest.raises(ValueError, match=r"^k: expected a positive integer, got 0"):
        NearestNeighbor(0)
    with pytest.raises(ValueError, match=r"^x: expected at least k=200 rows, got 120"):
        NearestNeighbor(200).fit_features(x)
    with pytest.raises(ValueError, match=r"^shrinkage: expected"):
        Mahalanobis(shrinkage=0)
    with pytest.raises(ValueError, match=r"^y: expected integer labels \[120\], got torch.int64 \[119\]"):
        NearestCenter().fit_features(x, y[1:])
    with pytest.raises(ValueError, match=r"^x: expected a floating-point tensor \[rows, features\]"):
        NearestCenter().fit_features(x[0])
