"""ClassDiscovery, and the evidence it goes by."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t
from sklearn.base import clone

from ccl_fast.clustering import ClassDiscovery
from ccl_fast.clustering.evidence import cluster_moments, log_evidence, log_posterior
from tests.oracles.waves import waves

KAPPA, PSI = 1e-4, 0.005


def two_clusters():
    e = torch.eye(3, dtype=torch.float64)
    x = torch.cat((0.05 * waves(10, 3) + e[0], 0.05 * waves(12, 3, 1.1, 0.3) + e[1]))
    return x - x.mean(0), torch.arange(22) // 10 > 0


def test_the_authors_figures():
    x, second = two_clusters()
    halves = cluster_moments(x, second.long(), 2)
    whole = cluster_moments(x, torch.zeros(22).long(), 1)
    torch.testing.assert_close(halves.sum(0), whole[0])
    assert log_evidence(whole, KAPPA, PSI).item() == pytest.approx(27.938794, abs=1e-6)
    log_h = log_posterior(halves, KAPPA, PSI).sum() - log_posterior(whole, KAPPA, PSI)
    assert log_h.item() == pytest.approx(44.2247, abs=1e-4)


@pytest.mark.parametrize("n, d", ((7, 3), (1, 2), (20, 1), (3, 5)))
def test_evidence_is_the_product_of_the_predictive_densities(n, d):
    x = waves(n, d).numpy()
    expected, mean, scatter, kappa, nu = 0.0, np.zeros(d), 0.3 * np.eye(d), 0.5, d + 1
    for row in x:
        shape = scatter * (kappa + 1) / (kappa * (nu - d + 1))
        expected += multivariate_t(mean, shape, df=nu - d + 1).logpdf(row)
        scatter = scatter + kappa / (kappa + 1) * np.outer(row - mean, row - mean)
        mean, kappa, nu = (kappa * mean + row) / (kappa + 1), kappa + 1, nu + 1
    moments = cluster_moments(torch.from_numpy(x), torch.zeros(n).long(), 1)
    assert log_evidence(moments, 0.5, 0.3).item() == pytest.approx(expected)


def test_an_empty_cluster_counts_for_nothing():
    moments = cluster_moments(waves(5, 3), torch.full((5,), 1), 3)
    assert log_posterior(moments, KAPPA, PSI)[[0, 2]].tolist() == [0, 0]
    assert log_evidence(moments, KAPPA, PSI)[[0, 2]].tolist() == pytest.approx([0, 0], abs=1e-9)


def blobs(classes, each=40, d=6, seed=0):
    random = np.random.default_rng(seed)
    y = np.arange(classes * each) % classes
    centers = random.normal(size=(classes, d))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    return centers[y] + 0.05 * random.normal(size=(len(y), d)), y


def partly(y, known, share=0.5):
    return np.where((y < known) & (np.arange(len(y)) < share * len(y)), y, -1)


@pytest.mark.parametrize("classes, known, start", ((8, 3, None), (8, 3, 20), (5, 5, None), (4, 0, None), (9, 2, 2)))
@pytest.mark.parametrize("seed", range(3))
def test_separated_classes_are_found(classes, known, start, seed):
    x, y = blobs(classes, seed=seed)
    labels = partly(y, known)
    model = ClassDiscovery(30, n_clusters=start, random_state=seed).fit(x, labels)
    assert model.n_clusters_ == classes == len(model.cluster_centers_)
    np.testing.assert_array_equal(model.labels_[labels >= 0], labels[labels >= 0])
    pairs = set(zip(y.tolist(), model.labels_.tolist(), strict=True))
    assert len(pairs) == classes and {(c, c) for c in range(known)} <= pairs
    np.testing.assert_array_equal(model.predict(x), model.labels_)
    moments = cluster_moments(torch.from_numpy(x - x.mean(0)), torch.from_numpy(model.labels_), classes)
    assert model.log_posterior_ == pytest.approx(log_posterior(moments, KAPPA, PSI).sum().item())


@pytest.mark.parametrize("each, enough", ((140, True), (40, False)))
def test_classes_need_rows_for_their_covariances(each, enough):
    x, y = blobs(6, each=each, d=16)  # D^2 / 2 is 128; three classes have labels, and never merge
    assert ClassDiscovery(30).fit(x, partly(y, 3)).n_clusters_ in ((6,) if enough else (3, 4, 5))


def test_not_more_than_are_allowed():
    x, _ = blobs(8)
    for most in (1, 2, 5):
        assert ClassDiscovery(most).fit(x).n_clusters_ <= most
    assert ClassDiscovery(5, n_clusters=9).fit(x).n_clusters_ <= 5


def test_halves_of_five_rows_stay_together():
    x = np.array([[0.0, 0.0]] * 5 + [[1.0, 0.0]] * 5) + 0.001 * waves(10, 2).numpy()
    assert ClassDiscovery(5).fit(x).n_clusters_ == 1
    assert ClassDiscovery(5).fit(np.concatenate((x, x + 0.001))).n_clusters_ == 2


def test_labelled_rows_are_not_parted_and_labelled_classes_do_not_merge():
    x, y = blobs(3)
    together = np.where(y > 0, 1, 0)  # classes 1 and 2 have one label
    assert ClassDiscovery(9).fit(x, together).n_clusters_ == 2
    assert ClassDiscovery(9).fit(x, np.where(np.arange(len(y)) < 90, together, -1)).n_clusters_ in (2, 3)
    one = np.zeros((40, 2)) + 0.01 * waves(40, 2).numpy()
    apart = np.where(np.arange(40) < 10, np.arange(40) % 2, -1)  # two labels of one cluster
    assert ClassDiscovery(9).fit(one, apart).n_clusters_ == 2


def test_tensors_give_what_arrays_give():
    x, y = blobs(6)
    labels = partly(y, 2)
    expected = ClassDiscovery(20).fit(x, labels)
    for dtype in (torch.float64, torch.float32):
        model = ClassDiscovery(20).fit(torch.from_numpy(x).to(dtype), torch.from_numpy(labels))
        assert model.labels_.equal(torch.from_numpy(expected.labels_)) and model.cluster_centers_.dtype == dtype
        assert model.predict(torch.from_numpy(x).to(dtype)).equal(model.labels_)
    np.testing.assert_array_equal(ClassDiscovery(20).fit_predict(x, labels=labels), expected.labels_)


def test_it_is_an_estimator():
    model = ClassDiscovery(7, psi=0.1)
    assert repr(clone(model)) == "ClassDiscovery(max_clusters=7, psi=0.1)"
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(np.zeros((3, 2)))


def test_evidence_is_symmetric_in_the_halves_and_in_rotations():
    x, second = two_clusters()
    rotation = torch.linalg.qr(waves(3, 3)).Q
    there = log_evidence(cluster_moments(x, second.long(), 2), KAPPA, PSI)
    turned = log_evidence(cluster_moments(x @ rotation, (~second).long(), 2), KAPPA, PSI)
    torch.testing.assert_close(there, turned.flip(0))
    assert math.isfinite(there.sum().item())


FAR = 1e8 * np.eye(5)[np.arange(200) % 4] + 0.01 * np.random.default_rng(0).normal(size=(200, 5))
ERRORS = {
    "most": ({"max_clusters": 0}, {}, "max_clusters: expected a positive integer, got 0"),
    "start": ({"n_clusters": 0}, {}, "n_clusters: expected a positive integer, got 0"),
    "kappa": ({"kappa": 0}, {}, "kappa: expected a positive number, got 0"),
    "psi": ({"psi": -1}, {}, "psi: expected a positive number, got -1"),
    "rounding": ({}, {"X": FAR}, "psi: expected more than the rounding of the data's squares, .*, got 0.005"),
    "no rows": ({}, {"X": np.zeros((0, 3))}, "X: expected at least one row, got none"),
    "problems": ({}, {"X": np.zeros((2, 12, 3))}, r"X: expected shape \[rows, features\], got \[2, 12, 3\]"),
    "gap": ({}, {"labels": [0, 2] + [-1] * 10}, "labels: expected classes 0 to 1, got 2"),
    "many": ({}, {"labels": [0, 9] + [-1] * 10}, "labels: expected labels below max_clusters=5, got 9"),
    "length": ({}, {"labels": [0]}, r"labels: expected integers \[12\], got torch.int64 \[1\]"),
}


@pytest.mark.parametrize("options, given, message", ERRORS.values(), ids=ERRORS)
def test_errors(options, given, message):
    with pytest.raises(ValueError, match=message):
        ClassDiscovery(**{"max_clusters": 5} | options).fit(**{"X": waves(12, 3).numpy()} | given)
