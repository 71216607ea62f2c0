"""What a trained model is judged by: how well its features tell OOD sets from the test images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccl_fast.clustering import KMeans
from ccl_fast.data import Images
from ccl_fast.evaluation.knn import knn_accuracy
from ccl_fast.models import Model, embed
from ccl_fast.ood import CosineNorm, Ensemble, Mahalanobis, NearestCenter, NearestNeighbor, ood_metrics
from ccl_fast.ood.detector import FeatureDetector

# The detector to quote; the pictures show its scores.
DEFAULT = "encoder/mahalanobis"
# The neighbour that is asked, for so many training images one further (Sun et al.: the 50th of 50,000).
IMAGES_A_NEIGHBOR = 2000
# Entries of the metrics that are means over OOD sets.
GROUPS = ("near", "far")
# Runs of k-means from different starts, of which the best is kept.
STARTS = 5
# Parts of the training images in turn unseen by the ensemble's detectors.
FOLDS = 5


def make_detectors(n: int, clusters: int, seed: int) -> dict[str, FeatureDetector]:
    """New detectors for n training images, by name. They see training features and nothing else."""
    detectors = {
        "nearest_neighbor": NearestNeighbor(max(1, n // IMAGES_A_NEIGHBOR)),
        "nearest_center": NearestCenter(clusters),
        "mahalanobis": Mahalanobis(clusters),
        "cosine_norm": CosineNorm(),
    }
    return detectors | {
        "ensemble": Ensemble([NearestNeighbor(), Mahalanobis(clusters)], folds=min(FOLDS, n), seed=seed)
    }


def cluster(features: Tensor, clusters: int, seed: int) -> KMeans:
    """The clusters of training features ``[n, d]`` that the detectors get."""
    return KMeans(clusters, metric="cosine", n_init=STARTS, seed=seed).fit(features)


@dataclass
class Judgement:
    """What one model makes of training images, test images and OOD sets."""

    # detector -> "near", "far" or an OOD set -> metric -> value; a detector is "<head or encoder>/<name>".
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


def judge(
    model: Model,
    train: Images,
    test: Images,
    near: Mapping[str, Images],
    far: Mapping[str, Images],
    *,
    clusters: int,
    seed: int,
) -> Judgement:
    """Metrics of every detector on the features before ("encoder") and after ("head") the projection head.

    Every model gets its own clusters for the detectors that need some, so that none depends on how the model was
    trained. "near" and "far" are means over the sets of that kind, as in OpenOOD.
    """
    parts = {"train": train, "test": test} | dict(near) | dict(far)
    features = {name: embed(model, images) for name, images in parts.items()}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    shown: dict[str, Tensor] = {}
    for level in ("head", "encoder"):
        kmeans = cluster(features["train"][level], clusters, seed)
        if level == "head":
            of_head = kmeans
        for name, detector in make_detectors(len(train), clusters, seed).items():
            detector.fit_features(features["train"][level], kmeans.labels_)
            scores = {p: detector.predict_features(features[p][level]).cpu() for p in parts if p != "train"}
            metrics[f"{level}/{name}"] = _metrics(scores, near, far)
            if f"{level}/{name}" == DEFAULT:
                shown = scores
    knn = {}
    if train.classes is not None and test.classes is not None:
        of_train, of_test = features["train"], features["test"]
        knn = {level: knn_accuracy(x, train.classes, of_test[level], test.classes) for level, x in of_train.items()}
    return Judgement(
        metrics,
        {part: {level: x.cpu() for level, x in of_part.items()} for part, of_part in features.items()},
        shown,
        of_head.labels_.cpu(),
        of_head.cluster_centers_.cpu(),
        knn,
    )


def _metrics(scores: dict[str, Tensor], near: Sequence[str], far: Sequence[str]) -> dict[str, dict[str, float]]:
    by_set = {}
    for name in (*near, *far):
        is_ood = torch.arange(len(scores["test"]) + len(scores[name])) >= len(scores["test"])
        by_set[name] = ood_metrics(torch.cat([scores["test"], scores[name]]), is_ood)
    means = {}
    for group, names in zip(GROUPS, (near, far), strict=True):
        if names:
            of_group = [by_set[name] for name in names]
            means[group] = {metric: statistics.fmean(m[metric] for m in of_group) for metric in of_group[0]}
    return means | by_set
