# ruff: noqa: E402 (the extra must be there)
"""The linear probe, against its definition."""

import pytest
import torch
from torch.nn.functional import cross_entropy

for extra in ("torchmetrics", "matplotlib", "jinja2", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.evaluation import linear, linear_accuracy

NAMES = torch.tensor([10**12, -3, 7])  # classes of any number


def make(n, m, spread=1.5):
    centers = torch.randn(3, 5)
    of_train, of_test = torch.randint(3, (n,)), torch.randint(3, (m,))
    train, test = (centers[ids] + spread * torch.randn(len(ids), 5) for ids in (of_train, of_test))
    return train, of_train, test, of_test


def fitted(train, classes, test):
    """The classes that the definition finds for the test features."""
    mean, deviation = train.mean(0), train.std(0, correction=0)
    x = ((train - mean) / deviation).double()
    weights, bias = (torch.zeros(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3,)))
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = cross_entropy(x @ weights.T + bias, classes, reduction="sum") + weights.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return ((((test - mean) / deviation).double()) @ weights.T + bias).argmax(1)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (30, 50)])
def test_against_its_definition(n, m):
    train, of_train, test, of_test = make(n, m)
    right = (fitted(train, of_train, test) == of_test).double().mean().item()
    found = linear_accuracy(train, NAMES[of_train], test, NAMES[of_test])
    assert found == pytest.approx(right, abs=1.01 / m)  # one image on the border
    assert 0.34 < found < 1
    scale = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0])
    scaled = linear_accuracy(train * scale + 5, NAMES[of_train], test * scale + 5, NAMES[of_test])
    assert scaled == pytest.approx(found, abs=1.01 / m)


def test_of_many_images_some_are_fitted_to(monkeypatch):
    monkeypatch.setattr(linear, "MAX_TRAIN", 40)
    train, of_train, test, of_test = make(400, 100)
    rows = torch.linspace(0, 399, 40, dtype=torch.float64).long()
    some = linear_accuracy(train[rows], of_train[rows], test, of_test)
    assert linear_accuracy(train, of_train, test, of_test) == some


def test_a_limit_of_iterations_is_no_warning(monkeypatch):
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 1)
    assert 0 <= linear_accuracy(*make(100, 50)) <= 1


def test_one_class_or_none_in_common():
    train, _, test, of_test = make(20, 30)
    one = torch.full((20,), 2)
    assert linear_accuracy(train, one, test, of_test) == pytest.approx((of_test == 2).double().mean().item())
    assert linear_accuracy(train, torch.arange(20) % 3, test, of_test + 5) == 0
