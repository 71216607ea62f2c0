"""Out-of-distribution detection: detectors on features, and the metrics that judge them."""

from ccl_fast.ood.detectors import Mahalanobis, NearestCenter, NearestNeighbor
from ccl_fast.ood.metrics import auroc, fpr95

__all__ = ["Mahalanobis", "NearestCenter", "NearestNeighbor", "auroc", "fpr95"]
