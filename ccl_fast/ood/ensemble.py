"""Several detectors as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ccl_fast.checks import check_count
from ccl_fast.errors import ArgumentError
from ccl_fast.ood.detector import FeatureDetector


class Ensemble(FeatureDetector):
    r"""Mean of the detectors' scores, each standardised by its training scores.

    .. math::
        s(x) = \frac{1}{|D|} \sum_{d \in D} \frac{s_d(x) - m_d}{\sigma_d}

    m_d and sigma_d are mean and standard deviation of detector d's training scores (a sigma of 0 counts as 1). These
    have to be of samples which the detector has not seen: a neighbour detector gives its own training samples 0, and a
    Mahalanobis distance is smaller for the samples that shaped the covariance, so one detector would drown another.
    Hence each training sample is scored by a detector fitted without it. The samples are dealt out at random to
    ``folds`` parts, and each part is scored by the detectors fitted to the others (with N folds: leave-one-out). The
    detectors that are kept have been fitted to everything.

    Args:
        detectors: at least one, with ``fit_features(x, y)`` and ``predict_features(x)``, fitted in place. They must do
            with a share (folds - 1) / folds of the samples. Models of their own are not used.
        folds: number of parts, 2 to N; each detector is fitted ``folds + 1`` times.
        seed: seed of the parts.
        model: see :class:`FeatureDetector`.
    """

    def __init__(
        self,
        detectors: Sequence,
        *,
        folds: int = 5,
        seed: int = 0,
        model: Callable[[Tensor], Tensor] | None = None,
    ):
        self.detectors, self.folds, self.seed = list(detectors), folds, seed
        super().__init__(model)

    def _check_hyperparameters(self) -> None:
        wrong = [type(d).__name__ for d in self.detectors if not hasattr(d, "predict_features")]
        if wrong or not self.detectors:
            raise ArgumentError(f"detectors: expected a sequence of detectors of features, got {wrong or 'none'}")
        check_count("folds", self.folds, least=2)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ArgumentError(f"seed: expected an integer, got {self.seed!r}")

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        if len(x) < self.folds:
            raise ArgumentError(f"x: expected at least folds={self.folds} rows, got {len(x)}")
        generator = torch.Generator().manual_seed(self.seed)
        fold = (torch.randperm(len(x), generator=generator) % self.folds).to(x.device)
        moments = []
        for detector in self.detectors:
            scores = x.new_empty(len(x))
            for i in range(self.folds):
                seen = fold != i
                detector.fit_features(x[seen], None if y is None else y[seen])
                scores[~seen] = detector.predict_features(x[~seen]).to(scores)
            detector.fit_features(x, y)
            moments.append((scores.mean(), scores.std(correction=0)))
        self.means, stds = (torch.stack(moment) for moment in zip(*moments, strict=True))
        self.stds = torch.where(stds > 0, stds, 1.0)

    def _score(self, x: Tensor) -> Tensor:
        scores = torch.stack([detector.predict_features(x).to(x) for detector in self.detectors], 1)
        return ((scores - self.means) / self.stds).mean(1)
