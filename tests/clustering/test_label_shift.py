"""LatentLabelShift on mixtures whose shares are known."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.base import clone

from ccl_fast.clustering import LatentLabelShift

OF_DOMAINS = np.array([[0.7, 0.2, 0.5], [0.3, 0.8, 0.5]])  # p(y | d)
OF_CELLS = np.array([[0.6, 0.0], [0.4, 0.3], [0.0, 0.7]])  # p(cell | y)


def exact(of_domains=OF_DOMAINS, of_cells=OF_CELLS, each=1000):
    """Rows p(d | x), their domains and cells, in exactly these shares."""
    shares = of_cells @ of_domains
    counts = (shares * each).round().astype(int)
    cells, domains = (np.repeat(x, counts.ravel()) for x in np.indices(counts.shape).reshape(2, -1))
    return (shares / shares.sum(1, keepdims=True))[cells], domains, cells


def in_best_order(found, expected):
    """The order of the classes found that is nearest to the expected one."""
    orders = itertools.permutations(range(len(expected)))
    return list(min(orders, key=lambda order: np.abs(found[list(order)] - expected).sum()))


def test_exact_shares_are_found():
    p, domains, _ = exact()
    model = LatentLabelShift(2).fit(p, domains)
    order = in_best_order(model.class_shares_, OF_DOMAINS)
    np.testing.assert_allclose(model.class_shares_[order], OF_DOMAINS, atol=1e-10)
    cells = model.cell_shares_[:, order]
    assert sorted(cells.round(10).tolist()) == sorted(OF_CELLS.tolist())


def test_probabilities_are_those_of_bayes():
    p, domains, cells = exact()
    model = LatentLabelShift(2).fit(p, domains)
    order = in_best_order(model.class_shares_, OF_DOMAINS)
    joint = OF_CELLS * OF_DOMAINS.mean(1)
    expected = (joint / joint.sum(1, keepdims=True))[cells]
    np.testing.assert_allclose(model.predict_proba(p)[:, order], expected, atol=1e-10)
    joint = OF_CELLS[cells] * OF_DOMAINS.T[domains]
    expected = joint / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(p, domains)[:, order], expected, atol=1e-10)
    assert (np.array(order)[expected.argmax(1)] == model.predict(p, domains)).all()


@pytest.mark.parametrize("classes, domains, cells", ((3, 3, 5), (3, 5, 4), (4, 6, 9), (1, 2, 3)))
@pytest.mark.parametrize("seed", range(3))
def test_more_classes_and_domains(classes, domains, cells, seed):
    random = np.random.default_rng(seed)
    of_domains = random.dirichlet(np.ones(classes), domains).T
    of_cells = np.concatenate((np.eye(classes), random.dirichlet(np.ones(classes), cells - classes)))
    of_cells = of_cells / of_cells.sum(0)
    p, d, _ = exact(of_domains, of_cells, each=100_000)
    model = LatentLabelShift(classes, n_cells=cells).fit(p, d)
    order = in_best_order(model.class_shares_, of_domains)
    np.testing.assert_allclose(model.class_shares_[order], of_domains, atol=2e-3)
    np.testing.assert_allclose(model.class_shares_.sum(0), 1)


def test_draws_are_told_apart():
    random = np.random.default_rng(0)
    of_domains = np.array([[0.8, 0.3, 0.1], [0.1, 0.4, 0.2], [0.1, 0.3, 0.7]])
    d = random.integers(3, size=6000)
    y = (random.random(6000)[:, None] > of_domains.T[d].cumsum(1)[:, :-1]).sum(1)
    of_classes = of_domains / of_domains.sum(1, keepdims=True)  # p(d | y), the domains being as frequent
    logits = np.log(of_classes[y]) + 0.1 * random.normal(size=(6000, 3))  # a classifier's, which is not exact
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    model = LatentLabelShift(3).fit(p, d)
    order = in_best_order(model.class_shares_, of_domains)
    assert np.abs(model.class_shares_[order] - of_domains).max() < 0.15
    assert (np.array(order)[y] == model.predict(p)).mean() > 0.9


def test_tensors_give_tensors():
    p, domains, _ = exact()
    expected = LatentLabelShift(2).fit(p, domains)
    model = LatentLabelShift(2).fit(torch.from_numpy(p), torch.from_numpy(domains))
    np.testing.assert_allclose(model.class_shares_.numpy(), expected.class_shares_)
    assert model.predict(torch.from_numpy(p)).tolist() == expected.predict(p).tolist()
    assert repr(clone(LatentLabelShift(4, n_cells=9))) == "LatentLabelShift(n_cells=9, n_classes=4)"


P, D = np.full((4, 2), 0.5), [0, 1, 0, 1]
ERRORS = {
    "classes": ({"n_classes": 0}, {}, "n_classes: expected a positive integer, got 0"),
    "cells": ({"n_cells": 1}, {}, "n_cells: expected an integer >= 2, got 1"),
    "domains": ({"n_classes": 3}, {}, "p: expected at least n_classes=3 domains, got 2"),
    "no probabilities": ({}, {"p": 2 * P}, "p: expected probabilities"),
    "below": ({}, {"p": np.tile([1.5, -0.5], (4, 1))}, "p: expected probabilities"),
    "many": ({}, {"domains": [0, 1, 2, 0]}, "domains: expected domains below columns=2, got 2"),
    "unknown": ({}, {"domains": [0, 1, -1, 0]}, "domains: expected none below 0"),
    "missing": ({}, {"domains": [0, 0, 0, 0]}, "domains: expected rows of all 2 domains, got none of 1"),
    "length": ({}, {"domains": [0, 1]}, r"domains: expected integers \[4\], got torch.int64 \[2\]"),
}


@pytest.mark.parametrize("options, given, message", ERRORS.values(), ids=ERRORS)
def test_errors(options, given, message):
    with pytest.raises(ValueError, match=message):
        LatentLabelShift(**{"n_classes": 2} | options).fit(**{"p": P, "domains": D} | given)


def test_new_rows_are_of_the_same_domains():
    model = LatentLabelShift(2).fit(P, D)
    with pytest.raises(ValueError, match="p: expected 2 domains, as fitted, got 3"):
        model.predict(np.full((4, 3), 1 / 3))
