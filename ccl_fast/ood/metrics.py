"""How well scores (higher = more outlying) separate OOD samples from those of the training distribution."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ccl_fast.checks import check_choice, check_has_values, check_tensor
from ccl_fast.errors import ArgumentError

# Which samples a threshold is to catch.
Positive = Literal["ood", "id"]
POSITIVES: tuple[Positive, ...] = get_args(Positive)


def ood_metrics(scores: Tensor | np.ndarray, is_ood: Tensor | np.ndarray) -> dict[str, float]:
    """All metrics of this file at once.

    Args:
        scores: floating point [N], a tensor or an array, higher = more outlying.
        is_ood: bool [N], a tensor or an array, with both kinds present.

    Returns:
        ``{"auroc", "aupr_ood", "aupr_id", "fpr95_ood", "fpr95_id"}``; ``_ood`` and ``_id`` name the positive class.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    scores, is_ood = _checked(scores, is_ood)
    return {
        "auroc": auroc(scores, is_ood),
        "aupr_ood": aupr(scores, is_ood, positive="ood"),
        "aupr_id": aupr(scores, is_ood, positive="id"),
        "fpr95_ood": fpr95(scores, is_ood, positive="ood"),
        "fpr95_id": fpr95(scores, is_ood, positive="id"),
    }


def aupr(scores: Tensor | np.ndarray, is_ood: Tensor | np.ndarray, positive: Positive) -> float:
    """Area under the precision-recall curve, by the trapezoidal rule.

    That is the rule of OpenOOD and pytorch-ood (AUPR-OUT: ``positive="ood"``, AUPR-IN: ``positive="id"``). Average
    precision, a sum of rectangles, is a slightly different number. Chance is the share of the positive class, so the
    two numbers differ, and the positive class has no default.

    Args:
        scores: floating point [N], a tensor or an array, higher = more outlying.
        is_ood: bool [N], a tensor or an array, with both kinds present.
        positive: "ood" or "id".

    Returns:
        A float in [0, 1]; higher is better.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    caught, alarms = _curve(scores, is_ood, positive)
    # Beyond the highest score nothing is caught, and precision is 1 by convention. Counts first: they are exact.
    precision, caught = F.pad(caught / (caught + alarms), (1, 0), value=1), F.pad(caught, (1, 0))
    return (torch.trapezoid(precision, caught) / caught[-1]).item()


def auroc(scores: Tensor | np.ndarray, is_ood: Tensor | np.ndarray) -> float:
    """Area under the ROC curve: ``P(score of an OOD sample > score of an ID sample) + P(equal) / 2``.

    Args:
        scores: floating point [N], a tensor or an array, higher = more outlying.
        is_ood: bool [N], a tensor or an array, with both kinds present.

    Returns:
        A float in [0, 1]; 0.5 is chance.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    from scipy.stats import rankdata

    scores, is_ood = _checked(scores, is_ood)
    # Mann and Whitney's count of pairs: halves, which float64 adds without rounding. Trapezoids would be rounded.
    positive = is_ood.numpy()
    n_ood = int(positive.sum())
    n_id = len(positive) - n_ood
    pairs = rankdata(scores.double().numpy())[positive].sum() - n_ood * (n_ood + 1) / 2
    return float(pairs / (n_ood * n_id))


def fpr95(scores: Tensor | np.ndarray, is_ood: Tensor | np.ndarray, positive: Positive) -> float:
    """False-positive rate at the threshold that catches at least 95 % of the positive class.

    With ``positive="ood"``: the share of ID samples flagged as OOD when 95 % of the OOD samples are.
    With ``positive="id"``: the share of OOD samples accepted as ID when 95 % of the ID samples are.
    Publications use both, and the numbers differ, so the positive class has no default.

    Args:
        scores: floating point [N], a tensor or an array, higher = more outlying.
        is_ood: bool [N], a tensor or an array, with both kinds present.
        positive: "ood" or "id".

    Returns:
        A float in [0, 1]; lower is better.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    caught, alarms = _curve(scores, is_ood, positive)
    return (alarms / alarms[-1])[caught / caught[-1] >= 0.95][0].item()


def _checked(scores: Tensor | np.ndarray, is_ood: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Tensors [N] on the CPU, without gradient."""
    scores, is_ood = _as_tensor("scores", scores), _as_tensor("is_ood", is_ood)
    if scores.ndim != 1 or not scores.is_floating_point() or scores.element_size() < 2:
        raise ArgumentError(f"scores: expected a floating-point tensor [N], got {scores.dtype} {list(scores.shape)}")
    if scores.isnan().any():
        raise ArgumentError("scores: expected numbers, got NaN")
    if is_ood.dtype != torch.bool or is_ood.shape != scores.shape:
        raise ArgumentError(f"is_ood: expected bool {list(scores.shape)}, got {is_ood.dtype} {list(is_ood.shape)}")
    if is_ood.all() or not is_ood.any():
        raise ArgumentError("is_ood: expected both ID and OOD samples, got only one kind")
    return scores, is_ood


def _as_tensor(name: str, x) -> Tensor:
    if isinstance(x, Tensor):
        check_tensor(name, x)
        check_has_values(name, x, "which are counted")
        return x.detach().cpu()
    # A masked array is one too, but its mask would be without effect.
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise ArgumentError(f"{name}: expected a tensor or an array, got {type(x).__name__}")
    kind = next((kind for kind in (np.bool_, np.floating, np.integer) if np.issubdtype(x.dtype, kind)), None)
    if kind is None:
        raise ArgumentError(f"{name}: expected numbers, got an array of {x.dtype}")
    # Whatever its precision, its strides and the order of its bytes.
    return torch.from_numpy(np.array(x, {np.bool_: bool, np.floating: np.float64, np.integer: np.int64}[kind]))


def _curve(scores: Tensor | np.ndarray, is_ood: Tensor | np.ndarray, positive: Positive) -> tuple[Tensor, Tensor]:
    """Count those of the positive class and the others beyond a threshold at each distinct score, as float64.

    The threshold that catches least comes first.
    """
    check_choice("positive", positive, POSITIVES)
    scores, is_ood = _checked(scores, is_ood)
    scores, is_positive = (-scores, is_ood) if positive == "ood" else (scores, ~is_ood)
    distinct, place = scores.unique(return_inverse=True)
    caught, alarms = (place[kind].bincount(minlength=len(distinct)).cumsum(0) for kind in (is_positive, ~is_positive))
    return caught.double(), alarms.double()
