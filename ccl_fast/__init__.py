"""Cluster-aware contrastive learning: exact losses, linear memory, any batch size."""

import importlib
from typing import TYPE_CHECKING

from ccl_fast.later import imported_later
from ccl_fast.losses import CCLLoss, InfoNCELoss, NTXentLoss, SupConLoss
from ccl_fast.ops import streaming_logsumexp
from ccl_fast.version import __version__

if TYPE_CHECKING:
    from ccl_fast.clustering import KMeans

# Imported when they are used: the commands of ``ccl-fast`` need the packages of ``ccl-fast[train]``, and scikit-learn,
# from which KMeans derives, takes half as long to import as torch.
_PARTS = ("clustering", "metrics", "ood")
_LATER = {"KMeans": "clustering"} | dict.fromkeys(
    ("train", "compare", "evaluate", "load_run", "score", "embed", "export"), "commands"
)

__all__ = ["CCLLoss", "InfoNCELoss", "KMeans", "NTXentLoss", "SupConLoss", "__version__", "streaming_logsumexp"]


def __getattr__(name: str):
    if name in _PARTS:  # ``ccl_fast.ood.Mahalanobis`` after ``import ccl_fast`` alone
        return importlib.import_module(f"{__name__}.{name}")
    return imported_later(__name__, _LATER, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER, *_PARTS})
