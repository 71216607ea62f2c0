"""K-means, and what keeps clusters and training in step."""

from ccl_fast.clustering.kmeans import KMeans

__all__ = ["KMeans"]
