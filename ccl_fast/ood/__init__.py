"""Out-of-distribution detection: detectors on features, and the metrics that judge them."""

from ccl_fast.ood.clusters import Mahalanobis, NearestCenter
from ccl_fast.ood.ensemble import Columns, Ensemble
from ccl_fast.ood.metrics import aupr, auroc, fpr95, ood_metrics
from ccl_fast.ood.neighbors import CosineNorm, NearestNeighbor
from ccl_fast.ood.prototypes import PrototypeScore
from ccl_fast.ood.separation import LinearSeparation

__all__ = [
    "Columns",
    "CosineNorm",
    "Ensemble",
    "LinearSeparation",
    "Mahalanobis",
    "NearestCenter",
    "NearestNeighbor",
    "PrototypeScore",
    "aupr",
    "auroc",
    "fpr95",
    "ood_metrics",
]
