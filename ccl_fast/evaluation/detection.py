"""Evaluation of a trained model: how well its features tell OOD sets from the test images."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.clustering import KMeans
from ccl_fast.evaluation.bootstrap import Resampled, resample_metrics
from ccl_fast.evaluation.detectors import DEFAULT, make_detectors
from ccl_fast.evaluation.fitted import FittedDetectors
from ccl_fast.evaluation.knn import knn_accuracy
from ccl_fast.evaluation.linear import linear_accuracy
from ccl_fast.models import Model, embed_layers
from ccl_fast.ood import Mahalanobis, ood_metrics

if TYPE_CHECKING:
    from ccl_fast.data import Images
    from ccl_fast.ood.detector import FeatureDetector

GROUPS = ("near", "far")
"""Entries of the metrics that are means over OOD sets."""
# Runs of k-means from different starts, of which the best is kept.
STARTS = 5


def cluster(features: Mapping[str, Tensor], clusters: int, seed: int) -> dict[str, KMeans]:
    """Cluster training images for the detectors of each level; those of "all" are the head's."""
    of_level = {
        level: KMeans(clusters, metric="cosine", n_init=STARTS, random_state=seed).fit(features[level])
        for level in ("head", "encoder")
    }
    return of_level | {"all": of_level["head"]}


@dataclass
class Evaluation:
    """Features, scores and metrics of one model on training images, test images and OOD sets."""

    # detector -> "near", "far" or an OOD set -> metric -> value; a detector is "<level>/<name>".
    metrics: dict[str, dict[str, dict[str, float]]]
    # "train", "test" or an OOD set -> "encoder" or "head" -> features [n, d], on the CPU
    features: dict[str, dict[str, Tensor]]
    # "test" or an OOD set -> the default detector's scores [n], on the CPU
    scores: dict[str, Tensor]
    # spherical k-means of the training images' head features: ids [n] and unit centres [k, d], on the CPU
    cluster_ids: Tensor
    centers: Tensor
    # "encoder" or "head" -> accuracy of the nearest training images' votes on the classes of the test images, if known
    knn: dict[str, float] = field(default_factory=dict)
    # accuracy of a linear classifier of the encoder's features, if classes are known
    linear: float | None = None
    # the detectors, on the CPU
    fitted: FittedDetectors | None = None
    # what a reader of the figures should know, a line each
    notes: list[str] = field(default_factory=list)
    # as metrics, but values on resampled images: of two evaluations of the same images and seed they are paired
    resampled: Resampled = field(default_factory=dict)


def evaluate_model(
    model: Model,
    train: Images,
    test: Images,
    near: Mapping[str, Images],
    far: Mapping[str, Images],
    *,
    clusters: int,
    seed: int,
    rows: int | None = None,
) -> Evaluation:
    """Evaluate every detector on its level of the model's features.

    Every model gets its own clusters for the detectors that need some, so that none depends on how the model was
    trained. "near" and "far" are means over the sets of that kind, as in OpenOOD.

    Args:
        model: it is left in the mode that it is in.
        train: images to fit the detectors to.
        test: images of the same kind.
        near, far: OOD sets by name.
        clusters: number of clusters of each level of features; fewer if there are fewer training images.
        seed: of k-means, of the ensembles' folds and of the rows.
        rows: training images, drawn at random, among which nearest neighbours are looked for; None: all.
    """
    clusters = min(clusters, len(train))
    parts = {"train": train, "test": test} | dict(near) | dict(far)
    features, widths = {}, []
    for name, images in parts.items():
        features[name], widths = embed_layers(model, images)
    kmeans = cluster(features["train"], clusters, seed)
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    of_detectors: dict[str, dict[str, Tensor]] = {}
    arguments = {"n": len(train), "clusters": clusters, "seed": seed, "widths": widths, "rows": rows}
    detectors = make_detectors(**arguments)
    for detector_name, detector in detectors.items():
        level = detector_name.partition("/")[0]
        detector.fit_features(features["train"][level], kmeans[level].labels_)
        scores = {p: detector.predict_features(features[p][level]).cpu() for p in parts if p != "train"}
        detector.to("cpu")
        metrics[detector_name] = _metrics(scores, near, far)
        of_detectors[detector_name] = scores
    knn, linear = {}, None
    if train.classes is not None and test.classes is not None:
        of_train, of_test = features["train"], features["test"]
        knn = {
            level: knn_accuracy(of_train[level], train.classes, of_test[level], test.classes)
            for level in ("encoder", "head")
        }
        linear = linear_accuracy(of_train["encoder"], train.classes, of_test["encoder"], test.classes)
    return Evaluation(
        metrics,
        {part: {level: of_part[level].cpu() for level in ("encoder", "head")} for part, of_part in features.items()},
        of_detectors[DEFAULT],
        kmeans["head"].labels_.cpu(),
        kmeans["head"].cluster_centers_.cpu(),
        knn=knn,
        linear=linear,
        fitted=FittedDetectors(
            arguments,
            detectors,
            {level: kmeans[level].cluster_centers_.cpu() for level in ("encoder", "head")},
            {name: scores["test"].sort().values for name, scores in of_detectors.items()},
        ),
        notes=_notes(detectors, len(train), rows),
        resampled=resample_metrics(of_detectors, dict(zip(GROUPS, (list(near), list(far)), strict=True)), seed),
    )


def _notes(detectors: Mapping[str, FeatureDetector], n: int, rows: int | None) -> list[str]:
    """Return what is to be said of detectors that are fitted to n images, of which some keep so many rows."""
    notes = []
    if rows is not None and rows < n:
        notes.append(f"nearest neighbours are looked for among {rows:,} of the {n:,} training images, drawn at random")
    for level in ("head", "encoder"):
        detector = detectors[f"{level}/mahalanobis"]
        assert isinstance(detector, Mahalanobis)
        if detector.is_shared:
            k, width = detector.means.shape
            notes.append(
                f"Mahalanobis distances of {level} features: the {k:,} clusters share one covariance, as their own "
                f"would take {k * width**2 * 4 / 2**30:,.1f} GiB"
            )
    return notes


def _metrics(scores: dict[str, Tensor], near: Collection[str], far: Collection[str]) -> dict[str, dict[str, float]]:
    by_set = {}
    for name in (*near, *far):
        is_ood = torch.arange(len(scores["test"]) + len(scores[name]), device="cpu") >= len(scores["test"])
        by_set[name] = ood_metrics(torch.cat([scores["test"], scores[name]]), is_ood)
    means = {}
    for group, names in zip(GROUPS, (near, far), strict=True):
        if names:
            of_group = [by_set[name] for name in names]
            means[group] = {metric: statistics.fmean(m[metric] for m in of_group) for metric in of_group[0]}
    return means | by_set
