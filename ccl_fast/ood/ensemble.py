"""Several detectors as one, each of all features or of some."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_positive, check_seed, check_sequence, shown
from ccl_fast.errors import ArgumentError
from ccl_fast.ood.detector import FeatureDetector
from ccl_fast.ood.folds import scores_of_unseen


class Ensemble(FeatureDetector):
    r"""Mean of the detectors' scores, each standardised by its training scores.

    .. math::
        s(x) = \sum_{d \in D} w_d \frac{s_d(x) - m_d}{\sigma_d} \Big/ \sum_{d \in D} w_d

    m_d and sigma_d are mean and standard deviation of detector d's training scores (a sigma of 0 counts as 1). These
    have to be of samples which the detector has not seen: a neighbour detector gives its own training samples 0, and a
    Mahalanobis distance is smaller for the samples that shaped the covariance, so one detector would drown another.
    Hence each training sample is scored by a detector fitted without it. The samples are dealt out at random to
    ``folds`` parts, and each part is scored by the detectors fitted to the others (with N folds: leave-one-out). The
    detectors that are kept have been fitted to everything.

    Args:
        detectors: at least one, with ``fit_features(x, y)`` and ``predict_features(x)``, fitted in place. They must do
            with a share (folds - 1) / folds of the samples. Models of their own are not used.
        weights: w, one for every detector, positive; by default equal.
        folds: number of parts, 2 to N; each detector is fitted ``folds + 1`` times.
        seed: seed of the parts.
        model: see :class:`FeatureDetector`.
    """

    _tensors = ("means", "stds")

    def __init__(
        self,
        detectors: Sequence,
        *,
        weights: Sequence[float] | None = None,
        folds: int = 5,
        seed: int = 0,
        model: Callable[[Tensor], Tensor] | None = None,
    ):
        check_sequence("detectors", detectors, "detectors of features")
        if weights is not None:
            check_sequence("weights", weights, "positive numbers")
        self.detectors, self.folds, self.seed = list(detectors), folds, seed
        self.weights = [1.0] * len(self.detectors) if weights is None else list(weights)
        super().__init__(model)

    def _check_hyperparameters(self) -> None:
        wrong = [type(d).__name__ for d in self.detectors if not hasattr(d, "predict_features")]
        if wrong or not self.detectors:
            raise ArgumentError(f"detectors: expected a sequence of detectors of features, got {wrong or 'none'}")
        if len(self.weights) != len(self.detectors):
            expected = f"a positive number for each of {len(self.detectors)} detectors"
            raise ArgumentError(f"weights: expected {expected}, got {shown(self.weights)}")
        for place, weight in enumerate(self.weights):
            check_positive(f"weights[{place}]", weight)
        check_count("folds", self.folds, least=2)
        check_seed("seed", self.seed)

    def _inside(self) -> dict[str, FeatureDetector]:
        return {f"detectors.{i}": _ours(detector) for i, detector in enumerate(self.detectors)}

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        moments = []
        for detector in self.detectors:
            scores = scores_of_unseen(detector, x, y, self.folds, self.seed)
            detector.fit_features(x, y)
            moments.append((scores.mean(), scores.std(correction=0)))
        self.means, stds = (torch.stack(moment) for moment in zip(*moments, strict=True))
        self.stds = torch.where(stds > 0, stds, 1.0)

    def _score(self, x: Tensor) -> Tensor:
        scores = torch.stack([detector.predict_features(x).to(x) for detector in self.detectors], 1)
        weights = scores.new_tensor(self.weights) / sum(self.weights)
        return (scores - self.means) / self.stds @ weights


def _ours(detector: object) -> FeatureDetector:
    """The detector, if its state can be kept."""
    if not isinstance(detector, FeatureDetector):
        raise ArgumentError(
            f"detector: expected one of ccl_fast's, whose state is known, got {type(detector).__name__}"
        )
    return detector


class Columns(FeatureDetector):
    """A detector that sees some of the features, for an :class:`Ensemble` of features of several kinds.

    Args:
        detector: of those features, fitted in place.
        columns: which they are.
        clusters: whether it gets the clusters that this one is fitted with.
        model: see :class:`FeatureDetector`.

    Example:
        >>> import torch
        >>> from ccl_fast.ood import Columns, Ensemble, Mahalanobis, NearestNeighbor
        >>> encoder_features, layer_statistics = torch.randn(600, 128), torch.randn(600, 8)
        >>> features = torch.cat([encoder_features, layer_statistics], 1)
        >>> parts = [Columns(NearestNeighbor(), slice(128)), Columns(Mahalanobis(), slice(128, None))]
        >>> detector = Ensemble(parts).fit_features(features)
    """

    def __init__(
        self,
        detector: FeatureDetector,
        columns: slice,
        *,
        clusters: bool = True,
        model: Callable[[Tensor], Tensor] | None = None,
    ):
        self.detector, self.columns, self.clusters = detector, columns, clusters
        super().__init__(model)

    def _check_hyperparameters(self) -> None:
        if not hasattr(self.detector, "predict_features"):
            raise ArgumentError(f"detector: expected a detector of features, got {type(self.detector).__name__}")
        if not isinstance(self.columns, slice):
            raise ArgumentError(f"columns: expected a slice, got {self.columns!r}")

    def _inside(self) -> dict[str, FeatureDetector]:
        return {"detector": _ours(self.detector)}

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        self.detector.fit_features(x[:, self.columns], y if self.clusters else None)

    def _score(self, x: Tensor) -> Tensor:
        return self.detector.predict_features(x[:, self.columns])
