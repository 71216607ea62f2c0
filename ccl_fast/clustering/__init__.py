"""Cluster features: k-means, partly labelled classes, online clusters, and what losses need of a clustering."""

from ccl_fast.clustering.alignment import align_clusters
from ccl_fast.clustering.class_discovery import ClassDiscovery
from ccl_fast.clustering.concentration import concentration
from ccl_fast.clustering.kmeans import KMeans
from ccl_fast.clustering.label_shift import LatentLabelShift
from ccl_fast.clustering.laplacian import LaplacianKMeans
from ccl_fast.clustering.online import OnlineClusters

__all__ = [
    "ClassDiscovery",
    "KMeans",
    "LaplacianKMeans",
    "LatentLabelShift",
    "OnlineClusters",
    "align_clusters",
    "concentration",
]
