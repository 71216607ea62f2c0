"""Clusterings: pseudo-labels, centres, and what goes with them."""

from ccl_fast.clustering.alignment import align_clusters
from ccl_fast.clustering.concentration import concentration
from ccl_fast.clustering.kmeans import KMeans

__all__ = ["KMeans", "align_clusters", "concentration"]
