"""Thresholds that test images set, and what they let through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Percent of the test images that the thresholds of a report accept.
PERCENTS = (90, 95, 99)


def threshold(test: Tensor, accept: float = 0.95) -> float:
    """Return the least score that accepts that share of the test images: those with scores up to it.

    Args:
        test: scores of the test images [n], higher = more outlying.
        accept: above 0, at most 1; as it is written in decimals, so that 0.95 of 100 images are 95.

    Example:
        >>> import torch
        >>> from ccl_fast.evaluation import threshold
        >>> threshold(torch.arange(100.0))
        94.0
    """
    return test.sort().values[math.ceil(Fraction(str(accept)) * len(test)) - 1].item()


def describe_thresholds(scores: Mapping[str, Tensor], sets: Sequence[str]) -> dict[str, dict]:
    """Return, by percent of test images accepted, the threshold and the shares of OOD images that it accepts too.

    Args:
        scores: "test" or an OOD set -> scores [n].
        sets: the OOD sets.

    Returns:
        ``{"95": {"threshold": score, "accepted": {set: share}}, ...}``.
    """
    described = {}
    for percent in PERCENTS:
        cut = threshold(scores["test"], percent / 100)
        accepted = {name: (scores[name] <= cut).double().mean().item() for name in sets}
        described[str(percent)] = {"threshold": cut, "accepted": accepted}
    return described
