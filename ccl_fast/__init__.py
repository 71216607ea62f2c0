"""Cluster-aware contrastive learning: exact losses, linear memory, any batch size."""

from importlib import import_module
from typing import TYPE_CHECKING

from ccl_fast.losses import CCLLoss, InfoNCELoss, NTXentLoss, SupConLoss
from ccl_fast.ops import streaming_logsumexp
from ccl_fast.version import __version__

if TYPE_CHECKING:
    from ccl_fast.clustering import KMeans

# Imported when they are used: the commands of ``ccl-fast`` need the packages of ``ccl-fast[train]``, and scikit-learn,
# from which KMeans derives, takes half as long to import as torch.
_LATER = {"KMeans": "clustering"} | dict.fromkeys(
    ("train", "compare", "evaluate", "load_run", "score", "embed", "export"), "commands"
)

__all__ = ["CCLLoss", "InfoNCELoss", "KMeans", "NTXentLoss", "SupConLoss", "__version__", "streaming_logsumexp"]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"ccl_fast.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER})
