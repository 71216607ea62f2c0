"""Which detectors a model is judged by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from ccl_fast.ood import Columns, CosineNorm, Ensemble, Mahalanobis, NearestCenter, NearestNeighbor, PrototypeScore

if TYPE_CHECKING:
    from ccl_fast.ood.detector import FeatureDetector

DEFAULT = "all/ensemble"
"""The detector to quote; the pictures show its scores."""
# What detectors see: features after and before the projection head, and both beside the layers' statistics.
LEVELS = ("head", "encoder", "all")
# The neighbour that is asked, for so many training images one further (Sun et al.: the 50th of 50,000).
IMAGES_A_NEIGHBOR = 2000
# Parts of the training images in turn unseen by the ensembles' detectors.
FOLDS = 5
# Shrinkage of the covariances of layers' channels, which are those of all images and not of small clusters.
OF_LAYERS = 0.01


class Drawn(TypedDict):
    """Which training features a detector of neighbours keeps."""

    max_rows: int | None
    seed: int


def make_detectors(
    n: int, clusters: int, seed: int, widths: Sequence[int], rows: int | None = None
) -> dict[str, FeatureDetector]:
    """Make detectors for the features of n training images, by "<level>/<name>". They see training features only.

    Args:
        n, clusters, seed: numbers of images and clusters, seed of the ensembles' folds and of random rows.
        widths: of the parts of the level "all", see `embed_layers`.
        rows: images whose features are kept for nearest neighbours, at random, where there are more; None: all.
    """
    # The same rows for all that keep some: a file has them once.
    drawn: Drawn = {"max_rows": rows, "seed": seed}
    k = max(1, (n if rows is None else min(n, rows)) // IMAGES_A_NEIGHBOR)
    detectors: dict[str, FeatureDetector] = {}
    for level in ("head", "encoder"):
        ensemble = [NearestNeighbor(**drawn), Mahalanobis(n_clusters=clusters)]
        of_level = {
            "nearest_neighbor": NearestNeighbor(k=k, **drawn),
            "nearest_center": NearestCenter(n_clusters=clusters),
            "energy": PrototypeScore("energy", n_clusters=clusters),
            "mahalanobis": Mahalanobis(n_clusters=clusters),
            "cosine_norm": CosineNorm(**drawn),
            "ensemble": Ensemble(ensemble, folds=min(FOLDS, n), seed=seed),
        }
        detectors |= {f"{level}/{name}": detector for name, detector in of_level.items()}
    return detectors | {DEFAULT: _ensemble_of_all(k, drawn, n, clusters, seed, widths)}


def _ensemble_of_all(k: int, drawn: Drawn, n: int, clusters: int, seed: int, widths: Sequence[int]) -> Ensemble:
    """Make the default detector.

    Half of its score looks at what an image shows: the nearest neighbour and the nearest cluster of its features, after
    the head and before it; the other half at the Mahalanobis distances of the layers' channels. Without layers there is
    the first half.
    """
    ends = list(itertools.accumulate(widths))
    head, encoder, *layers = (slice(end - width, end) for end, width in zip(ends, widths, strict=True))
    detectors = []
    for features in (head, encoder):
        detectors.append(Columns(NearestNeighbor(k=k, **drawn), features))
        detectors.append(Columns(Mahalanobis(n_clusters=clusters), features))
    weights = [1 / len(detectors)] * len(detectors) + [1 / len(layers) for _ in layers]
    for columns in layers:
        distance = Mahalanobis(shrinkage=OF_LAYERS, normalize=False)
        detectors.append(Columns(distance, columns, clusters=False))
    return Ensemble(detectors, weights=weights, folds=min(FOLDS, n), seed=seed)
