"""How well a linear classifier tells classes apart by features that are given: the linear probe."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# Training images and iterations, so that a probe of digits takes a fraction of a second and one of ImageNet's features
# minutes: both are what its time is proportional to.
MAX_TRAIN, MAX_ITERATIONS = 10_000, 100


def linear_accuracy(train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor) -> float:
    r"""Return the share of test features whose class a logistic regression on the training features finds.

    .. math::
        \hat c(x) = \arg\max_c \, (W \tilde x + b)_c, \qquad
        W, b = \arg\min \sum_i -\log \mathrm{softmax}_{c_i}(W \tilde x_i + b) + \tfrac12 |W|^2

    It is scikit-learn's with its defaults. :math:`\tilde x` are the features less their mean, over their standard
    deviation, on the training images. Of more than 10,000 of these as many, evenly spaced, are fitted to, and there are
    at most 100 iterations.

    Args:
        train, test: features ``[n, d]`` and ``[m, d]``.
        train_classes, test_classes: int ``[n]`` and ``[m]``, any numbers.

    Example:
        >>> train, test = torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([[0.5], [4.5], [6.0]])
        >>> linear_accuracy(train, torch.tensor([7, 7, 9, 9]), test, torch.tensor([7, 9, 9]))
        1.0
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = torch.linspace(0, len(train) - 1, min(len(train), MAX_TRAIN), dtype=torch.float64, device="cpu").long()
    classes, truth = train_classes.cpu()[rows].numpy(), test_classes.cpu().numpy()
    if (classes == classes[0]).all():  # which scikit-learn refuses
        return float((truth == classes[0]).mean())
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is limited on purpose
        classifier.fit(train.cpu()[rows].numpy(), classes)
    return float(classifier.score(test.cpu().numpy(), truth))
