"""Outliers among the very samples that are fitted to, by a plane that another detector's most certain ones suggest."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_fraction, check_seed
from ccl_fast.errors import ArgumentError
from ccl_fast.ood.detector import FeatureDetector
from ccl_fast.ood.folds import scores_of_unseen
from ccl_fast.ood.neighbors import NearestNeighbor

# Of the mixture of scores, as the authors have it; scores are between 0 and 1.
MIXTURE = {"n_components": 2, "max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}
MAX_ITERATIONS = 1000


class LinearSeparation(FeatureDetector):
    r"""Distance to the plane between the rows that a seed detector is sure are outliers, and all others.

    For unlabelled rows of which some are outliers. The seed's scores of the rows, scaled to [0, 1], are taken for a
    mixture of two normal distributions. Rows that belong to the one with the larger mean with a posterior above the
    threshold are trusted outliers (o = 1), all others are not (o = 0). An unpenalised logistic regression, both kinds
    with the same total weight, tells them apart by the standardised features :math:`\tilde x`:

    .. math::
        s(x) = \langle w, \tilde x \rangle + b, \qquad
        w, b = \arg\min \sum_i \omega_{o_i} \log \big( 1 + e^{(1 - 2 o_i) (\langle w, \tilde x_i \rangle + b)} \big)

    Contrastive features of outliers lie apart from the rest by a plane, though not far away; which plane that is, a few
    sure ones tell. The scores of the rows that it is fitted to are what is wanted first (fit and predict the same
    rows); new rows are scored by the same plane. Given the seed's scores, affine maps of the features change nothing,
    as far as the regression has a minimum: rows that a plane separates without error have none, and w is where
    scikit-learn stops. Each row is scored by a seed that was fitted without it, as in `Ensemble`.

    Albert, Valmadre, Arazo, Krishna, O'Connor, McGuinness, "An accurate detection is not all you need to combat label
    noise in web-noisy datasets" (arXiv:2407.05528), whose seed is the loss of a network that is being trained.

    Args:
        model: see :class:`FeatureDetector`.
        seed: the detector whose scores are refined, fitted in place; None: `NearestNeighbor`. It gets the ids that
            this one is fitted with.
        posterior: above which a row is a trusted outlier.
        folds: number of parts for the seed, 2 to N.
        random_state: of the parts, and of the start of the mixture.

    Attributes:
        trusted: once fitted, how many rows were trusted outliers.

    Raises:
        ValueError: an argument has the wrong type or value; by the fit, if no row is a trusted outlier, or all are.

    Example:
        >>> import torch
        >>> from ccl_fast.ood import LinearSeparation
        >>> x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
        >>> x[:20, 0] += 5
        >>> scores = LinearSeparation().fit_features(x).predict_features(x)
        >>> scores.shape
        torch.Size([300])
    """

    hyperparameter_space: ClassVar[dict[str, list]] = {"posterior": [0.5, 0.8, 0.95, 0.99]}
    _tensors = ("weight", "bias")

    def __init__(
        self,
        model: Callable[[Tensor], Tensor] | None = None,
        *,
        seed: FeatureDetector | None = None,
        posterior: float = 0.95,
        folds: int = 5,
        random_state: int = 0,
    ):
        self.seed = NearestNeighbor() if seed is None else seed
        self.posterior, self.folds, self.random_state = posterior, folds, random_state
        self.trusted = 0
        super().__init__(model)

    def _check_hyperparameters(self) -> None:
        if not hasattr(self.seed, "predict_features"):
            raise ArgumentError(f"seed: expected a detector of features, got {type(self.seed).__name__}")
        check_fraction("posterior", self.posterior)
        check_count("folds", self.folds, least=2)
        check_seed("random_state", self.random_state)

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scores = scores_of_unseen(self.seed, x, y, self.folds, self.random_state)
        is_outlier = self._trusted_outliers(scores.double().cpu().numpy())
        self.trusted = int(is_outlier.sum())
        rows = x.double().cpu().numpy()
        scaler = StandardScaler().fit(rows)
        # Without a penalty: the larger C is, the less there is of it.
        plane = LogisticRegression(C=np.inf, max_iter=MAX_ITERATIONS, class_weight="balanced")
        with _iterations_limited_on_purpose():
            plane.fit(scaler.transform(rows), is_outlier)
        mean, scale = (cast("np.ndarray", of) for of in (scaler.mean_, scaler.scale_))
        weight = plane.coef_[0] / scale
        bias = cast("np.ndarray", plane.intercept_)[0] - weight @ mean
        self.weight, self.bias = (torch.from_numpy(np.asarray(of)).to(x) for of in (weight, bias))

    def _trusted_outliers(self, scores: np.ndarray) -> np.ndarray:
        """Of scores [N]: whether each belongs to the mixture's upper part, almost surely."""
        from sklearn.mixture import GaussianMixture

        is_outlier = np.zeros(len(scores), bool)
        if (spread := np.ptp(scores)) > 0:
            unit = ((scores - scores.min()) / spread)[:, None]
            mixture = GaussianMixture(**MIXTURE, random_state=self.random_state % 2**32)
            with _iterations_limited_on_purpose():
                mixture.fit(unit)
            is_outlier = mixture.predict_proba(unit)[:, cast("np.ndarray", mixture.means_).argmax()] > self.posterior
        if is_outlier.all() or not is_outlier.any():
            raise ArgumentError(
                f"x: expected rows of which the seed's scores set some apart (posterior > {self.posterior:g}), got "
                f"{is_outlier.sum()} of {len(scores)}"
            )
        return is_outlier

    def _score(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@contextlib.contextmanager
def _iterations_limited_on_purpose() -> Iterator[None]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
