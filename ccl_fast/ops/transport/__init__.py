"""Optimal transport of points to centres, and predictions of its plans."""
