# ruff: noqa: E402 (the extra must be there)
"""The votes of the nearest training features, against scikit-learn's."""

import numpy as np
import pytest
import torch

for extra in ("torchmetrics", "matplotlib", "jinja2", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.evaluation import knn, knn_accuracy


@pytest.mark.parametrize(("n", "m", "k"), [(300, 70, 20), (300, 70, 1), (7, 30, 20), (120, 1, 5)])
@pytest.mark.parametrize("block", [16, 4096])
def test_against_scikit_learn(n, m, k, block, monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(knn, "BLOCK", block)
    names = torch.tensor([10**12, -3, 7, 8])  # classes of any number
    centers = torch.randn(4, 6)
    of_train, of_test = torch.randint(4, (n,)), torch.randint(4, (m,))
    train, test = (centers[ids] + 0.8 * torch.randn(len(ids), 6) for ids in (of_train, of_test))
    sklearn = KNeighborsClassifier(min(k, n), metric="cosine", weights=lambda d: np.exp(-d / 0.07), algorithm="brute")
    expected = sklearn.fit(train.double(), of_train).score(test.double(), of_test)
    found = knn_accuracy(train, names[of_train], test, names[of_test], k=k)
    assert found == pytest.approx(expected)
    assert 0.2 < found < 1 or m == 1
    lengths = torch.rand(n, 1) + 0.5
    assert knn_accuracy(train * lengths, names[of_train], test * 3, names[of_test], k=k) == pytest.approx(expected)


def test_near_neighbors_count_more_than_many():
    angle = torch.tensor([0.0, 0.5, 0.5, 0.5])
    train = torch.stack([angle.cos(), angle.sin()], 1)
    classes, query = torch.tensor([1, 2, 2, 2]), torch.tensor([[1.0, 0.0]])
    # 1 vote against 3 exp((cos 0.5 - 1) / temperature)
    assert knn_accuracy(train, classes, query, torch.tensor([1])) == 1
    assert knn_accuracy(train, classes, query, torch.tensor([1]), temperature=1.0) == 0


def test_a_class_that_no_training_image_has_is_never_found():
    x = torch.eye(3)
    assert knn_accuracy(x, torch.tensor([0, 1, 2]), x, torch.tensor([0, 5, 2]), k=1) == pytest.approx(2 / 3)
