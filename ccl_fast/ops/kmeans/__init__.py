"""The steps of k-means: nearest centres, sums by cluster, distances; and their backends."""
