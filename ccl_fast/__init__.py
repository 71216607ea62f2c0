"""Cluster-aware contrastive learning: exact losses, linear memory, any batch size."""

from ccl_fast.losses import CCLLoss, InfoNCELoss, SupConLoss
from ccl_fast.ops import streaming_logsumexp
from ccl_fast.version import __version__

__all__ = ["CCLLoss", "InfoNCELoss", "SupConLoss", "__version__", "streaming_logsumexp"]
