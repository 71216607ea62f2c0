"""Contrastive losses on the nodes of a graph."""

from ccl_fast.losses.graph.csgcl import CSGCLLoss, community_strength
from ccl_fast.losses.graph.lightgcl import LightGCLLoss, SVDView
from ccl_fast.losses.graph.scgc import SCGCLoss, influence_matrix

__all__ = ["CSGCLLoss", "LightGCLLoss", "SCGCLoss", "SVDView", "community_strength", "influence_matrix"]
