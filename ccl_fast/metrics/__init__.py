"""Measures of embeddings, of their similarities, and of clusters."""

from ccl_fast.metrics.cluster_quality import cluster_quality
from ccl_fast.metrics.score_histogram import ScoreHistogram, score_histogram
from ccl_fast.metrics.uniformity import tolerance, uniformity

__all__ = ["ScoreHistogram", "cluster_quality", "score_histogram", "tolerance", "uniformity"]
