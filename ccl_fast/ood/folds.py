"""Scores of training samples by detectors that have not seen them."""

from __future__ import annotations

import torch
from torch import Tensor

from ccl_fast.errors import ArgumentError


def scores_of_unseen(detector, x: Tensor, y: Tensor | None, folds: int, seed: int) -> Tensor:
    """Scores [N] of training rows x [N, D], each by the detector fitted without it and its part of the rows.

    The rows are dealt out at random to ``folds`` parts, always the same for a seed. The detector is left as the last
    fit has made it. Raises ValueError if there are fewer rows than parts.
    """
    if len(x) < folds:
        raise ArgumentError(f"x: expected at least folds={folds} rows, got {len(x)}")
    generator = torch.Generator().manual_seed(int(seed))
    fold = (torch.randperm(len(x), generator=generator, device="cpu") % folds).to(x.device)
    scores = x.new_empty(len(x))
    for i in range(folds):
        seen = fold != i
        detector.fit_features(x[seen], None if y is None else y[seen])
        scores[~seen] = detector.predict_features(x[~seen]).to(scores)
    return scores
