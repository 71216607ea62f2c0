"""Intervals of OOD metrics: how far they would move with other images of the same kinds, by the bootstrap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot

from ccl_fast.evaluation.thresholds import PERCENTS

RESAMPLES = 1000
"""Bootstrap resamples of an interval."""
CONFIDENCE = 0.95
"""Of resamples, the share that an interval covers."""
# Entries of a block of resamples; it and what is made of it stay in a processor's cache.
_BLOCK = 2**18

# Detector -> OOD set, or mean of sets -> metric -> a value of every resample, or low and high.
Resampled = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
Intervals = dict[str, dict[str, dict[str, list[float]]]]


def resample_metrics(
    scores: Mapping[str, Mapping[str, Tensor]],
    groups: Mapping[str, Sequence[str]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Resampled:
    """Return every metric of :func:`ccl_fast.ood.ood_metrics` on resampled images.

    A resample draws, with replacement, as many test images as there are, and as many of each OOD set: the two kinds are
    strata. All detectors see the same draws, and so does whatever is called with the same seed and the same numbers of
    images, so values of the same resample are paired. Thresholds are set anew in each resample.

    Scores are sorted once; of a resample only the multiplicities of the images matter, and every metric is a sum, or an
    entry, of their cumulative sums along the sorted scores (AUROC: Mann and Whitney's count of pairs).

    Args:
        scores: detector -> "test" or an OOD set -> floating point [n], on the CPU, higher = more outlying.
        groups: name of a mean -> the OOD sets that it is the mean of. A group without sets has no mean.
        seed: of the draws.
        resamples: how many.

    Returns:
        detector -> group or OOD set -> metric -> float64 [resamples]; the metrics are those of ``ood_metrics``, and
        "fpr90_id" and "fpr99_id".

    Paper: Efron, Tibshirani, "An introduction to the bootstrap", 1993.

    Example:
        >>> import torch
        >>> from ccl_fast.evaluation import confidence_interval, resample_metrics
        >>> scores = {"mine": {"test": torch.rand(200), "noise": torch.rand(100) + 0.5}}
        >>> of_mine = resample_metrics(scores, {"far": ["noise"]})["mine"]
        >>> of_noise = of_mine["noise"]
        >>> low, high = confidence_interval(of_noise["auroc"])
        >>> 0.5 < low < high < 1
        True
    """
    sets = [name for names in groups.values() for name in names]
    parts = next(iter(scores.values()))
    sizes = {name: len(parts[name]) for name in ("test", *sets)}
    places = {d: {name: _places(of["test"], of[name]) for name in sets} for d, of in scores.items()}
    blocks: dict[str, dict[str, list[dict[str, Tensor]]]] = {d: {name: [] for name in sets} for d in scores}
    for counts in _draws(sizes, resamples, seed):
        for detector, of_sets in places.items():
            for name, (test, ood, distinct) in of_sets.items():
                of_block = _metrics(_summed(counts["test"], test, distinct), _summed(counts[name], ood, distinct))
                blocks[detector][name].append(of_block)
    return {
        detector: _with_means({name: _joined(of_set) for name, of_set in of_sets.items()}, groups)
        for detector, of_sets in blocks.items()
    }


def confidence_interval(values: np.ndarray) -> list[float]:
    """Return low and high of the percentile interval of values of resamples [n], which covers 95 % of them."""
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(values, (tail, 1 - tail)).round(6).tolist()


def metric_intervals(resampled: Resampled) -> Intervals:
    """Return low and high of every metric of :func:`resample_metrics`: {detector: {set: {metric: [low, high]}}}."""
    return {
        detector: {
            of: {m: confidence_interval(values) for m, values in metrics.items()} for of, metrics in by_set.items()
        }
        for detector, by_set in resampled.items()
    }


def difference_intervals(first: Resampled, second: Resampled) -> Intervals:
    """Return low and high of every metric of the second less the same of the first, paired by resample."""
    return metric_intervals(
        {
            detector: {
                of: {m: values - first[detector][of][m] for m, values in metrics.items()}
                for of, metrics in by_set.items()
            }
            for detector, by_set in second.items()
        }
    )


def _draws(sizes: Mapping[str, int], resamples: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield how often each image is drawn, float32 [resamples of the block, n] for each part."""
    generators = {name: np.random.default_rng([seed, number]) for number, name in enumerate(sizes)}
    step = max(1, _BLOCK // max(2 * n for n in sizes.values()))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        yield {name: _counts(generators[name], rows, n) for name, n in sizes.items()}


def _counts(generator: np.random.Generator, rows: int, n: int) -> Tensor:
    drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
    return torch.from_numpy(counts.astype(np.float32))


def _places(test: Tensor, ood: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return where each score stands among the distinct ones, and how many these are."""
    distinct, places = torch.cat([test, ood]).unique(return_inverse=True)
    return places[: len(test)], places[len(test) :], len(distinct)


def _summed(counts: Tensor, places: Tensor, distinct: int) -> Tensor:
    """Return how many images have each of the distinct scores, [resamples, distinct]."""
    return counts.new_zeros(len(counts), distinct).index_add_(1, places, counts)


def _metrics(test: Tensor, ood: Tensor) -> dict[str, Tensor]:
    """Return the metrics of images counted by their distinct scores, the lowest first: [resamples, distinct] each.

    Counts are whole numbers, which float32 adds without rounding.
    """
    test_up_to, ood_up_to = test.cumsum(1), ood.cumsum(1)
    n_test, n_ood = int(test_up_to[0, -1]), int(ood_up_to[0, -1])
    up_to = test_up_to + ood_up_to
    # Precision of a threshold above which lies nothing is 1, by convention.
    of_test = (test_up_to / up_to).nan_to_num_(1)
    of_ood = ((n_ood - ood_up_to) / (n_ood + n_test - up_to)).nan_to_num_(1)
    pairs = vecdot(ood, test_up_to) - vecdot(ood, test) / 2
    metrics = {
        "auroc": pairs / (n_test * n_ood),
        "aupr_ood": _trapezoids(ood, of_ood, n_ood / (n_ood + n_test)) / n_ood,
        "aupr_id": _trapezoids(test, of_test, 1) / n_test,
    }

    def column(values: float) -> Tensor:
        return test.new_full((len(test), 1), values)

    # The threshold that catches 95 % of the OOD images: below it are no more of them than may be missed.
    at = torch.searchsorted(ood_up_to, column(n_ood - _needed(95, n_ood)), right=True)
    metrics["fpr95_ood"] = 1 - torch.cat([column(0), test_up_to], 1).gather(1, at)[:, 0].double() / n_test
    for percent in PERCENTS:
        at = torch.searchsorted(test_up_to, column(_needed(percent, n_test)))
        metrics[f"fpr{percent}_id"] = ood_up_to.gather(1, at)[:, 0].double() / n_ood
    return metrics


def _trapezoids(caught: Tensor, precision: Tensor, start: float) -> Tensor:
    """Return the area under a precision that begins with ``start``; ``caught`` at each threshold, [resamples, n]."""
    before = vecdot(caught[:, 1:], precision[:, :-1]) + start * caught[:, 0]
    return (vecdot(caught, precision) + before) / 2


def _needed(percent: int, n: int) -> int:
    """Return the least number of n that is at least so many percent."""
    return -(-percent * n // 100)


def _joined(blocks: Sequence[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    return {metric: torch.cat([block[metric] for block in blocks]).double().numpy() for metric in blocks[0]}


def _with_means(
    by_set: Mapping[str, Mapping[str, np.ndarray]], groups: Mapping[str, Sequence[str]]
) -> dict[str, Mapping[str, np.ndarray]]:
    """Return the means over groups, resample by resample, and the sets."""
    means = {
        group: {m: np.mean([by_set[name][m] for name in names], 0) for m in by_set[names[0]]}
        for group, names in groups.items()
        if names
    }
    return means | dict(by_set)
