"""Cluster features: k-means, partly labelled classes, online clusters, and what losses need of a clustering."""

from ccl_fast.clustering.alignment import align_clusters
from ccl_fast.clustering.bank import ClusteredBank
from ccl_fast.clustering.class_discovery import ClassDiscovery
from ccl_fast.clustering.concentration import concentration
from ccl_fast.clustering.kmeans import KMeans
from ccl_fast.clustering.label_shift import LatentLabelShift
from ccl_fast.clustering.laplacian import LaplacianKMeans
from ccl_fast.clustering.online import OnlineClusters
from ccl_fast.clustering.pooling import pool_by_clusters
from ccl_fast.clustering.transport import transport_prototypes

__all__ = [
    "ClassDiscovery",
    "ClusteredBank",
    "KMeans",
    "LaplacianKMeans",
    "LatentLabelShift",
    "OnlineClusters",
    "align_clusters",
    "concentration",
    "pool_by_clusters",
    "transport_prototypes",
]
