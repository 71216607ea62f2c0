# ruff: noqa: E402 (the extra must be there)
"""Metrics of resampled images: those that `ood_metrics` gives of the images drawn."""

import numpy as np
import pytest
import torch

for extra in ("torchmetrics", "matplotlib", "jinja2", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.evaluation import bootstrap
from ccl_fast.evaluation.bootstrap import confidence_interval, difference_intervals, metric_intervals, resample_metrics
from ccl_fast.ood import ood_metrics

GROUPS = {"near": ["a", "b"], "far": ["c"], "nothing": []}


def scores_of(sizes, decimals=None, shift=0.3):
    shifts = dict.fromkeys(sizes, shift) | {"test": 0.0}
    scores = {part: torch.randn(n) + shifts[part] for part, n in sizes.items()}
    return {part: x if decimals is None else x.round(decimals=decimals) for part, x in scores.items()}


@pytest.mark.parametrize("decimals", [None, 1, 0])  # without ties, with some, with many
@pytest.mark.parametrize("sizes", [(50, 33, 20, 41), (1, 1, 1, 1), (21, 400, 3, 2)])
def test_every_resample_has_the_metrics_of_the_images_drawn(sizes, decimals, monkeypatch):
    sizes = dict(zip(("test", "a", "b", "c"), sizes, strict=True))
    drawn = []

    def draws(*arguments, of=bootstrap._draws):
        for block in of(*arguments):
            drawn.append(block)
            yield block

    monkeypatch.setattr(bootstrap, "_draws", draws)
    monkeypatch.setattr(bootstrap, "_BLOCK", 1000)  # several blocks
    of_detectors = {"one": scores_of(sizes, decimals), "two": scores_of(sizes, decimals)}
    found = resample_metrics(of_detectors, GROUPS, resamples=60)
    counts = {part: torch.cat([block[part] for block in drawn]).long() for part in sizes}
    assert all(len(of_part) == 60 and bool((of_part.sum(1) == sizes[part]).all()) for part, of_part in counts.items())
    for detector, scores in of_detectors.items():
        assert list(found[detector]) == ["near", "far", "a", "b", "c"]
        for row in range(0, 60, 7):
            taken = {part: x.repeat_interleave(counts[part][row]) for part, x in scores.items()}
            expected = {}
            for name in ("a", "b", "c"):
                is_ood = torch.arange(sizes["test"] + sizes[name]) >= sizes["test"]
                expected[name] = ood_metrics(torch.cat([taken["test"], taken[name]]), is_ood)
                cuts = {p: taken["test"].sort().values[-(-p * sizes["test"] // 100) - 1] for p in (90, 99)}
                below = {f"fpr{p}_id": (taken[name] <= cut).double().mean().item() for p, cut in cuts.items()}
                expected[name] |= below
            expected["far"] = expected["c"]
            expected["near"] = {m: (v + expected["b"][m]) / 2 for m, v in expected["a"].items()}
            for of, metrics in expected.items():
                values = {metric: of_metric[row] for metric, of_metric in found[detector][of].items()}
                assert values == pytest.approx(metrics, abs=2e-6), (detector, of)


def test_draws_depend_on_seed_and_sizes_alone(monkeypatch):
    sizes = {"test": 30, "a": 20, "b": 20, "c": 9}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = resample_metrics({"d": scores_of(sizes)}, GROUPS, seed=3, resamples=40)
    torch.manual_seed(9)
    scores = scores_of(sizes)
    again, other = (resample_metrics({"d": scores}, GROUPS, seed=seed, resamples=40) for seed in (3, 4))
    monkeypatch.setattr(bootstrap, "_BLOCK", 500)
    in_blocks = resample_metrics({"x": scores_of(sizes), "d": scores}, GROUPS, seed=3, resamples=40)
    assert (in_blocks["d"]["near"]["auroc"] == again["d"]["near"]["auroc"]).all()
    assert (other["d"]["near"]["auroc"] != again["d"]["near"]["auroc"]).any()
    assert (first["d"]["a"]["auroc"] != again["d"]["a"]["auroc"]).any()
    assert (np.random.get_state()[1] == state[1]).all()


def test_pairing_finds_a_difference_that_single_intervals_hide():
    sizes = {"test": 200, "a": 200, "b": 200, "c": 200}
    scores = scores_of(sizes)
    better = {part: x if part == "test" else x + 0.05 for part, x in scores.items()}  # of the same images
    first, second = (resample_metrics({"d": of}, GROUPS) for of in (scores, better))
    alone = [metric_intervals(of)["d"]["near"]["auroc"] for of in (first, second)]
    assert alone[0][1] > alone[1][0]
    low, high = difference_intervals(first, second)["d"]["near"]["auroc"]
    assert 0 < low < high < 0.05
    assert difference_intervals(first, first)["d"]["far"]["fpr95_id"] == [0, 0]


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth = torch.distributions.Normal(0, 1).cdf(torch.tensor(1 / 2**0.5)).item()  # P(N(1, 1) > N(0, 1))
    sizes, covered = {"test": 100, "a": 100}, 0
    for _ in range(200):
        values = resample_metrics({"d": scores_of(sizes, shift=1.0)}, {"near": ["a"]}, resamples=200)
        low, high = confidence_interval(values["d"]["a"]["auroc"])
        covered += low <= truth <= high
    assert 0.88 < covered / 200 < 0.995


def test_perfect_separation_has_no_width():
    scores = {"test": torch.zeros(9), "a": torch.ones(5)}
    found = metric_intervals(resample_metrics({"d": scores}, {"near": ["a"]}, resamples=20))["d"]["near"]
    assert found["auroc"] == found["aupr_ood"] == found["aupr_id"] == [1, 1]
    assert found["fpr95_id"] == found["fpr95_ood"] == [0, 0]
